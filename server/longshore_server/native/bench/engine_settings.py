"""From the command's flags and rows to an EngineConfig that is large enough for the rows. Loads no torch."""

from __future__ import annotations

import argparse
import ast
import dataclasses
from collections.abc import Sequence
from typing import Any

from longshore_server.native.bench.rows import Mixed, Poisson, Row
from longshore_server.native.config import EngineConfig
from longshore_server.native.errors import ConfigError

# Passed on where they are given; an engine without such a setting refuses it by name.
ENGINE_FLAGS: dict[str, tuple[type, str]] = {
    "dtype": (str, "auto, float32, bfloat16 or float16"),
    "quantization": (str, "form of the weights, fp8 for example"),
    "kv_cache_dtype": (str, "form of the KV cache, fp8 for example"),
    "tensor_parallel_size": (int, "GPUs that share the model"),
    "gpu_memory_fraction": (float, "share of the GPU's memory that the engine may take"),
    "max_num_batched_tokens": (int, "tokens in one step"),
    "itl_target_ms": (float, "milliseconds between two tokens that other prompts may not stretch"),
    "max_num_seqs": (int, "requests that run at once; what the rows need by default"),
    "max_model_len": (int, "longest prompt and answer; what the rows need by default"),
    "num_kv_blocks": (int, "KV blocks; what the rows need by default"),
    "seed": (int, "of random weights, prompts and arrivals"),
}
MAX_WAITING = 100_000
_WARM_TOKENS = 256  # a short first request fits whatever the rows need
_LEN_STEP = 64
_FIELDS = {field.name: field for field in dataclasses.fields(EngineConfig)}


def engine_config(arguments: argparse.Namespace, rows: Sequence[Row], load_format: str) -> EngineConfig:
    """Raises ConfigError naming the flag that is wrong or that this engine does not have."""
    given = {name: getattr(arguments, name) for name in ENGINE_FLAGS if getattr(arguments, name) is not None}
    given |= dict(_pair(text) for text in arguments.set)
    unknown = given.keys() - _FIELDS.keys()
    if unknown:
        raise ConfigError(sorted(unknown)[0], "is no setting of this engine")
    settings = {"model": arguments.model, "device": arguments.device, "load_format": load_format}
    settings |= {"max_num_waiting": MAX_WAITING} | given
    settings.setdefault("max_num_seqs", max(row.max_seqs for row in rows))
    settings.setdefault(
        "max_model_len", _round_up(max(_WARM_TOKENS, *(row.max_tokens for row in rows)), _LEN_STEP)
    )
    _default_batch(settings)
    _default_kv(settings, rows)
    return EngineConfig(**settings)


def _default_batch(settings: dict[str, Any]) -> None:
    """A step holds one token of each sequence at least."""
    default = _FIELDS["max_num_batched_tokens"].default
    if isinstance(default, int):
        settings.setdefault("max_num_batched_tokens", max(default, settings["max_num_seqs"]))


def _default_kv(settings: dict[str, Any], rows: Sequence[Row]) -> None:
    """Blocks for the hungriest row; an engine that sizes its cache by the GPU's memory is left to it."""
    sizes_itself = settings["device"] != "cpu" and "gpu_memory_fraction" in _FIELDS
    if sizes_itself or {"num_kv_blocks", "kv_memory_bytes"} & settings.keys():
        return
    block_size = settings.get("block_size", _FIELDS["block_size"].default)
    num_seqs = settings["max_num_seqs"]
    num_tokens = max(min(num_seqs, row.max_seqs) * (_mean_tokens(row) + 2 * block_size) for row in rows)
    num_blocks = -(-max(num_tokens, settings["max_model_len"]) // block_size)
    settings["num_kv_blocks"] = num_blocks + num_seqs


def _mean_tokens(row: Row) -> int:
    """What a sequence holds at its end, on average: not all are at their longest at once."""
    return row.low + row.high if isinstance(row, Mixed) else row.max_tokens


def _pair(text: str) -> tuple[str, Any]:
    """A number, true, false, none, a list or a word."""
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise ConfigError("set", f"takes NAME=VALUE, not {text!r}")
    try:
        return name, ast.literal_eval(value.title() if value in ("true", "false", "none") else value)
    except (ValueError, SyntaxError):
        return name, value


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step


def draws_arrivals(rows: Sequence[Row]) -> bool:
    return any(isinstance(row, Poisson) for row in rows)
