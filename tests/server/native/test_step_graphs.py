"""Steps go on, launched one by one, where capturing fails; what is captured is checked on GPUs."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from longshore_server.native.gpu.graphs import CaptureThread, StepGraphs

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines that cannot capture")


class ThreadOfItsOwn(CaptureThread):
    """A capture thread on a machine without CUDA; `is_lame` cannot even start."""

    def __init__(self, *, is_lame: bool) -> None:
        self.stream = None
        self.is_lame = is_lame
        self._executor = ThreadPoolExecutor(1, initializer=self._prepare)

    def _prepare(self) -> None:
        if self.is_lame:
            raise RuntimeError("no device")


def _forward(inputs: torch.Tensor, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    return inputs[:num_rows, None] * torch.ones(3), inputs[:num_rows] + 1


def _graphs(thread: CaptureThread | None) -> StepGraphs[int]:
    graphs = StepGraphs(_forward, torch.device("cpu"), thread)
    graphs._is_on = True  # as on CUDA
    return graphs


@pytest.mark.parametrize("is_lame", [False, True], ids=["cannot capture", "cannot start"])
def test_steps_go_on_where_a_thread_fails(is_lame, caplog) -> None:
    thread = ThreadOfItsOwn(is_lame=is_lame)
    decodes, mixed = _graphs(thread), _graphs(thread)
    for step in range(6):
        for graphs in (decodes, mixed):
            logits, sampled = graphs.run(torch.arange(4) + step, 2)
            assert sampled.tolist() == [step + 1, step + 2] and logits.shape == (2, 3)
            graphs.settle()
    assert not decodes.captured_shapes and not mixed.captured_shapes
    assert not decodes._is_on and not mixed._is_on, "what failed once is tried again and again"
    assert "stay eager" in caplog.text
    for graphs in (decodes, mixed):
        graphs.close()
    thread.close()


def test_where_a_shape_cannot_be_captured_ahead_no_other_is(caplog) -> None:
    """It may be for want of memory, and those that are met are worth more."""
    thread = ThreadOfItsOwn(is_lame=False)
    graphs = _graphs(thread)
    graphs.capture_ahead({2: 4, 1: 4, 4: 4})
    for _ in range(3):
        graphs.advance()
        graphs.settle()
    assert not graphs._ahead and graphs._is_on
    assert caplog.text.count("cannot be captured") == 1
    for step in range(4):
        assert graphs.run(torch.arange(4) + step, 3)[1].tolist() == [step + 1, step + 2, step + 3]
        graphs.settle()
    assert not graphs.captured_shapes and not graphs._is_on
    assert caplog.text.count("stay eager") == 1
    graphs.close()
    thread.close()


def test_steps_go_on_where_the_second_one_cannot_be_captured() -> None:
    graphs = _graphs(None)
    for step in range(4):
        assert graphs.run(torch.arange(4) + step, 3)[1].tolist() == [step + 1, step + 2, step + 3]
    assert not graphs.captured_shapes and not graphs._is_on
    graphs.close()
