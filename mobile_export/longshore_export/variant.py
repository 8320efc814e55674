"""Makes one variant of a model: graph, file, parity with torch. Decides nothing about which one to ship."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longshore.errors import ExportError
from longshore_export.checkpoint import AnyCheckpoint, Checkpoint, Graph, TracedCheckpoint, image_token_id
from longshore_export.graph import Rounding, build_graph, required_operators, round_plainly
from longshore_export.graph_derive import share_constants
from longshore_export.quantize_emulate import emulate
from longshore_export.quantize_recipe import FP32, RECIPES, Precision, Recipe
from longshore_export.traced import trace
from longshore_export.traced_quantize import emulate_traced, with_operators
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
    graph: Graph = "built"

    @property
    def size_bytes(self) -> int:
        files = [self.file, *([self.prefill_file] if self.prefill_file else [])]
        return sum(file.stat().st_size for file in files)


def find_recipe(name: str | Recipe) -> Recipe:
    """The recipe of a variant, which may be one already; ExportError naming those there are."""
    if isinstance(name, Recipe):
        return name
    if name not in RECIPES:
        raise ExportError(f"there is no variant {name!r}; there are {', '.join(RECIPES)}")
    return RECIPES[name]


def build_variant(
    checkpoint: AnyCheckpoint, variant: str | Recipe, file: Path, rounding: Rounding = round_plainly
) -> BuiltVariant:
    """Write the graph of a variant, by name or recipe, to `file`.

    A graph for prompts, where the variant has one, is written beside it and reads its weights from `file`.
    Raises ParityError where a graph doesn't compute what it should.
    """
    recipe = find_recipe(variant)
    if isinstance(checkpoint, TracedCheckpoint):
        return _traced_variant(checkpoint, recipe, file, rounding)
    model = _graph(checkpoint, recipe, rounding)
    body = model.SerializeToString(deterministic=True)
    file.write_bytes(body)
    if recipe is FP32:
        parity = check_parity(file, checkpoint)
    else:
        parity = check_rounded_parity(file, checkpoint, emulate(checkpoint.model, recipe, rounding))
    if not recipe.has_prefill:
        return BuiltVariant(recipe.name, recipe.precision, file, required_operators(model), parity)
    prefill = _graph(checkpoint, recipe.prefill(), rounding)
    share_constants(prefill, file.name, body)
    prefill_file = file.with_name(f"{file.stem}.prefill.onnx")
    prefill_file.write_bytes(prefill.SerializeToString(deterministic=True))
    emulated = emulate(checkpoint.model, recipe.prefill(), rounding)
    check_rounded_parity(prefill_file, checkpoint, emulated)
    operators = sorted({*required_operators(model), *required_operators(prefill)})
    return BuiltVariant(recipe.name, recipe.precision, file, tuple(operators), parity, prefill_file)


def _traced_variant(
    checkpoint: TracedCheckpoint, recipe: Recipe, file: Path, rounding: Rounding
) -> BuiltVariant:
    if recipe.has_prefill:
        raise ExportError(f"{recipe.name} has a graph for prompts, which is made for built graphs alone")
    plain = recipe is FP32
    model = checkpoint.model if plain else with_operators(checkpoint.model, recipe, rounding)
    graph = trace(model, checkpoint.shape)
    file.write_bytes(graph.SerializeToString(deterministic=True))
    if plain:
        parity = check_parity(file, checkpoint)
    else:
        parity = check_rounded_parity(file, checkpoint, emulate_traced(checkpoint.model, recipe, rounding))
    return BuiltVariant(
        recipe.name, recipe.precision, file, required_operators(graph), parity, graph="traced"
    )


def _graph(checkpoint: Checkpoint, recipe: Recipe, rounding: Rounding) -> Any:
    return build_graph(
        checkpoint.shape,
        checkpoint.weights,
        checkpoint.cos,
        checkpoint.sin,
        recipe,
        rounding,
        image_token_id(checkpoint),
    )
