"""Makes a bundle folder out of plain files and a description, and signs it. Knows nothing of models."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

from longshore.bundle.check import load_bundle, parse_manifest
from longshore.bundle.files import open_plain, replace_file
from longshore.bundle.keyfile import SigningKey
from longshore.errors import BundleDamagedError, ConfigError, LongshoreError
from longshore.signing import encode_base64url
from longshore.wire import (
    MANIFEST_NAME,
    SIGNATURE_NAME,
    BundleFile,
    Manifest,
    decode,
    dump_json,
    encode,
    load_json_object,
)
from longshore.wire.limits import MAX_BUNDLE_FILES, MAX_MANIFEST_BYTES

CHUNK_BYTES = 1024 * 1024
_READ_BYTES = 256 * 1024


def describe_file(folder: Path, path: str, chunk_bytes: int = CHUNK_BYTES) -> BundleFile:
    """A file's entry in the manifest: size, digest, and each chunk's digest; read once, never held whole."""
    with open_plain(folder, path) as stream:
        whole, chunks, size_bytes = hashlib.sha256(), [], 0
        while digest := _hash_chunk(stream, chunk_bytes, whole):
            chunks.append(digest[0])
            size_bytes += digest[1]
    return BundleFile(path, size_bytes, whole.hexdigest(), chunk_bytes, tuple(chunks))


def write_manifest(folder: Path, manifest: Manifest, key: SigningKey | None) -> Manifest:
    """Write it into the folder and sign it, then read the whole bundle back as a device would.

    Raises BundleDamagedError where the manifest and the files do not fit.
    """
    manifest = replace(manifest, key_id=key.key_id if key is not None else None)
    body = dump_json(encode(manifest))
    parse_manifest(body)
    (folder / SIGNATURE_NAME).unlink(missing_ok=True)  # a signature never stands beside other bytes
    replace_file(folder / MANIFEST_NAME, body)
    if key is None:
        return load_bundle(folder)
    replace_file(folder / SIGNATURE_NAME, encode_base64url(key.key.sign(body)).encode())
    return load_bundle(folder, trusted_keys={key.key_id: key.key.public_key})


def sign_bundle(
    folder: Path, key: SigningKey, *, key_chain: tuple[str, ...] = (), expires_at: int | None = None
) -> Manifest:
    """Sign a bundle folder anew, its files checked first; `expires_at` None keeps what it says already."""
    manifest = load_bundle(folder)
    until = manifest.expires_at if expires_at is None else expires_at
    return write_manifest(folder, replace(manifest, key_chain=key_chain, expires_at=until), key)


def make_bundle(
    source: Path,
    out_dir: Path,
    *,
    description: Path | None = None,
    changes: dict[str, Any] | None = None,
    key: SigningKey | None = None,
    key_chain: tuple[str, ...] = (),
) -> Manifest:
    """Copy the files of `source` into a new bundle folder `out_dir`.

    `description` is a manifest in JSON, its `files` and signature aside; the one in `source` unless it is
    given. `changes` replace fields of it. Raises ConfigError or BundleDamagedError; nothing is left then.
    """
    if out_dir.exists() or out_dir.is_symlink():
        raise ConfigError(f"{out_dir} is there already")
    paths = _plain_paths(source, description)
    fields = _read_description(description or source / MANIFEST_NAME) | (changes or {})
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out_dir.parent, prefix=".make-") as work:
        folder = Path(work) / "bundle"
        for path in paths:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            with open_plain(source, path) as reader, (folder / path).open("xb") as writer:
                shutil.copyfileobj(reader, writer)
        files = [encode(describe_file(folder, path)) for path in paths]
        try:
            manifest = decode(Manifest, fields | {"files": files, "key_chain": list(key_chain)})
        except LongshoreError as error:
            raise BundleDamagedError(f"the description does not fit: {error.message}") from None
        manifest = write_manifest(folder, manifest, key)
        folder.rename(out_dir)
    return manifest


def _hash_chunk(stream: BinaryIO, chunk_bytes: int, whole: hashlib._Hash) -> tuple[str, int] | None:
    """(digest, length) of the next chunk; None at the end."""
    digest, left = hashlib.sha256(), chunk_bytes
    while left and (piece := stream.read(min(left, _READ_BYTES))):
        digest.update(piece)
        whole.update(piece)
        left -= len(piece)
    return (digest.hexdigest(), chunk_bytes - left) if left < chunk_bytes else None


def _plain_paths(source: Path, description: Path | None) -> list[str]:
    if not source.is_dir():
        raise ConfigError(f"there is no folder {source}")
    aside = {source / MANIFEST_NAME, source / SIGNATURE_NAME, description}
    paths = [path.relative_to(source).as_posix() for path in _bounded(source.rglob("*")) if path not in aside]
    return sorted(path for path in paths if (source / path).is_symlink() or not (source / path).is_dir())


def _bounded(paths: Iterator[Path]) -> Iterator[Path]:
    for number, path in enumerate(paths):
        if number > 4 * MAX_BUNDLE_FILES:
            raise ConfigError("the folder holds far more files than a bundle may")
        yield path


def _read_description(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as stream:
            fields = load_json_object(stream.read(MAX_MANIFEST_BYTES + 1), max_bytes=MAX_MANIFEST_BYTES)
    except OSError as error:
        raise ConfigError(f"the description {path} can't be read: {error.strerror}") from None
    except LongshoreError as error:
        raise ConfigError(f"the description {path} can't be used: {error.message}") from None
    return {name: value for name, value in fields.items() if name != "key_id"}
