"""Model bundles on disk: checked file by file, installed atomically, rolled back, never run.

A store holds at most two versions of each name, `STORE/NAME/VERSION/`, and `STORE/NAME/current` names the one
in use. Whatever happens in the middle, `current` names a whole version. Standard library alone; a bundle's
files are read as bytes and nothing else.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from longshore.errors import BundleDamagedError, BundleError, BundleIncompatibleError, BundleRollbackError
from longshore.wire import MANIFEST_NAME, SIGNATURE_NAME, BundleFile, Manifest, load_manifest
from longshore.wire.limits import MAX_BUNDLE_FILES, MAX_MANIFEST_BYTES

__all__ = [
    "InstalledBundle",
    "check_runtime",
    "install",
    "installed",
    "list_installed",
    "load_bundle",
    "model_digest",
    "read_manifest",
    "rollback",
]

NUM_KEPT_VERSIONS = 2
LOCK_WAIT_S = 30.0
_CURRENT_NAME = "current"
_LOCK_NAME = ".lock"
_INCOMING_PREFIX = ".incoming-"
_BUFFER_BYTES = 1024 * 1024
_MAX_SIGNATURE_BYTES = 1024
_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,99}\Z")
_VERSION_FOLDER = re.compile(r"[1-9][0-9]{0,15}\Z")


class VerifyingKey(Protocol):
    """What a trusted key can do; `longshore.signing.PublicKey` is one."""

    def verifies(self, signature: bytes, payload: bytes) -> bool: ...


TrustedKeys = Mapping[str, VerifyingKey]


@dataclass(frozen=True, slots=True)
class InstalledBundle:
    """One version in a store; `path` is its folder."""

    path: Path
    manifest: Manifest
    is_current: bool


def model_digest(model_dir: Path | str) -> str:
    """The name of a Hugging Face folder's weights: 32 hex digits over its safetensors files.

    The same folder gives the same digest on every tier, so that an answer is continued token by token only
    where the same weights are. Raises BundleError where there are none.
    """
    files = sorted(Path(model_dir).glob("*.safetensors"))
    if not files:
        raise BundleError(f"there is no safetensors file in {model_dir}")
    whole = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        whole.update(f"{digest}  {file.name}\n".encode())
    return whole.hexdigest()[:32]


# -- checking ----------------------------------------------------------------------------------


def read_manifest(bundle_dir: Path | str, *, trusted_keys: TrustedKeys | None = None) -> Manifest:
    """The manifest of a bundle folder, its files not looked at; BundleDamagedError if it can't be used."""
    return _read_manifest(Path(bundle_dir), trusted_keys)[1]


def load_bundle(bundle_dir: Path | str, *, trusted_keys: TrustedKeys | None = None) -> Manifest:
    """The manifest of a bundle folder, every file of which is exactly what the manifest says.

    With `trusted_keys` (key id to key) the manifest must be signed by one of them and not have expired.
    Raises BundleDamagedError for a file that is missing, extra, damaged, or a link; BundleError for the
    signature.
    """
    folder = Path(bundle_dir)
    _, manifest = _read_manifest(folder, trusted_keys)
    _refuse_extra_entries(folder, manifest)
    for file in manifest.files:
        with _open_plain(folder, file.path) as source:
            _copy_checked(source, file, None)
    return manifest


def check_runtime(manifest: Manifest, onnxruntime_version: str) -> None:
    """BundleIncompatibleError if the bundle needs a newer ONNX Runtime than this one."""
    if _numbers(onnxruntime_version) < _numbers(manifest.min_onnxruntime):
        raise BundleIncompatibleError(
            f"bundle {manifest.name} needs onnxruntime {manifest.min_onnxruntime}, not {onnxruntime_version}"
        )


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)[:3]]


def _read_manifest(folder: Path, trusted_keys: TrustedKeys | None) -> tuple[bytes, Manifest]:
    if not folder.is_dir():
        raise BundleDamagedError(f"there is no bundle at {folder}")
    with _open_plain(folder, MANIFEST_NAME) as stream:
        body = stream.read(MAX_MANIFEST_BYTES + 1)
    manifest = load_manifest(body)
    if not _SAFE_NAME.match(manifest.name) or manifest.name.endswith("."):
        raise BundleDamagedError(f"the manifest's name {manifest.name[:40]!r} can't name a folder")
    if trusted_keys is not None:
        _check_signature(folder, body, manifest, trusted_keys)
    return body, manifest


def _check_signature(folder: Path, body: bytes, manifest: Manifest, trusted_keys: TrustedKeys) -> None:
    key = trusted_keys.get(manifest.key_id or "")
    if key is None:
        raise BundleError(f"bundle {manifest.name} is not signed by a trusted key")
    with _open_plain(folder, SIGNATURE_NAME) as stream:
        text = stream.read(_MAX_SIGNATURE_BYTES)
    if not key.verifies(_decode_base64url(text.strip()), body):
        raise BundleError(f"bundle {manifest.name}: the signature does not fit the manifest")
    if manifest.expires_at is not None and time.time() >= manifest.expires_at:
        raise BundleError(f"bundle {manifest.name} has expired")


def _decode_base64url(text: bytes) -> bytes:
    """The bytes of unpadded base64url; nothing for anything else, which verifies as no signature does."""
    try:
        return base64.b64decode(text + b"=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except binascii.Error:
        return b""


def _refuse_extra_entries(folder: Path, manifest: Manifest) -> None:
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


def _open_plain(folder: Path, path: str) -> BinaryIO:
    """Open a plain file below `folder`; no link on the way below it is followed."""
    whole = folder
    for part in path.split("/")[:-1]:
        whole = whole / part
        if whole.is_symlink():
            raise BundleDamagedError(f"{path} lies behind a symbolic link")
    flags = (
        os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    )
    target = folder / path
    try:
        if target.is_symlink():
            raise BundleDamagedError(f"{path} is a symbolic link")
        stream = os.fdopen(os.open(target, flags), "rb")
    except FileNotFoundError:
        raise BundleDamagedError(f"{path} is missing") from None
    except OSError as error:
        raise BundleDamagedError(f"{path} can't be read: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
        stream.close()
        raise BundleDamagedError(f"{path} is not a plain file")
    return stream


def _copy_checked(source: BinaryIO, file: BundleFile, target: BinaryIO | None) -> None:
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


# -- the store ---------------------------------------------------------------------------------


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
    body, manifest = _read_manifest(source, trusted_keys)
    _refuse_extra_entries(source, manifest)
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
        if not home.is_dir() or home.is_symlink() or not _SAFE_NAME.match(home.name):
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
        present, _ = _read_manifest(home / str(current), None)
        is_same = present == body
        load_bundle(home / str(current))
    except BundleDamagedError:
        return False  # a damaged copy of the version: take the good one
    if not is_same:
        raise BundleRollbackError(f"another bundle of {manifest.name} {manifest.version} is installed")
    return True


def _home(store: Path, name: str) -> Path:
    if not _SAFE_NAME.match(name):
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
        with _open_plain(source, file.path) as reader, path.open("xb") as writer:
            _copy_checked(reader, file, writer)
            _flush(writer)
    if (source / SIGNATURE_NAME).exists():
        with _open_plain(source, SIGNATURE_NAME) as reader:
            _write(target / SIGNATURE_NAME, reader.read(_MAX_SIGNATURE_BYTES))
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
