"""The variants of a model by name: which part of it has which number format.

Parts are `embedding`, `head` and `layerN.qkv|o|gate|up|down`. Rounds nothing itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from longshore_export.quantize import BlockFormat, DerivedFormat, RowFormat, WeightFormat

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
    has_prefill: bool = False  # a graph of its own reads prompts

    def format_of(self, part: str) -> WeightFormat:
        if part in self.exceptions:
            return self.exceptions[part]
        return self.head if part == "head" else self.linear

    def prefill(self) -> Recipe:
        """The recipe of a graph for prompts: layers in int8, made at load from this recipe's codes.

        int8 reads a prompt faster than int4 does and writes slower; from the same codes, it costs no bytes.
        """
        assert isinstance(self.linear, BlockFormat)
        return replace(self, name=f"{self.name}-prefill", linear=DerivedFormat(self.linear))


def _int4(block_size: int, has_prefill: bool = False) -> Recipe:
    form = BlockFormat(4, block_size)
    name = f"int4-b{block_size}" + "-p8" * has_prefill
    return Recipe(name, "int4", form, form, BlockFormat(4, BYTE_BLOCK), has_prefill=has_prefill)


def _mixed(block_size: int) -> Recipe:
    """What stands at the ends of the model in 8 bits, the rest in 4."""
    ends = BlockFormat(8, BYTE_BLOCK)
    return Recipe(f"mixed-b{block_size}", "int4", BlockFormat(4, block_size), ends, ends)


FP32 = Recipe("fp32", "fp32")
INT8 = Recipe("int8", "int8", RowFormat(), RowFormat(), BlockFormat(8, BYTE_BLOCK))
_INT4 = tuple(_int4(size, has_prefill) for has_prefill in (False, True) for size in (32, 64, 128, 256))
RECIPES = {recipe.name: recipe for recipe in (FP32, INT8, *_INT4, _mixed(64))}
