"""A store of bundles: installed atomically, rolled back, at most two versions of each name.

`STORE/NAME/VERSION/` is a version and `STORE/NAME/current` names the one in use. Whatever happens in the
middle, `current` names a whole version.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from longshore.bundle.check import (
    MAX_SIGNATURE_BYTES,
    SAFE_NAME,
    TrustedKeys,
    copy_checked,
    load_bundle,
    open_plain,
    read_manifest,
    read_manifest_bytes,
    refuse_extra_entries,
)
from longshore.errors import BundleDamagedError, BundleError, BundleRollbackError
from longshore.wire import MANIFEST_NAME, SIGNATURE_NAME, Manifest

NUM_KEPT_VERSIONS = 2
LOCK_WAIT_S = 30.0
_CURRENT_NAME = "current"
_LOCK_NAME = ".lock"
_INCOMING_PREFIX = ".incoming-"
_VERSION_FOLDER = re.compile(r"[1-9][0-9]{0,15}\Z")


@dataclass(frozen=True, slots=True)
class InstalledBundle:
    """One version in a store; `path` is its folder."""

    path: Path
    manifest: Manifest
    is_current: bool


def install(
    source_dir: Path | str, store_dir: Path | str, *, trusted_keys: TrustedKeys | None = None
) -> Path:
    """Copy a bundle into a store, checking each byte on the way, and make it current; gives its folder.

    The bytes that were checked are the ones installed. Installing the current version again changes nothing,
    unless its copy is damaged, which is then replaced. Raises BundleRollbackError for an older version or
    another bundle of the same version, BundleDamagedError as load_bundle does, BundleError if the store can't
    be written; in every case what was current stays.
    """
    source = Path(source_dir)
    body, manifest = read_manifest_bytes(source, trusted_keys)
    refuse_extra_entries(source, manifest)
    with _writing(Path(store_dir), manifest.name) as home:
        target = home / str(manifest.version)
        current = _current_version(home)
        if current is not None and _is_settled(home, current, body, manifest):
            return target
        incoming = home / f"{_INCOMING_PREFIX}{secrets.token_hex(8)}"
        try:
            _copy_bundle(source, incoming, body, manifest)
            _replace_folder(incoming, target)
        finally:
            shutil.rmtree(incoming, ignore_errors=True)
        _point_to(home, manifest.version)
        _drop_oldest(home, keep={manifest.version, current})
        return target


def installed(store_dir: Path | str, name: str) -> InstalledBundle | None:
    """The current version of a bundle, or None; its files are not checked (see load_bundle)."""
    home = _home(Path(store_dir), name)
    version = _current_version(home)
    if version is None:
        return None
    path = home / str(version)
    return InstalledBundle(path, read_manifest(path), is_current=True)


def list_installed(store_dir: Path | str) -> list[InstalledBundle]:
    """Every version in a store, by name and version; folders that hold no readable bundle are left out."""
    store = Path(store_dir)
    found: list[InstalledBundle] = []
    for home in sorted(store.iterdir()) if store.is_dir() else []:
        if not home.is_dir() or home.is_symlink() or not SAFE_NAME.match(home.name):
            continue
        current = _current_version(home)
        for version in _versions(home):
            with contextlib.suppress(BundleError):
                path = home / str(version)
                found.append(InstalledBundle(path, read_manifest(path), version == current))
    return found


def rollback(store_dir: Path | str, name: str) -> Path:
    """Make the newest version below the current one current again; gives its folder.

    The version that is checked and damaged is not taken. Raises BundleError where there is none.
    """
    with _writing(Path(store_dir), name) as home:
        current = _current_version(home)
        older = [version for version in _versions(home) if current is None or version < current]
        if not older:
            raise BundleError(f"there is no older version of {name} to go back to")
        target = home / str(older[-1])
        load_bundle(target)
        _point_to(home, older[-1])
        return target


def _is_settled(home: Path, current: int, body: bytes, manifest: Manifest) -> bool:
    """True if exactly this bundle is current and whole; raises BundleRollbackError if it is not newer."""
    if manifest.version > current:
        return False
    if manifest.version < current:
        raise BundleRollbackError(
            f"{manifest.name} {manifest.version} is older than the installed version {current}"
        )
    try:
        present, _ = read_manifest_bytes(home / str(current), None)
        is_same = present == body
        load_bundle(home / str(current))
    except BundleDamagedError:
        return False  # a damaged copy of the version: take the good one
    if not is_same:
        raise BundleRollbackError(f"another bundle of {manifest.name} {manifest.version} is installed")
    return True


def _home(store: Path, name: str) -> Path:
    if not SAFE_NAME.match(name):
        raise BundleError(f"{name[:40]!r} can't name a bundle")
    return store / name


def _current_version(home: Path) -> int | None:
    try:
        text = (home / _CURRENT_NAME).read_text("ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    if not _VERSION_FOLDER.match(text) or not (home / text / MANIFEST_NAME).is_file():
        return None
    return int(text)


def _versions(home: Path) -> list[int]:
    if not home.is_dir():
        return []
    return sorted(
        int(path.name) for path in home.iterdir() if _VERSION_FOLDER.match(path.name) and path.is_dir()
    )


def _copy_bundle(source: Path, target: Path, body: bytes, manifest: Manifest) -> None:
    """Write the whole bundle below `target` and onto the disk."""
    target.mkdir()
    for file in manifest.files:
        path = target / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        with open_plain(source, file.path) as reader, path.open("xb") as writer:
            copy_checked(reader, file, writer)
            _flush(writer)
    if (source / SIGNATURE_NAME).exists():
        with open_plain(source, SIGNATURE_NAME) as reader:
            _write(target / SIGNATURE_NAME, reader.read(MAX_SIGNATURE_BYTES))
    _write(target / MANIFEST_NAME, body)
    for folder, _, _ in os.walk(target):
        _flush_folder(Path(folder))


def _replace_folder(incoming: Path, target: Path) -> None:
    """Rename into place; a damaged folder of the same version is moved out of the way first."""
    if target.exists():
        doomed = target.with_name(f"{_INCOMING_PREFIX}{secrets.token_hex(8)}")
        os.replace(target, doomed)
        os.replace(incoming, target)
        shutil.rmtree(doomed, ignore_errors=True)
    else:
        os.replace(incoming, target)
    _flush_folder(target.parent)


def _point_to(home: Path, version: int) -> None:
    """Switch `current`; a reader sees the old version or the new one."""
    fresh = home / f"{_INCOMING_PREFIX}{secrets.token_hex(8)}"
    try:
        _write(fresh, f"{version}\n".encode())
        os.replace(fresh, home / _CURRENT_NAME)
    finally:
        fresh.unlink(missing_ok=True)
    _flush_folder(home)


def _drop_oldest(home: Path, keep: set[int | None]) -> None:
    """Keep the current version and the one before it; what an interrupted install left goes too."""
    versions = _versions(home)
    spare = NUM_KEPT_VERSIONS - sum(version in keep for version in versions)
    others = [version for version in reversed(versions) if version not in keep]
    for version in others[max(spare, 0) :]:
        shutil.rmtree(home / str(version), ignore_errors=True)


def _write(path: Path, data: bytes) -> None:
    with path.open("xb") as stream:
        stream.write(data)
        _flush(stream)


def _flush(stream: BinaryIO) -> None:
    stream.flush()
    os.fsync(stream.fileno())


def _flush_folder(folder: Path) -> None:
    """Make renames in `folder` last; not every system lets a folder be opened."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _writing(store: Path, name: str) -> Iterator[Path]:
    """The folder of `name`, for one writer at a time; leftovers of a broken install are cleared first."""
    home = _home(store, name)
    try:
        home.mkdir(parents=True, exist_ok=True)
        with (home / _LOCK_NAME).open("ab") as lock:
            _lock(lock)
            for leftover in home.glob(f"{_INCOMING_PREFIX}*"):
                shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink()
            yield home
    except OSError as error:
        raise BundleError(f"the store {store} can't be written: {error.strerror or error}") from None


def _lock(lock: BinaryIO) -> None:
    """Wait, with a bound, until no other process writes to the store; the lock ends with the file."""
    try:
        import fcntl
    except ImportError:  # no such lock on this system: installs there are the caller's to put in order
        return
    deadline_s = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES) or time.monotonic() >= deadline_s:
                raise
        time.sleep(0.05)
