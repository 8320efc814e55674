"""The demo as a user runs it: its exit code is the verdict of all its claims."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_demo_holds_every_claim() -> None:
    command = [sys.executable, "-m", "longshore.cli", "demo", "--seed", "7"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "every claim held" in done.stdout
