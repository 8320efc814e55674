"""Each example runs as its reader would run it, and stays short."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from demo.tiers import Keys
from longshore.tier_process import TierProcess
from vision_bundle import make_vision_bundle

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("0*.py"))
MAX_LINES = 40


def run(name: str, *arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        capture_output=True,
        text=True,
        timeout=110,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_example_is_short(script: Path) -> None:
    assert len(script.read_text().splitlines()) < MAX_LINES


def test_every_example_has_a_test() -> None:
    text = Path(__file__).read_text()
    assert [script.name for script in SCRIPTS if f'run("{script.name}"' not in text] == []


def test_ask(edge: TierProcess, keys: Keys) -> None:
    printed = run("01_ask.py", LONGSHORE_EDGE_URL=edge.url, LONGSHORE_API_KEY=keys.api_key)
    assert "red" in printed.splitlines()[0]
    assert "served by core" in printed or "served by edge" in printed


def test_stream(edge: TierProcess, keys: Keys) -> None:
    printed = run("02_stream.py", LONGSHORE_EDGE_URL=edge.url, LONGSHORE_API_KEY=keys.api_key)
    assert "right: True" in printed


def test_offline_fallback(bundle: Path) -> None:
    printed = run("03_offline_fallback.py", LONGSHORE_BUNDLE=str(bundle))
    assert "served by device" in printed
    assert "edge: failed" in printed


def test_start_tiers() -> None:
    printed = run("04_start_tiers.py")
    assert "edge edge-1" in printed
    assert "core " in printed


def test_export_student(tmp_path: Path) -> None:
    printed = run("05_export_student.py", str(tmp_path))
    assert "installed at" in printed


def test_picture(bundle: Path, tmp_path: Path) -> None:
    """The text student with eyes that nobody taught: what it answers is noise, that it looks is not."""
    make_vision_bundle(bundle, tmp_path / "seeing")
    printed = run("06_picture.py", LONGSHORE_BUNDLE=str(tmp_path / "seeing"))
    assert "read at 96 x 96 pixels (full), 36 tokens" in printed
    assert "served by device" in printed
