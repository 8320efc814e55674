"""What the documents point at is there: links, make targets, files and folders in backticks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
_LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")
_TARGET = re.compile(r"\bmake ([a-z0-9]+)`|^(?:\$ )?make ([a-z0-9]+)$", re.MULTILINE)
_PATH = re.compile(r"`((?:docs|tests|examples|scripts|sdk_python|server|edge|mobile_export)/[\w./-]*)`")


def _ids(path: Path) -> str:
    return path.name


@pytest.mark.parametrize("document", DOCUMENTS, ids=_ids)
def test_links_lead_somewhere(document: Path) -> None:
    for target in _LINK.findall(document.read_text()):
        assert (document.parent / target).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=_ids)
def test_make_targets_exist(document: Path) -> None:
    defined = set(re.findall(r"^([a-z0-9]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {name for match in _TARGET.findall(document.read_text()) for name in match if name}
    assert named <= defined


@pytest.mark.parametrize("document", DOCUMENTS, ids=_ids)
def test_paths_exist(document: Path) -> None:
    for path in _PATH.findall(document.read_text()):
        assert (ROOT / path).exists(), path


def test_every_figure_of_the_benchmarks_has_its_command_and_machine() -> None:
    lines = (ROOT / "docs" / "benchmarks.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("|") and not line.startswith(("|---", "| date"))]
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert all(cells[:5]), row
