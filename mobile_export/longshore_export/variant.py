"""Makes one variant of a model: graph, file, parity with torch. Decides nothing about which one to ship."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from longshore.errors import ExportError
from longshore_export.checkpoint import Checkpoint
from longshore_export.graph import Rounding, build_graph, required_operators, round_plainly
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


def find_recipe(name: str) -> Recipe:
    """The recipe of a variant; ExportError naming those there are."""
    if name not in RECIPES:
        raise ExportError(f"there is no variant {name!r}; there are {', '.join(RECIPES)}")
    return RECIPES[name]


def build_variant(
    checkpoint: Checkpoint, name: str, file: Path, rounding: Rounding = round_plainly
) -> BuiltVariant:
    """Write the graph of variant `name` to `file`; ParityError where it doesn't compute what it should."""
    recipe = find_recipe(name)
    model = build_graph(
        checkpoint.shape, checkpoint.weights, checkpoint.cos, checkpoint.sin, recipe, rounding
    )
    file.write_bytes(model.SerializeToString(deterministic=True))
    if recipe is FP32:
        parity = check_parity(file, checkpoint)
    else:
        parity = check_rounded_parity(file, checkpoint, emulate(checkpoint.model, recipe, rounding))
    return BuiltVariant(name, recipe.precision, file, required_operators(model), parity)
