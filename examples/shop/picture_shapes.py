"""The products of the pictures as flat shapes in a unit square, y downwards, and the colours they come in.

Each product is a list of outlines with a tone: "body" takes the product's colour, "dark" and "light" a shade
of it, "trim" a grey of its own. Draws nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import cos, pi, sin
from typing import Literal

Tone = Literal["body", "dark", "light", "trim"]
Point = tuple[float, float]
Part = tuple[Tone, tuple[Point, ...]]

COLOUR_RGB: dict[str, tuple[int, int, int]] = {
    "red": (205, 30, 35),
    "blue": (35, 80, 215),
    "green": (30, 145, 55),
    "yellow": (245, 220, 35),
    "black": (28, 28, 30),
    "white": (244, 244, 240),
    "brown": (115, 68, 32),
    "grey": (130, 130, 132),
    "pink": (250, 150, 190),
    "purple": (120, 40, 160),
    "orange": (245, 130, 25),
    "teal": (20, 160, 165),
}


def _oval(x: float, y: float, rx: float, ry: float, turns: float = 1.0, start: float = 0.0) -> list[Point]:
    """An ellipse, or the part of one that begins at `start` turns from the right, going down."""
    steps = max(4, round(28 * turns))
    angles = [2 * pi * (start + turns * i / steps) for i in range(steps + (turns < 1.0))]
    return [(x + rx * cos(a), y + ry * sin(a)) for a in angles]


def _box(left: float, top: float, right: float, bottom: float) -> list[Point]:
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def _bar(a: Point, b: Point, width: float) -> list[Point]:
    """A straight bar from `a` to `b`."""
    dx, dy = b[0] - a[0], b[1] - a[1]
    length = (dx * dx + dy * dy) ** 0.5
    nx, ny = -dy / length * width / 2, dx / length * width / 2
    return [(a[0] + nx, a[1] + ny), (b[0] + nx, b[1] + ny), (b[0] - nx, b[1] - ny), (a[0] - nx, a[1] - ny)]


def _part(tone: Tone, points: Iterable[Point]) -> Part:
    return tone, tuple(points)


def _ladder() -> list[Part]:
    sides = [
        _part("body", _bar((0.30, 0.02), (0.22, 0.98), 0.07)),
        _part("body", _bar((0.70, 0.02), (0.78, 0.98), 0.07)),
    ]
    rungs = [
        _part("dark", _bar((0.30 - 0.08 * y, y), (0.70 + 0.08 * y, y), 0.05))
        for y in (0.12, 0.29, 0.46, 0.63, 0.80)
    ]
    return [*rungs, *sides]


PRODUCTS: dict[str, tuple[Part, ...]] = {
    "lamp": (
        _part("trim", _box(0.46, 0.45, 0.54, 0.90)),
        _part("dark", _oval(0.5, 0.92, 0.24, 0.06)),
        _part("body", [(0.34, 0.05), (0.66, 0.05), (0.86, 0.50), (0.14, 0.50)]),
        _part("light", [(0.38, 0.08), (0.46, 0.08), (0.38, 0.47), (0.24, 0.47)]),
    ),
    "chair": (
        _part("dark", _box(0.20, 0.55, 0.28, 0.98)),
        _part("dark", _box(0.72, 0.55, 0.80, 0.98)),
        _part("body", _box(0.20, 0.03, 0.30, 0.60)),
        _part("body", _box(0.20, 0.50, 0.82, 0.62)),
        _part("light", _box(0.30, 0.10, 0.36, 0.46)),
        _part("body", _box(0.36, 0.08, 0.42, 0.52)),
    ),
    "table": (
        _part("dark", _box(0.10, 0.36, 0.18, 0.92)),
        _part("dark", _box(0.82, 0.36, 0.90, 0.92)),
        _part("body", _box(0.02, 0.24, 0.98, 0.38)),
        _part("light", _box(0.02, 0.24, 0.98, 0.28)),
    ),
    "bottle": (
        _part("body", [(0.42, 0.12), (0.58, 0.12), (0.58, 0.34), (0.70, 0.46), (0.70, 0.96), (0.30, 0.96),
                       (0.30, 0.46), (0.42, 0.34)]),
        _part("trim", _box(0.40, 0.03, 0.60, 0.13)),
        _part("light", _box(0.35, 0.50, 0.41, 0.92)),
    ),
    "mug": (
        _part("dark", _oval(0.74, 0.52, 0.22, 0.24)),
        _part("trim", _oval(0.74, 0.52, 0.12, 0.14)),
        _part("body", _box(0.14, 0.20, 0.72, 0.88)),
        _part("dark", _oval(0.43, 0.20, 0.29, 0.07)),
        _part("light", _box(0.20, 0.32, 0.27, 0.80)),
    ),
    "clock": (
        _part("body", _oval(0.5, 0.5, 0.47, 0.47)),
        _part("trim", _oval(0.5, 0.5, 0.36, 0.36)),
        _part("body", _bar((0.5, 0.52), (0.5, 0.20), 0.06)),
        _part("body", _bar((0.48, 0.5), (0.72, 0.58), 0.06)),
    ),
    "vase": (
        _part("body", [(0.36, 0.04), (0.64, 0.04), (0.58, 0.24), (0.78, 0.52), (0.74, 0.76), (0.62, 0.96),
                       (0.38, 0.96), (0.26, 0.76), (0.22, 0.52), (0.42, 0.24)]),
        _part("dark", _oval(0.5, 0.05, 0.15, 0.035)),
        _part("light", [(0.36, 0.45), (0.43, 0.40), (0.38, 0.78), (0.33, 0.70)]),
    ),
    "ladder": tuple(_ladder()),
    "hammer": (
        _part("trim", _bar((0.50, 0.20), (0.50, 0.98), 0.10)),
        _part("body", _box(0.22, 0.06, 0.80, 0.30)),
        _part("dark", _box(0.22, 0.02, 0.36, 0.34)),
        _part("body", [(0.80, 0.06), (0.98, 0.22), (0.80, 0.30)]),
    ),
    "tent": (
        _part("body", [(0.50, 0.08), (0.99, 0.90), (0.01, 0.90)]),
        _part("light", [(0.50, 0.08), (0.30, 0.90), (0.01, 0.90)]),
        _part("trim", [(0.50, 0.40), (0.66, 0.90), (0.36, 0.90)]),
    ),
    "umbrella": (
        _part("trim", _box(0.475, 0.30, 0.525, 0.92)),
        _part("trim", _bar((0.50, 0.92), (0.64, 0.92), 0.05)),
        _part("body", _oval(0.5, 0.48, 0.48, 0.42, 0.5, 0.5)),
        _part("dark", _oval(0.5, 0.48, 0.17, 0.42, 0.5, 0.5)),
    ),
    "hat": (
        _part("body", [(0.28, 0.24), (0.38, 0.16), (0.62, 0.16), (0.72, 0.24), (0.74, 0.66), (0.26, 0.66)]),
        _part("dark", _box(0.26, 0.52, 0.74, 0.64)),
        _part("body", _oval(0.5, 0.70, 0.49, 0.11)),
    ),
    "kite": (
        _part("body", [(0.50, 0.01), (0.82, 0.34), (0.50, 0.78), (0.18, 0.34)]),
        _part("light", [(0.50, 0.01), (0.50, 0.34), (0.18, 0.34)]),
        _part("dark", [(0.50, 0.34), (0.82, 0.34), (0.50, 0.78)]),
        _part("trim", _bar((0.50, 0.78), (0.62, 0.99), 0.04)),
    ),
    "ball": (
        _part("body", _oval(0.5, 0.5, 0.46, 0.46)),
        _part("light", _oval(0.36, 0.34, 0.12, 0.10)),
        _part("dark", _bar((0.06, 0.56), (0.94, 0.44), 0.06)),
    ),
    "bowl": (
        _part("body", _oval(0.5, 0.36, 0.48, 0.46, 0.5, 0.0)),
        _part("dark", _oval(0.5, 0.36, 0.48, 0.10)),
        _part("body", _box(0.36, 0.78, 0.64, 0.88)),
    ),
    "candle": (
        _part("body", _box(0.36, 0.34, 0.64, 0.94)),
        _part("light", _box(0.40, 0.40, 0.45, 0.90)),
        _part("dark", _oval(0.5, 0.94, 0.30, 0.05)),
        _part("trim", _bar((0.50, 0.22), (0.50, 0.36), 0.035)),
        _part("trim", [(0.50, 0.02), (0.58, 0.16), (0.50, 0.25), (0.42, 0.16)]),
    ),
}  # fmt: skip
