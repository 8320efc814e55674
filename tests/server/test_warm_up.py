"""The engine's first generation: it leaves nothing behind, and what goes wrong in it is told."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from core_processes import tiny_model_folder
from longshore_server.native import EngineConfig, NativeEngine
from longshore_server.warm_up import warm_up
from seeing_models import write_seeing_model


@pytest.fixture
def engine(tmp_path: Path) -> NativeEngine:
    folder = tiny_model_folder(tmp_path / "tiny")
    return NativeEngine(EngineConfig(model=str(folder), load_format="random", num_kv_blocks=32))


def test_it_leaves_an_idle_engine(engine: NativeEngine) -> None:
    warm_up(engine)
    assert not engine.has_unfinished()
    stats = engine.stats()
    assert stats.num_generated_tokens == 6 and stats.num_finished == 2 and stats.kv_usage == 0.0


def test_a_model_that_sees_is_shown_an_image(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_seeing_model(tmp_path / "seeing")
    engine = NativeEngine(EngineConfig(model=str(folder), num_kv_blocks=32))
    with caplog.at_level(logging.WARNING):
        warm_up(engine)
    assert not caplog.text
    assert engine.stats().num_generated_tokens == 6
    assert len(engine._runner._features._kept) == 1


def test_a_failure_is_told_and_the_engine_left_clean(
    engine: NativeEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real_step = engine.step
    steps = iter([RuntimeError("out of luck")])

    def step() -> object:
        if (error := next(steps, None)) is not None:
            raise error
        return real_step()

    monkeypatch.setattr(engine, "step", step)
    with caplog.at_level(logging.WARNING):
        warm_up(engine)
    assert "out of luck" in caplog.text
    assert all(output.finish_reason == "abort" for output in engine.step())
    assert not engine.has_unfinished() and engine.stats().kv_usage == 0.0
    engine.check_integrity()
