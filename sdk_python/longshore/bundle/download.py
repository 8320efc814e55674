"""Installs a bundle from an edge: what is here already is taken from here, the rest comes chunk by chunk.

Whatever breaks on the way, the current version stays, and the next try goes on from the last good chunk.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import ssl
import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import BinaryIO

from longshore.bundle.check import (
    MAX_SIGNATURE_BYTES,
    Trust,
    check_runtime,
    check_signature,
    copy_checked,
    parse_manifest,
)
from longshore.bundle.chunks import Chunk, Donors, chunks_of, digest_of, find_donors, first_run, take
from longshore.bundle.fetch import BundleChangedError, BundleServer
from longshore.bundle.files import flush
from longshore.bundle.store import SignedManifest, commit, incoming_folder, settled_folder, writing
from longshore.errors import BundleDamagedError, BundleError, ProtocolError, UnavailableError, UpstreamError
from longshore.wire import MANIFEST_NAME, SIGNATURE_NAME, BundleFile, Manifest
from longshore.wire.limits import MAX_MANIFEST_BYTES

PARTIAL_NAME = ".partial"
_NUM_ROUNDS = 3  # how often a bundle may change under a download


@dataclass(frozen=True, slots=True, kw_only=True)
class DownloadLimits:
    """`time_limit_s` for the whole install; `num_failures` in a row without one good chunk end it."""

    time_limit_s: float = 1800.0
    max_total_bytes: int = 16 * 1024**3
    num_failures: int = 5
    first_pause_s: float = 0.2


@dataclass(slots=True)
class Download:
    """What an install from an edge did; counts are of the bundle's files, chunk by chunk."""

    path: Path
    manifest: Manifest
    num_fetched_bytes: int = 0
    num_kept_bytes: int = 0


Progress = Callable[[int, int], None]


def install_from_edge(
    url: str,
    store_dir: Path | str,
    *,
    trusted_keys: Trust | None,
    onnxruntime_version: str | None = None,
    api_key: str | None = None,
    limits: DownloadLimits = DownloadLimits(),
    ssl_context: ssl.SSLContext | None = None,
    progress: Progress | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> Download:
    """Install the bundle at `url` (`https://edge/bundles/NAME`) and make it current.

    `trusted_keys` None takes an unsigned bundle as it is: for edges that are trusted like a local folder.
    `progress` gets the bytes that are there and the bytes in all. Raises what `install` raises, ConfigError
    for the URL, and a TierError or RequestError where the edge or the way to it is at fault.
    """
    server = BundleServer(
        url, deadline_s=time.monotonic() + limits.time_limit_s, api_key=api_key, ssl_context=ssl_context
    )
    try:
        for round_number in range(1, _NUM_ROUNDS + 1):
            try:
                install = _Install(server, Path(store_dir), limits, progress, sleep)
                return install.run(trusted_keys, onnxruntime_version)
            except BundleChangedError:
                if round_number == _NUM_ROUNDS:
                    raise
        raise AssertionError("the last round returns or raises")
    finally:
        server.close()


class _Install:
    """One round: a manifest and its files."""

    def __init__(
        self,
        server: BundleServer,
        store: Path,
        limits: DownloadLimits,
        progress: Progress | None,
        sleep: Callable[[float], None],
    ) -> None:
        self._server = server
        self._store = store
        self._limits = limits
        self._progress = progress
        self._sleep = sleep
        self._total_bytes = 0
        self._done: Download

    def run(self, trust: Trust | None, onnxruntime_version: str | None) -> Download:
        signed = self._retried(lambda: self._signed_manifest(trust))
        if onnxruntime_version is not None:
            check_runtime(signed.manifest, onnxruntime_version)
        files = signed.manifest.files
        self._total_bytes = sum(file.size_bytes for file in files)
        if self._total_bytes > self._limits.max_total_bytes:
            raise BundleError(f"the bundle has {self._total_bytes} bytes, more than are allowed here")
        self._done = Download(self._store, signed.manifest)
        with writing(self._store, signed.manifest.name) as home:
            settled = settled_folder(home, signed)
            if settled is not None:
                self._done.path = settled
                return self._done
            partial = _partial_folder(home, signed.manifest)
            donors = find_donors(home)
            _check_room(partial, files)
            for file in files:
                self._complete(partial / file.sha256, file, donors)
            with incoming_folder(home) as incoming:
                _move_files(partial, incoming, files)
                self._done.path = commit(home, incoming, signed)
            shutil.rmtree(partial, ignore_errors=True)
        return self._done

    def _signed_manifest(self, trust: Trust | None) -> SignedManifest:
        body = self._server.small_file(MANIFEST_NAME, MAX_MANIFEST_BYTES)
        if body is None:
            raise BundleError(f"the edge has no bundle {self._server.name}")
        signature = self._server.small_file(SIGNATURE_NAME, MAX_SIGNATURE_BYTES) or b""
        manifest = parse_manifest(body)
        if manifest.name != self._server.name:
            raise BundleError(f"{self._server.name} was asked for and {manifest.name} came")
        if trust is not None:
            check_signature(body, manifest, signature, trust)
        return SignedManifest(manifest, body, signature)

    def _retried(self, ask: Callable[[], SignedManifest]) -> SignedManifest:
        failures = 0
        while True:
            try:
                return ask()
            except (UpstreamError, UnavailableError) as error:
                failures += 1
                self._pause_or_raise(error, failures)

    def _complete(self, part: Path, file: BundleFile, donors: Donors) -> None:
        """Bring the part file to the file's bytes, each chunk of which is checked when it is written."""
        with part.open("r+b" if part.exists() else "w+b") as target:
            is_new = os.fstat(target.fileno()).st_size != file.size_bytes
            target.truncate(file.size_bytes)
            if is_new and take(donors, Chunk(0, file.size_bytes, file.sha256), target):
                is_new = False
            missing = [
                chunk
                for chunk in chunks_of(file)
                if is_new or digest_of(target, chunk.first, chunk.end - chunk.first) != chunk.sha256
            ]
            missing = [chunk for chunk in missing if not take(donors, chunk, target)]
            num_missing = sum(chunk.end - chunk.first for chunk in missing)
            self._done.num_kept_bytes += file.size_bytes - num_missing
            self._fetch(file, missing, target)
            flush(target)

    def _fetch(self, file: BundleFile, missing: list[Chunk], target: BinaryIO) -> None:
        failures = 0
        while missing:
            self._tell()
            run = first_run(missing)
            num_before = len(missing)
            try:
                for chunk in self._checked_chunks(file, run, target):
                    missing.pop(0)  # they come in order
                    self._done.num_fetched_bytes += chunk.end - chunk.first
                    self._tell()
            except (UpstreamError, UnavailableError) as error:
                failures = failures + 1 if len(missing) == num_before else 1
                self._pause_or_raise(error, failures)
        self._tell()

    def _checked_chunks(
        self, file: BundleFile, run: list[Chunk], target: BinaryIO
    ) -> Generator[Chunk, None, None]:
        """Write what comes where it belongs; gives each chunk of `run` once its digest is right."""
        wanted = iter(run)
        chunk = next(wanted, None)
        digest = hashlib.sha256()
        with closing(self._server.part(file, run[0].first, run[-1].end)) as blocks:
            for offset, block in blocks:
                at, data = offset, memoryview(block)
                while chunk is not None and at + len(data) > chunk.first:
                    skipped = max(0, chunk.first - at)  # nothing, unless the whole file came
                    piece = data[skipped : chunk.end - at]
                    at, data = at + skipped + len(piece), data[skipped + len(piece) :]
                    target.seek(at - len(piece))
                    target.write(piece)
                    digest.update(piece)
                    if at < chunk.end:
                        break
                    if digest.hexdigest() != chunk.sha256:
                        raise BundleDamagedError(
                            f"{file.path} is damaged: bytes {chunk.first} to {chunk.end} are not its own"
                        )
                    target.flush()
                    yield chunk
                    chunk, digest = next(wanted, None), hashlib.sha256()

    def _pause_or_raise(self, error: UpstreamError | UnavailableError, failures: int) -> None:
        """Wait before the next try, the longer the more have failed."""
        is_final = isinstance(error, ProtocolError | BundleChangedError)
        if is_final or failures >= self._limits.num_failures:
            raise error
        self._sleep(self._limits.first_pause_s * 2 ** (failures - 1))

    def _tell(self) -> None:
        if self._progress is not None:
            self._progress(self._done.num_kept_bytes + self._done.num_fetched_bytes, self._total_bytes)


def _partial_folder(home: Path, manifest: Manifest) -> Path:
    """Where broken downloads wait; those of other bundles are dropped."""
    partial = home / PARTIAL_NAME
    partial.mkdir(exist_ok=True)
    wanted = {file.sha256 for file in manifest.files}
    for path in partial.iterdir():
        if path.name not in wanted or path.is_symlink():
            path.unlink()
    return partial


def _check_room(partial: Path, files: tuple[BundleFile, ...]) -> None:
    present = sum(path.stat().st_blocks * 512 for path in partial.iterdir()) if os.name == "posix" else 0
    needed = sum(file.size_bytes for file in files) - present
    if needed > shutil.disk_usage(partial).free:
        raise BundleError(f"there is no room for the bundle: {needed} bytes are needed")


def _move_files(partial: Path, incoming: Path, files: tuple[BundleFile, ...]) -> None:
    """Each part file into its place, once its digest as a whole is right too."""
    for digest, same in groupby(sorted(files, key=lambda file: file.sha256), key=lambda file: file.sha256):
        paths = list(same)
        part = partial / digest
        try:
            with part.open("rb") as source:
                copy_checked(source, paths[0], None)
        except BundleDamagedError:
            part.unlink()  # its chunks are right and it is not: no download can mend that
            raise
        for file in paths:
            (incoming / file.path).parent.mkdir(parents=True, exist_ok=True)
        for file in paths[1:]:
            with (incoming / file.path).open("xb") as target, part.open("rb") as source:
                shutil.copyfileobj(source, target)
                flush(target)
        os.replace(part, incoming / paths[0].path)
