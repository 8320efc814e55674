"""The name of a model's weights, the same on every tier. Reads files as bytes and needs no torch."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import BinaryIO

from longshore.errors import BundleError

_WHOLE_FILE_BYTES = 256 * 1024 * 1024
_SAMPLE_BYTES = 1024 * 1024
_NUM_SAMPLES = 64
_MAX_HEADER_BYTES = 100 * _SAMPLE_BYTES


def model_digest(model_dir: Path | str, tokenizer_dir: Path | str | None = None) -> str:
    """64 hexadecimal digits over a Hugging Face folder's configuration, tokenizer and safetensors weights.

    Equal folders give equal digests, so that an answer is continued token by token only where tokens and
    weights are the same. Files up to 256 MiB are hashed whole; of larger ones the size, the header and 64
    evenly spread samples of 1 MiB, so that a start never waits for a terabyte to be read. Raises BundleError
    where a file is missing.
    """
    folder = Path(model_dir)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise BundleError(f"there is no safetensors file in {folder}")
    digest = hashlib.sha256()
    try:
        digest.update((folder / "config.json").read_bytes())
        digest.update((Path(tokenizer_dir or folder) / "tokenizer.json").read_bytes())
        for path in weights:
            digest.update(f"{path.name} {path.stat().st_size}".encode())
            _hash_weights(digest, path)
    except OSError as error:
        raise BundleError(f"{error.filename} can't be read: {error.strerror}") from None
    return digest.hexdigest()


def _hash_weights(digest: hashlib._Hash, path: Path) -> None:
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        if size_bytes <= _WHOLE_FILE_BYTES:
            while chunk := file.read(_SAMPLE_BYTES):
                digest.update(chunk)
            return
        digest.update(_header(file))
        for index in range(_NUM_SAMPLES):
            file.seek((size_bytes - _SAMPLE_BYTES) * index // (_NUM_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))


def _header(file: BinaryIO) -> bytes:
    """The safetensors header, which names every tensor, its type and its shape."""
    length_bytes = file.read(8)
    return length_bytes + file.read(min(int.from_bytes(length_bytes, "little"), _MAX_HEADER_BYTES))
