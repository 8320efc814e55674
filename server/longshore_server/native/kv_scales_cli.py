"""`python -m longshore_server.native.kv_scales_cli`: FP8 KV scales of a model, from prompts into its folder.

An engine with `kv_cache_dtype` "fp8" takes them from there; without the file it measures on random prompts.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from longshore_server.native.config import EngineConfig
from longshore_server.native.errors import ConfigError, NativeEngineError

MAX_PROMPTS = 1024


def main(argv: Sequence[str] | None = None) -> int:
    """2 after one line that says what is wrong."""
    parser = argparse.ArgumentParser(prog="kv_scales_cli", description="FP8 KV scales of a model.")
    parser.add_argument("--model", required=True, help="the model's folder, which gets the file")
    parser.add_argument("--prompts", type=Path, required=True, help="a JSON list of token ids on each line")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    parser.add_argument("--quantization", default="none", help="form of the weights, as they will be served")
    try:
        print(_calibrate(parser.parse_args(argv)))
    except NativeEngineError as error:
        print(f"kv_scales_cli: {error}", file=sys.stderr)
        return 2
    return 0


def _calibrate(arguments: argparse.Namespace) -> Path:
    import torch

    from longshore_server.native.attention.kv_scales import measure_scales, save_scales
    from longshore_server.native.model.load import load_model

    config = EngineConfig(model=arguments.model, device=arguments.device, quantization=arguments.quantization)
    loaded = load_model(config)
    prompts = _read_prompts(arguments.prompts, loaded.vocab_size, loaded.max_model_len)
    return save_scales(
        Path(arguments.model), measure_scales(loaded.model, torch.device(config.device), prompts)
    )


def _read_prompts(path: Path, vocab_size: int, max_tokens: int) -> list[list[int]]:
    """Raises ConfigError, naming the line, for what is no prompt of this model."""
    try:
        lines = [line for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("prompts", f"{path} cannot be read: {error}") from error
    if not 0 < len(lines) <= MAX_PROMPTS:
        raise ConfigError("prompts", f"{path} holds {len(lines)} prompts, 1 to {MAX_PROMPTS} are taken")
    return [_prompt(line, number, vocab_size, max_tokens) for number, line in enumerate(lines, start=1)]


def _prompt(line: str, number: int, vocab_size: int, max_tokens: int) -> list[int]:
    try:
        prompt = json.loads(line)
    except ValueError:
        prompt = None
    is_sound = isinstance(prompt, list) and 0 < len(prompt) <= max_tokens
    if not is_sound or not all(type(token) is int and 0 <= token < vocab_size for token in prompt):
        raise ConfigError("prompts", f"line {number} is no list of 1 to {max_tokens} ids below {vocab_size}")
    return prompt


if __name__ == "__main__":
    sys.exit(main())
