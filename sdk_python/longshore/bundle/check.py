"""Checks a bundle folder: manifest, signature, and every file byte by byte. Writes and runs nothing."""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
import stat
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, Protocol

from longshore.errors import BundleDamagedError, BundleError, BundleIncompatibleError
from longshore.wire import MANIFEST_NAME, SIGNATURE_NAME, BundleFile, Manifest, load_manifest
from longshore.wire.limits import MAX_BUNDLE_FILES, MAX_MANIFEST_BYTES

MAX_SIGNATURE_BYTES = 1024
SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,99}\Z")
_BUFFER_BYTES = 1024 * 1024


class VerifyingKey(Protocol):
    """What a trusted key can do; `longshore.signing.PublicKey` is one."""

    def verifies(self, signature: bytes, payload: bytes) -> bool: ...


TrustedKeys = Mapping[str, VerifyingKey]


def read_manifest(bundle_dir: Path | str, *, trusted_keys: TrustedKeys | None = None) -> Manifest:
    """The manifest of a bundle folder, its files not looked at; BundleDamagedError if it can't be used."""
    return read_manifest_bytes(Path(bundle_dir), trusted_keys)[1]


def load_bundle(bundle_dir: Path | str, *, trusted_keys: TrustedKeys | None = None) -> Manifest:
    """The manifest of a bundle folder, every file of which is exactly what the manifest says.

    With `trusted_keys` (key id to key) the manifest must be signed by one of them and not have expired.
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
    return [int(part) for part in re.findall(r"\d+", version)[:3]]


def read_manifest_bytes(folder: Path, trusted_keys: TrustedKeys | None) -> tuple[bytes, Manifest]:
    if not folder.is_dir():
        raise BundleDamagedError(f"there is no bundle at {folder}")
    with open_plain(folder, MANIFEST_NAME) as stream:
        body = stream.read(MAX_MANIFEST_BYTES + 1)
    manifest = load_manifest(body)
    if not SAFE_NAME.match(manifest.name) or manifest.name.endswith("."):
        raise BundleDamagedError(f"the manifest's name {manifest.name[:40]!r} can't name a folder")
    if trusted_keys is not None:
        _check_signature(folder, body, manifest, trusted_keys)
    return body, manifest


def _check_signature(folder: Path, body: bytes, manifest: Manifest, trusted_keys: TrustedKeys) -> None:
    key = trusted_keys.get(manifest.key_id or "")
    if key is None:
        raise BundleError(f"bundle {manifest.name} is not signed by a trusted key")
    with open_plain(folder, SIGNATURE_NAME) as stream:
        text = stream.read(MAX_SIGNATURE_BYTES)
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


def open_plain(folder: Path, path: str) -> BinaryIO:
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
