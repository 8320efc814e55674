"""The engine's thread while there is nothing to do."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from core_processes import tiny_model_folder
from longshore_server.engine_loop import EngineLoop
from longshore_server.ipc import EngineMessage, SamplingSpec, Submit, Tokens
from longshore_server.native import EngineConfig, NativeEngine
from longshore_server.trial import TrialNote

NUM_PREPARATIONS = 5
TIMEOUT_S = 20.0


class PreparingEngine(NativeEngine):
    """Has something to prepare, as one on a GPU does."""

    num_prepared = 0
    was_prepared: threading.Event

    def prepare(self) -> bool:
        assert not self.has_unfinished()
        self.num_prepared += 1
        if self.num_prepared >= NUM_PREPARATIONS:
            self.was_prepared.set()
        return self.num_prepared < NUM_PREPARATIONS


@pytest.fixture
def engine(tmp_path: Path) -> PreparingEngine:
    folder = tiny_model_folder(tmp_path / "tiny")
    engine = PreparingEngine(EngineConfig(model=str(folder), load_format="random", num_kv_blocks=32))
    engine.was_prepared = threading.Event()
    return engine


@pytest.fixture
def sent() -> queue.Queue[EngineMessage]:
    return queue.Queue()


@pytest.fixture
def loop(engine, sent, tmp_path) -> Iterator[EngineLoop]:
    note = TrialNote(tmp_path / "note")
    loop = EngineLoop(engine, send=lambda _, message: sent.put(message), note=note, max_streams=4)
    thread = threading.Thread(target=loop.run)
    thread.start()
    yield loop
    loop.stop()
    thread.join(TIMEOUT_S)
    assert not thread.is_alive()


def test_it_prepares_later_steps_until_there_is_nothing_more(loop, engine, sent) -> None:
    assert engine.was_prepared.wait(TIMEOUT_S)
    time.sleep(0.1)
    assert engine.num_prepared == NUM_PREPARATIONS  # it sleeps now
    spec = SamplingSpec(max_tokens=3, ignore_eos=True)
    loop.submit(1, Submit(stream=1, request_id="r", prompt_token_ids=(5, 6, 7), params=spec))
    tokens = []
    while len(tokens) < 3:
        message = sent.get(timeout=TIMEOUT_S)
        assert isinstance(message, Tokens)
        tokens.extend(message.items)
    assert [item.stream for item in tokens] == [1, 1, 1]
