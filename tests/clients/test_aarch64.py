"""The device's own session and loop under emulated aarch64, on an older onnxruntime, give the same tokens."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from clients.conftest import NUM_TOKENS, Chat
from clients.runtimes import HERE, ROOT, lack, need
from longshore.wire import Manifest

pytestmark = [pytest.mark.aarch64, pytest.mark.timeout(300)]

HOME = ROOT / ".cache" / "aarch64"
CPU = "cortex-a76"  # a phone's, with dot products; docs/clients.md says what emulated SME does
NUM_CHATS = 2  # an emulated token takes its time


def emulated(folder: Path, chats: list[Chat]) -> dict[str, Any]:
    emulator = need("qemu-aarch64-static")
    if not (HOME / ".longshore-setup").exists():
        lack("there is no emulated Python", "make aarch64")
    python = [emulator, "-L", str(HOME / "root"), str(HOME / "root/usr/bin/python3.11"), "-B"]
    environment = os.environ | {
        "PYTHONPATH": f"{HOME / 'site'}:{ROOT / 'sdk_python'}",
        "QEMU_CPU": CPU,
    }
    job = {"bundle": str(folder), "num_tokens": NUM_TOKENS, "chats": chats}
    ended = subprocess.run(
        [*python, str(HERE / "aarch64_tokens.py")],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        timeout=280,
        env=environment,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    answer: dict[str, Any] = json.loads(ended.stdout)
    return answer


def test_fp32_gives_the_same_tokens(
    bundle: tuple[Path, Manifest], chats: list[Chat], expected: list[list[int]]
) -> None:
    answer = emulated(bundle[0], chats[:NUM_CHATS])
    assert answer["machine"] == "aarch64"
    assert answer["answers"] == expected[:NUM_CHATS]


def test_int8_gives_the_same_tokens(
    int8_bundle: tuple[Path, Manifest], chats: list[Chat], int8_expected: list[list[int]]
) -> None:
    assert emulated(int8_bundle[0], chats[:NUM_CHATS])["answers"] == int8_expected[:NUM_CHATS]
