"""Draws training curves as an SVG picture: `python -m shop.plot CURVES PICTURE`. Standard library alone."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

WIDTH, HEIGHT, MARGIN, GAP = 420, 300, 50, 60
COLOURS = {
    "teacher": "#333333",
    "distilled": "#1f77b4",
    "scratch-steps": "#d98200",
    "scratch-time": "#c02020",
}
Point = tuple[float, float]


def read_curves(path: Path) -> dict[str, list[dict[str, float]]]:
    """Points by run: {"step", "train_s", "exact"} each, as the training script logged them."""
    curves: dict[str, list[dict[str, float]]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        point = {"step": entry["step"], "train_s": entry["train_s"], "exact": entry["exact"]["overall"]}
        curves.setdefault(entry["run"], []).append(point)
    return curves


def _text(x: float, y: float, text: str, anchor: str = "middle", fill: str = "#333") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}" fill="{fill}">{text}</text>'


def _line(points: Sequence[Point], colour: str, dashed: bool) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dash = ' stroke-dasharray="5 3"' if dashed else ""
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"{dash}/>'


def _panel(curves: dict[str, list[dict[str, float]]], axis: str, label: str, left: float) -> list[str]:
    largest = max(point[axis] for points in curves.values() for point in points)
    bottom = MARGIN + HEIGHT
    parts = [f'<rect x="{left}" y="{MARGIN}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#999"/>']
    for tenth in (0, 25, 50, 75, 100):
        parts.append(_text(left - 6, bottom - HEIGHT * tenth / 100 + 4, f"{tenth}%", "end"))
    for quarter in range(5):
        parts.append(_text(left + WIDTH * quarter / 4, bottom + 16, f"{largest * quarter / 4:.0f}"))
    parts.append(_text(left + WIDTH / 2, bottom + 36, label))
    for run, points in curves.items():
        kind = run.rpartition("-")[0] or run
        scaled = [(left + WIDTH * p[axis] / largest, bottom - HEIGHT * p["exact"]) for p in points]
        parts.append(_line(scaled, COLOURS[kind], kind == "scratch-time"))
    return parts


def draw(curves: dict[str, list[dict[str, float]]]) -> str:
    """Two panels of exact held-out answers: against steps, and against seconds of training."""
    width, height = 2 * WIDTH + 2 * MARGIN + GAP + 20, HEIGHT + 2 * MARGIN + 20
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-size="12" '
        f'font-family="sans-serif"><rect width="100%" height="100%" fill="white"/>'
    ]
    parts += _panel(curves, "step", "training steps", MARGIN + 10)
    parts += _panel(curves, "train_s", "seconds of training", MARGIN + 10 + WIDTH + GAP)
    for place, (kind, colour) in enumerate(COLOURS.items()):
        parts.append(_text(MARGIN + 10 + 130 * place, 28, kind, "start", colour))
    return "\n".join([*parts, "</svg>"]) + "\n"


def main(argv: list[str] | None = None) -> None:
    curves, picture = map(Path, sys.argv[1:] if argv is None else argv)
    picture.write_text(draw(read_curves(curves)), encoding="utf-8")


if __name__ == "__main__":
    main()
