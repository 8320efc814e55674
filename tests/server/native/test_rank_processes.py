"""Ranks as processes under a bare engine: equal random weights, silence, a pass that breaks off halfway."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch.distributed import FileStore

from core_processes import tiny_model_folder
from longshore_server.native import EngineConfig, NativeEngine, SamplingParams
from longshore_server.native.errors import RanksLostError
from longshore_server.native.ranks.group import MeetingPlace

PROMPT = list(range(40, 60))
PARAMS = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
NOTICE_TIMEOUT_S = 5.0


def _ranks() -> list[psutil.Process]:
    """This process's own ranks; a core that another test still holds has them as grandchildren."""
    children = psutil.Process().children()
    return [child for child in children if "longshore_server.native.ranks.process" in child.cmdline()]


def _fail(*_: Any) -> torch.Tensor:
    raise RuntimeError("on purpose")


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    return {
        "model": str(tiny_model_folder(tmp_path)),
        "load_format": "random",
        "num_kv_blocks": 16,
        "seed": 3,
    }


@pytest.mark.slow
def test_random_weights_do_not_depend_on_ranks_and_ranks_out_of_step_are_ended(
    settings: dict[str, Any],
) -> None:
    lost: list[str] = []
    engine = NativeEngine(EngineConfig(**settings, tensor_parallel_size=2), on_ranks_lost=lost.append)
    try:
        single = NativeEngine(EngineConfig(**settings))
        assert engine.generate([PROMPT], PARAMS) == single.generate([PROMPT], PARAMS)
        engine.check_integrity()
        (rank,) = _ranks()
        engine._runner.model.model.layers[
            0
        ].mlp.forward = _fail  # the other rank waits for this one's product
        for _ in range(2):
            with pytest.raises(RanksLostError, match="out of step"):
                engine.generate([PROMPT[:8]], PARAMS)
        assert lost == ["the ranks are out of step after a failed pass"]
    finally:
        engine.close()
    assert not rank.is_running()


@pytest.mark.slow
def test_a_silent_rank_is_noticed_and_ended(settings: dict[str, Any]) -> None:
    """Within a second where the machine is not too busy to look; the bound here is for a busy one."""
    noticed = threading.Event()
    engine = NativeEngine(
        EngineConfig(**settings, placement="attention_feed_forward"), on_ranks_lost=lambda _: noticed.set()
    )
    try:
        (rank,) = _ranks()
        rank.suspend()
        began_s = time.monotonic()
        with pytest.raises(RanksLostError, match="no sign of life"):
            engine.generate([PROMPT], PARAMS)  # its forward pass is interrupted
        assert noticed.wait(NOTICE_TIMEOUT_S)
        print(f"noticed after {time.monotonic() - began_s:.2f} s")
    finally:
        engine.close()
    assert not rank.is_running()


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="elsewhere a folder is left to the system's care")
def test_ranks_that_are_killed_while_they_meet_leave_nothing_behind(tmp_path: Path) -> None:
    code = """
import os, signal
from torch.distributed import FileStore
from longshore_server.native.ranks.group import MeetingPlace
place = MeetingPlace()
FileStore(str(place.path), 2).set("here", "1")
assert FileStore(str(place.path), 2).get("here") == b"1"
os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="elsewhere it is a folder")
def test_a_store_that_is_collected_late_writes_into_no_other_file(tmp_path: Path) -> None:
    """Torch writes into the path once more at the end of a store."""
    place = MeetingPlace()
    store = FileStore(str(place.path), 2)
    store.set("here", "1")
    place.close()
    with contextlib.ExitStack() as files:  # would take over a number that became free
        opened = [files.enter_context(open(tmp_path / f"{n}", "w+b")) for n in range(64)]
        del store
        gc.collect()
        assert all(not Path(file.name).stat().st_size for file in opened)
