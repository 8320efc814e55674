"""Scales of a KV cache in FP8: measured on prompts, kept in a file beside the model, one for each KV head.

FP8 (e4m3) is a floating-point type, so a scale decides what is cut off and what underflows, and hardly how
exactly the rest is kept; a short calibration is enough, and a margin over what it saw costs nothing.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from longshore_server.native.attention.interface import CONTEXT_KEYWORD
from longshore_server.native.attention.kv_cache import FP8_MAX, KVScales
from longshore_server.native.checks import check_float
from longshore_server.native.errors import ModelLoadError

FILE_NAME = "kv_scales.json"
FORMAT = 1
MARGIN = 2.0  # over the largest magnitude that was seen
MIN_AMAX = 1e-6
MAX_SCALE = 1e6
NUM_PROMPTS = 2
PROMPT_TOKENS = 256


class AmaxContext:
    """Attends one prompt over itself, and notes each head's largest key and value."""

    def __init__(self) -> None:
        self.keys: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}

    def check_arguments(self, arguments: dict[str, Any], attention_mask: torch.Tensor | None) -> None:
        """Nothing to check: the probe has seen this model's arguments."""

    def attend(
        self,
        layer_index: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        for seen, rows in ((self.keys, key), (self.values, value)):
            amax = rows.abs().amax(dim=(0, 2)).float()
            seen[layer_index] = torch.maximum(seen.get(layer_index, amax), amax)
        num_rows = query.shape[0]
        visible = torch.ones(num_rows, num_rows, dtype=torch.bool, device=query.device).tril()
        if window is not None:
            visible = visible.triu(1 - window)
        heads = (each.transpose(0, 1)[None] for each in (query, key, value))
        is_grouped = query.shape[1] != key.shape[1]
        output = scaled_dot_product_attention(*heads, attn_mask=visible, scale=scale, enable_gqa=is_grouped)
        return output[0].transpose(0, 1)


@torch.inference_mode()
def measure_scales(
    model: torch.nn.Module, device: torch.device, prompts: Sequence[Sequence[int]]
) -> list[KVScales]:
    """By layer, from one forward pass for each prompt; ranks call it at the same time, each for its heads."""
    context = AmaxContext()
    for prompt in prompts:
        tokens = torch.tensor([prompt], dtype=torch.long, device=device)
        positions = torch.arange(len(prompt), device=device)[None]
        model(
            input_ids=tokens,
            position_ids=positions,
            use_cache=False,
            logits_to_keep=1,
            **{CONTEXT_KEYWORD: context},
        )
    return [
        KVScales(_scale(context.keys[layer]), _scale(context.values[layer])) for layer in sorted(context.keys)
    ]


def _scale(amax: torch.Tensor) -> torch.Tensor:
    finite = amax.nan_to_num(MIN_AMAX, FP8_MAX, FP8_MAX)
    return (MARGIN / FP8_MAX * finite).clamp_(MARGIN / FP8_MAX * MIN_AMAX, MAX_SCALE)


def random_prompts(vocab_size: int, max_tokens: int, seed: int) -> list[list[int]]:
    """What scales are measured on where nobody gave anything better."""
    chosen = random.Random(seed)
    num_tokens = min(PROMPT_TOKENS, max_tokens)
    return [[chosen.randrange(vocab_size) for _ in range(num_tokens)] for _ in range(NUM_PROMPTS)]


# --- the file ---


def save_scales(folder: Path, scales: Sequence[KVScales]) -> Path:
    """Writes FILE_NAME into a model folder and returns its path."""
    layers = [{"key": each.key.tolist(), "value": each.value.tolist()} for each in scales]
    path = folder / FILE_NAME
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps({"format": FORMAT, "layers": layers}) + "\n")
    partial.replace(path)
    return path


def load_scales(
    folder: Path, num_heads: Sequence[int], device: torch.device, *, rank: int = 0, num_ranks: int = 1
) -> list[KVScales] | None:
    """This rank's part of the folder's file, `num_heads` KV heads in each layer; None where there is no file.

    Raises ModelLoadError for a file that is not one, or is another model's.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        return None
    try:
        layers = _checked(json.loads(path.read_bytes()), len(num_heads))
        return [
            KVScales(*(_part(layer[name], count, device, rank, num_ranks) for name in ("key", "value")))
            for layer, count in zip(layers, num_heads, strict=True)
        ]
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise ModelLoadError(f"{path} does not hold this model's scales: {error}") from error


def _checked(content: Any, num_layers: int) -> list[dict[str, list[float]]]:
    if content["format"] != FORMAT or len(content["layers"]) != num_layers:
        raise ValueError(f"format {FORMAT} and {num_layers} layers are wanted")
    for layer in content["layers"]:
        for scale in (*layer["key"], *layer["value"]):
            check_float(
                lambda _, words: ValueError(f"a scale {words}"), "", scale, 0.0, MAX_SCALE, open_low=True
            )
    return content["layers"]  # type: ignore[no-any-return]


def _part(
    scales: list[float], num_heads: int, device: torch.device, rank: int, num_ranks: int
) -> torch.Tensor:
    """The heads of one rank, as its slice of the key and value projections has them."""
    total = len(scales)
    if num_heads * num_ranks != max(total, num_ranks):  # fewer heads than ranks: each stands on several
        raise ValueError(f"{total} heads do not give {num_heads} to each of {num_ranks} ranks")
    start = rank * total // num_ranks
    return torch.tensor(scales[start : start + num_heads], dtype=torch.float32, device=device)
