"""The variants of a model by name: which part of it has which number format.

Parts are `embedding`, `head` and `layerN.qkv|o|gate_up|down`. Rounds nothing itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from longshore_export.quantize import BlockFormat, RowFormat, WeightFormat

Precision = Literal["fp32", "int8", "int4"]
BYTE_BLOCK = 32  # of embeddings in the int8 variant, and of 8-bit parts of mixed ones


@dataclass(frozen=True, slots=True)
class Recipe:
    """Formats by part; `exceptions` go before the rest."""

    name: str
    precision: Precision
    linear: WeightFormat = None
    head: WeightFormat = None
    embedding: BlockFormat | None = None
    exceptions: Mapping[str, WeightFormat] = field(default_factory=dict)

    def format_of(self, part: str) -> WeightFormat:
        if part in self.exceptions:
            return self.exceptions[part]
        return self.head if part == "head" else self.linear


def _int4(block_size: int) -> Recipe:
    form = BlockFormat(4, block_size)
    return Recipe(f"int4-b{block_size}", "int4", form, form, BlockFormat(4, BYTE_BLOCK))


FP32 = Recipe("fp32", "fp32")
INT8 = Recipe("int8", "int8", RowFormat(), RowFormat(), BlockFormat(8, BYTE_BLOCK))
RECIPES = {recipe.name: recipe for recipe in (FP32, INT8, _int4(32), _int4(64), _int4(128))}
