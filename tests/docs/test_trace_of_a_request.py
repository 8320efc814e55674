"""Every file and function that docs/trace-of-a-request.md names exists, found by reading the sources."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TRACE = ROOT / "docs" / "trace-of-a-request.md"
_HOP = re.compile(r"^(\d+)\. ", re.MULTILINE)
_CODE = re.compile(r"`([^`\n]+)`")
_FILE = re.compile(r"[\w/]+\.py\Z")
_FUNCTION = re.compile(r"([A-Za-z_][\w.]*)\(\)\Z")


def hops() -> list[str]:
    """The text of each numbered hop."""
    parts = _HOP.split(TRACE.read_text())
    assert [int(number) for number in parts[1::2]] == list(range(1, len(parts) // 2 + 1))
    return parts[2::2]


def references(hop: str) -> list[tuple[str, str | None]]:
    """Files, and functions each with the last file named before it."""
    found: list[tuple[str, str | None]] = []
    file = ""
    for code in _CODE.findall(hop):
        if _FILE.match(code):
            file = code
            found.append((file, None))
        elif function := _FUNCTION.match(code):
            found.append((file, function[1]))
    return found


def defines(file: Path, name: str) -> bool:
    """True if the file defines `function`, `Class` or `Class.method`."""
    nodes: list[ast.AST] = [ast.parse(file.read_text())]
    for part in name.split("."):
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        nodes = [
            node
            for parent in nodes
            for node in ast.walk(parent)
            if isinstance(node, kinds) and node.name == part
        ]
    return bool(nodes)


def test_there_are_ten_hops_and_each_names_a_function() -> None:
    assert len(hops()) == 10
    for hop in hops():
        assert any(function for _, function in references(hop)), hop


@pytest.mark.parametrize(
    ("file", "function"), sorted({ref for hop in hops() for ref in references(hop)}, key=str)
)
def test_it_exists(file: str, function: str | None) -> None:
    assert (ROOT / file).is_file(), file
    if function is not None:
        assert defines(ROOT / file, function), f"{file} defines no {function}"
