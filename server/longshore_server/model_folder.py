"""Looks at a model folder without loading it: is everything there, and which weights are they.

Reads names, sizes and small files; weights are only hashed. It never needs torch.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from longshore import bundle
from longshore.errors import ConfigError
from longshore_server.config import CoreConfig
from longshore_server.image_sizes import ImageSizes


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
    ImageSizes.load(folder)


def model_digest(config: CoreConfig) -> str:
    """64 hexadecimal digits that name weights and tokenizer, as a bundle of the same folder has them.

    Quantized at load, the same folder is another model: its answers must not continue the other's.
    """
    digest = _folder_digest(config)
    if config.quantization == "none":
        return digest
    return hashlib.sha256(f"{digest} {config.quantization}".encode()).hexdigest()


def _folder_digest(config: CoreConfig) -> str:
    if config.load_format != "random":
        return bundle.model_digest(config.model, config.tokenizer_dir)
    digest = hashlib.sha256()
    digest.update((Path(config.model) / "config.json").read_bytes())
    digest.update((config.tokenizer_dir / "tokenizer.json").read_bytes())
    digest.update(f"random weights of seed {config.seed}".encode())
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
