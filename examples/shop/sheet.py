"""Product sheets: the random items that every Shop question is about.

Owns the words, the sheet's text form and the train/held-out split. Uses the standard library alone and never
draws randomness of its own: the caller passes the generator.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from random import Random
from typing import Literal

Split = Literal["train", "heldout"]

NAMES: tuple[str, ...] = tuple(
    "lamp chair table basket kettle candle pillow blanket mirror clock vase bowl plate spoon knife bottle "
    "towel curtain carpet shelf drawer bucket broom ladder hammer saw drill rope tent backpack umbrella "
    "jacket scarf hat glove boot belt wallet watch ring necklace guitar drum flute piano ball racket kite "
    "puzzle doll robot train pencil eraser notebook ruler stapler camera radio speaker keyboard tripod "
    "teapot mug".split()
)
COLOURS: tuple[str, ...] = tuple(
    "red blue green yellow black white brown grey pink purple orange silver gold beige teal navy".split()
)
MIN_ITEMS, MAX_ITEMS = 1, 16
MIN_PRICE, MAX_PRICE = 2, 60
MIN_STOCK, MAX_STOCK = 1, 40
HELDOUT_ONE_IN = 16
"""One sheet in sixteen, chosen by its hash, is held out; no training sheet can repeat it."""


@dataclass(frozen=True, slots=True)
class Item:
    """One line of a sheet; `price` is in whole dollars."""

    name: str
    price: int
    colour: str
    stock: int

    @property
    def line(self) -> str:
        the = f"The {self.name}"
        return f"{the} is {self.colour}. {the} costs ${self.price}. {the} has {self.stock} in stock."


@dataclass(frozen=True)
class Sheet:
    """Items with distinct names and distinct prices; colours may repeat."""

    items: tuple[Item, ...]

    @cached_property
    def text(self) -> str:
        return "\n".join(item.line for item in self.items)

    @property
    def split(self) -> Split:
        digest = blake2b(self.text.encode(), digest_size=4).digest()
        return "heldout" if int.from_bytes(digest) % HELDOUT_ONE_IN == 0 else "train"

    def with_colour(self, colour: str) -> list[Item]:
        return [item for item in self.items if item.colour == colour]

    def uniquely_coloured(self) -> list[Item]:
        """Items that a question can name by colour alone."""
        colours = [item.colour for item in self.items]
        return [item for item in self.items if colours.count(item.colour) == 1]


def _draw(rng: Random, num_items: int) -> Sheet:
    names = rng.sample(NAMES, num_items)
    prices = rng.sample(range(MIN_PRICE, MAX_PRICE + 1), num_items)
    return Sheet(
        tuple(
            Item(name, price, rng.choice(COLOURS), rng.randint(MIN_STOCK, MAX_STOCK))
            for name, price in zip(names, prices, strict=True)
        )
    )


def make_sheet(rng: Random, num_items: int, split: Split | None = None) -> Sheet:
    """Draw a fresh sheet, from one side of the split when `split` names it.

    Raises ValueError when `num_items` is outside MIN_ITEMS..MAX_ITEMS.
    """
    if not MIN_ITEMS <= num_items <= MAX_ITEMS:
        raise ValueError(f"num_items must be {MIN_ITEMS}..{MAX_ITEMS}, got {num_items}")
    while True:
        sheet = _draw(rng, num_items)
        if split is None or sheet.split == split:
            return sheet


def split_rng(split: Split, seed: int) -> Random:
    """Randomness for one split and seed; the two splits never share a seed space."""
    return Random(f"shop/{split}/{seed}")
