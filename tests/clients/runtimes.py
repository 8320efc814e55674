"""Finds the tools that other runtimes need, and runs them. Installs nothing: `scripts/clients` does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
BROWSER = ROOT / "examples" / "browser"
_TIMEOUT_S = 100


def need(tool: str) -> str:
    """The path of a program; without it the test is skipped, and fails where CI should have it."""
    found = shutil.which(tool)
    if found is None:
        lack(f"{tool} is not installed")
    return str(found)


def need_node_packages() -> str:
    """Node, with the packages of the browser example."""
    node = need("node")
    if not (BROWSER / "node_modules" / "onnxruntime-web").is_dir():
        lack("the node packages of examples/browser are not installed")
    return node


def lack(what: str, remedy: str = "make clients") -> None:
    """CI must run these tests; elsewhere they are skipped with the way to get what they need."""
    if os.environ.get("CI"):
        pytest.fail(f"{what}, though CI sets it up first")
    pytest.skip(f"{what}: run `{remedy}`")


def run_node(script: str, job: dict[str, Any]) -> Any:
    """What a script beside this file prints for a job, both JSON."""
    node = need_node_packages()
    ended = subprocess.run(
        [node, str(HERE / script)], input=json.dumps(job), capture_output=True, text=True, timeout=_TIMEOUT_S
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads(ended.stdout)


def run_browser(url: str, *steps: dict[str, Any]) -> list[Any]:
    """What headless Chromium gives for each step; a script error on the page fails the test."""
    answer = run_node("drive_browser.mjs", {"executable": need("chromium"), "url": url, "steps": steps})
    assert answer["problems"] == []
    results: list[Any] = answer["results"]
    return results
