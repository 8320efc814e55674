"""Checks a bundle folder: manifest, signature, and every file byte by byte. Writes and runs nothing."""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from longshore.bundle.files import open_plain
from longshore.bundle.trust import TrustedKeys, TrustStore, VerifyingKey
from longshore.errors import BundleDamagedError, BundleError, BundleIncompatibleError
from longshore.signing import decode_base64url
from longshore.wire import MANIFEST_NAME, SIGNATURE_NAME, BundleFile, Manifest, load_manifest
from longshore.wire.limits import MAX_BUNDLE_FILES, MAX_MANIFEST_BYTES

MAX_SIGNATURE_BYTES = 1024
Trust = TrustedKeys | TrustStore
SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,99}\Z")
_BUFFER_BYTES = 1024 * 1024


def read_manifest(bundle_dir: Path | str, *, trusted_keys: Trust | None = None) -> Manifest:
    """The manifest of a bundle folder, its files not looked at; BundleDamagedError if it can't be used."""
    return read_manifest_bytes(Path(bundle_dir), trusted_keys)[1]


def load_bundle(bundle_dir: Path | str, *, trusted_keys: Trust | None = None) -> Manifest:
    """The manifest of a bundle folder, every file of which is exactly what the manifest says.

    With `trusted_keys` (key id to key, or a TrustStore) the manifest must be signed by one of them and not
    have expired.
    Raises BundleDamagedError for a file that is missing, extra, damaged, or a link; BundleError for the
    signature.
    """
    folder = Path(bundle_dir)
    _, manifest = read_manifest_bytes(folder, trusted_keys)
    refuse_extra_entries(folder, manifest)
    for file in manifest.files:
        with open_plain(folder, file.path) as source:
            copy_checked(source, file, None)
    return manifest


def check_runtime(manifest: Manifest, onnxruntime_version: str) -> None:
    """BundleIncompatibleError if the bundle needs a newer ONNX Runtime than this one."""
    if _numbers(onnxruntime_version) < _numbers(manifest.min_onnxruntime):
        raise BundleIncompatibleError(
            f"bundle {manifest.name} needs onnxruntime {manifest.min_onnxruntime}, not {onnxruntime_version}"
        )


def _numbers(version: str) -> list[int]:
    """The first three parts, those that are not there being 0."""
    return ([int(part) for part in re.findall(r"\d+", version)[:3]] + [0, 0])[:3]


def read_manifest_bytes(folder: Path, trust: Trust | None) -> tuple[bytes, Manifest]:
    if not folder.is_dir():
        raise BundleDamagedError(f"there is no bundle at {folder}")
    body = _read(folder, MANIFEST_NAME, MAX_MANIFEST_BYTES)
    manifest = parse_manifest(body)
    if trust is not None:
        # Signed is said in the manifest; a file alone would let its absence decide.
        signature = _read(folder, SIGNATURE_NAME, MAX_SIGNATURE_BYTES) if manifest.key_id else b""
        check_signature(body, manifest, signature, trust)
    return body, manifest


def parse_manifest(body: bytes) -> Manifest:
    """The manifest in these bytes, whose name can name a folder; raises BundleDamagedError."""
    manifest = load_manifest(body)
    if not SAFE_NAME.match(manifest.name) or manifest.name.endswith("."):
        raise BundleDamagedError(f"the manifest's name {manifest.name[:40]!r} can't name a folder")
    return manifest


def check_signature(body: bytes, manifest: Manifest, signature: bytes, trust: Trust) -> None:
    """BundleError unless a good key signed exactly `body` and the bundle has not expired."""
    now_s = time.time()
    key = _key_for(manifest, trust, now_s)
    if not key.verifies(_decode_signature(signature), body):
        raise BundleError(f"bundle {manifest.name}: the signature does not fit the manifest")
    if manifest.expires_at is not None and now_s >= manifest.expires_at:
        raise BundleError(f"bundle {manifest.name} has expired")


def _key_for(manifest: Manifest, trust: Trust, now_s: float) -> VerifyingKey:
    try:
        if isinstance(trust, TrustStore):
            return trust.with_chain(manifest.key_chain, now_s).key_for(manifest.key_id, now_s)
    except BundleError as error:
        raise BundleError(f"bundle {manifest.name} {error.message}") from None
    key = trust.get(manifest.key_id or "")
    if key is None:
        raise BundleError(f"bundle {manifest.name} is not signed by a trusted key")
    return key


def _decode_signature(text: bytes) -> bytes:
    """Unpadded base64url and at most one line feed; nothing for anything else, which no key verifies."""
    try:
        return decode_base64url(text.decode("ascii").removesuffix("\n"))
    except ValueError:
        return b""


def read_signature(folder: Path) -> bytes:
    """The signature file's bytes, bounded; empty if there is none."""
    if not os.path.lexists(folder / SIGNATURE_NAME):
        return b""
    return _read(folder, SIGNATURE_NAME, MAX_SIGNATURE_BYTES)


def _read(folder: Path, path: str, max_bytes: int) -> bytes:
    with open_plain(folder, path) as stream:
        return stream.read(max_bytes + 1)


def refuse_extra_entries(folder: Path, manifest: Manifest) -> None:
    """Nothing may lie in a bundle that its manifest does not name."""
    allowed = {file.path for file in manifest.files} | {MANIFEST_NAME, SIGNATURE_NAME}
    folders = {parent.as_posix() for path in allowed for parent in Path(path).parents}
    for path, is_folder in _entries(folder):
        if path not in (folders if is_folder else allowed):
            raise BundleDamagedError(f"{path} is not in the manifest")


def _entries(folder: Path) -> Iterator[tuple[str, bool]]:
    """(path from `folder`, is it a folder) of everything below it, links as files; bounded."""
    left = 4 * MAX_BUNDLE_FILES
    waiting = [folder]
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in entries:
                left -= 1
                if left < 0:
                    raise BundleDamagedError("the bundle folder holds far more than a bundle")
                is_folder = entry.is_dir(follow_symlinks=False)
                yield Path(entry.path).relative_to(folder).as_posix(), is_folder
                if is_folder:
                    waiting.append(Path(entry.path))


def copy_checked(source: BinaryIO, file: BundleFile, target: BinaryIO | None) -> None:
    """Read `source` once: its bytes into `target`, if any, while they are counted and hashed."""
    if os.fstat(source.fileno()).st_size != file.size_bytes:
        raise BundleDamagedError(f"{file.path} does not have {file.size_bytes} bytes")
    digest, num_bytes = hashlib.sha256(), 0
    while chunk := source.read(_BUFFER_BYTES):
        num_bytes += len(chunk)
        if num_bytes > file.size_bytes:
            break
        digest.update(chunk)
        if target is not None:
            target.write(chunk)
    if num_bytes != file.size_bytes or digest.hexdigest() != file.sha256:
        raise BundleDamagedError(f"{file.path} is damaged: its bytes are not those of the manifest")
