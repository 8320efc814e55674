"""Looks at a model folder without loading it: is everything there, and which weights are they.

Reads names, sizes and small files; weights are only hashed. It never needs torch.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import BinaryIO

from longshore.errors import ConfigError
from longshore_server.config import CoreConfig

_WHOLE_FILE_BYTES = 256 * 1024 * 1024
_SAMPLE_BYTES = 1024 * 1024
_NUM_SAMPLES = 64


def check_model_folder(config: CoreConfig) -> None:
    """Raises ConfigError, in one line, where a start with these settings can't succeed."""
    if not config.model:
        raise ConfigError("model: no model is given; use --model PATH")
    folder = Path(config.model)
    if not folder.exists():
        raise ConfigError(f"model: {folder} does not exist")
    if not folder.is_dir():
        raise ConfigError(f"model: {folder} is not a folder")
    _check_json(folder / "config.json")
    if config.load_format == "auto":
        _check_weights(folder)
    _check_json(config.tokenizer_dir / "tokenizer.json")


def model_digest(config: CoreConfig) -> str:
    """64 hexadecimal digits that name the weights and the tokenizer; equal folders give equal digests.

    Files up to 256 MiB are hashed whole; of larger ones the size, the safetensors header and 64 evenly spread
    samples of 1 MiB, so that a start never waits for a terabyte to be read.
    """
    folder = Path(config.model)
    digest = hashlib.sha256()
    digest.update((folder / "config.json").read_bytes())
    digest.update((config.tokenizer_dir / "tokenizer.json").read_bytes())
    if config.load_format == "random":
        digest.update(f"random weights of seed {config.seed}".encode())
        return digest.hexdigest()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(f"{path.name} {path.stat().st_size}".encode())
        _hash_weights(digest, path)
    return digest.hexdigest()


def _check_json(path: Path) -> None:
    if not path.is_file():
        raise ConfigError(f"model: {path.parent} has no {path.name}")
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"model: can't read {path}: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"model: {path} is not a JSON object")


def _check_weights(folder: Path) -> None:
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(
            f"model: {folder} has no .safetensors weights; --load-format random starts without any"
        )


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
    return length_bytes + file.read(min(int.from_bytes(length_bytes, "little"), 100 * _SAMPLE_BYTES))
