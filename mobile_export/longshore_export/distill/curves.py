"""A run's curve: one JSON line per logged step, and a picture of it. Draws with matplotlib, imported late."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def append(path: Path, line: dict[str, Any]) -> None:
    """Add one point."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """All points, in order."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def cut(path: Path, step: int) -> None:
    """Forget the points after `step`, which a resumed run will log again."""
    if path.exists():
        kept = [json.dumps(line) + "\n" for line in read(path) if line["step"] <= step]
        path.write_text("".join(kept), encoding="utf-8")


def draw(path: Path, picture: Path) -> None:
    """Every loss against the step, on a logarithmic scale, as the picture's suffix says (svg, png)."""
    from matplotlib.figure import Figure

    points = read(path)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for name in dict.fromkeys(name for point in points for name in point["loss"]):
        drawn = [(point["step"], point["loss"][name]) for point in points if point["loss"].get(name, 0) > 0]
        if drawn:
            axes.plot(*zip(*drawn, strict=True), label=name)
    axes.set(xlabel="training step", ylabel="loss", yscale="log")
    axes.legend(frameon=False)
    figure.savefig(picture)
