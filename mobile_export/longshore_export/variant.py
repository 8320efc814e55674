"""Makes one variant of a model: graph, file, parity with torch. Decides nothing about which one to ship."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longshore.errors import ExportError
from longshore_export.checkpoint import Checkpoint
from longshore_export.graph import Rounding, build_graph, required_operators, round_plainly
from longshore_export.graph_derive import share_constants
from longshore_export.quantize_emulate import emulate
from longshore_export.quantize_recipe import FP32, RECIPES, Precision, Recipe
from longshore_export.verify import Parity, check_parity, check_rounded_parity


@dataclass(frozen=True, slots=True)
class BuiltVariant:
    """A graph that was written and compared with torch."""

    name: str
    precision: Precision
    file: Path
    required_operators: tuple[str, ...]
    parity: Parity
    prefill_file: Path | None = None

    @property
    def size_bytes(self) -> int:
        files = [self.file, *([self.prefill_file] if self.prefill_file else [])]
        return sum(file.stat().st_size for file in files)


def find_recipe(name: str) -> Recipe:
    """The recipe of a variant; ExportError naming those there are."""
    if name not in RECIPES:
        raise ExportError(f"there is no variant {name!r}; there are {', '.join(RECIPES)}")
    return RECIPES[name]


def build_variant(
    checkpoint: Checkpoint, name: str, file: Path, rounding: Rounding = round_plainly
) -> BuiltVariant:
    """Write the graph of variant `name` to `file`; ParityError where it doesn't compute what it should.

    A graph for prompts, where the variant has one, is written beside it and reads its weights from `file`.
    """
    recipe = find_recipe(name)
    model = _graph(checkpoint, recipe, rounding)
    body = model.SerializeToString(deterministic=True)
    file.write_bytes(body)
    if recipe is FP32:
        parity = check_parity(file, checkpoint)
    else:
        parity = check_rounded_parity(file, checkpoint, emulate(checkpoint.model, recipe, rounding))
    if not recipe.has_prefill:
        return BuiltVariant(name, recipe.precision, file, required_operators(model), parity)
    prefill = _graph(checkpoint, recipe.prefill(), rounding)
    share_constants(prefill, file.name, body)
    prefill_file = file.with_name(f"{file.stem}.prefill.onnx")
    prefill_file.write_bytes(prefill.SerializeToString(deterministic=True))
    emulated = emulate(checkpoint.model, recipe.prefill(), rounding)
    check_rounded_parity(prefill_file, checkpoint, emulated)
    operators = sorted({*required_operators(model), *required_operators(prefill)})
    return BuiltVariant(name, recipe.precision, file, tuple(operators), parity, prefill_file)


def _graph(checkpoint: Checkpoint, recipe: Recipe, rounding: Rounding) -> Any:
    return build_graph(checkpoint.shape, checkpoint.weights, checkpoint.cos, checkpoint.sin, recipe, rounding)
