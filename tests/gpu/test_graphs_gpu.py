"""Captured steps on a GPU: what another thread, the garbage collector or a failure does to a capture."""

from __future__ import annotations

import gc

import pytest
import torch

from longshore_server.native.gpu.graphs import CaptureThread, StepGraphs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = torch.device("cuda")
NUMBERS = torch.arange(4)


def _is_capturing() -> bool:
    return torch.cuda.is_current_stream_capturing()


def _double(inputs: torch.Tensor, shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    return inputs * 2, inputs + shape


@torch.inference_mode()
def _captured(graphs: StepGraphs) -> list[int]:
    """The shapes that are captured once the shape 3 has been run often enough for it."""
    for _ in range(2):
        logits, sampled = graphs.run(NUMBERS.pin_memory(), 3)
        graphs.settle()
    assert logits.tolist() == [0, 2, 4, 6]
    assert sampled.tolist() == [3, 4, 5, 6]
    return graphs.captured_shapes


@pytest.mark.parametrize("has_thread", [False, True])
def test_graphs_may_be_dropped_while_another_step_is_captured(has_thread) -> None:
    dropped: list[StepGraphs] = [StepGraphs(_double, DEVICE)]
    assert _captured(dropped[0]) == [3]
    dropped[0].itself = dropped[0]  # type: ignore[attr-defined]  # so that the collector has to find it

    def collecting(inputs: torch.Tensor, shape: int) -> tuple[torch.Tensor, torch.Tensor]:
        if _is_capturing():
            dropped.clear()
            assert gc.collect() > 0
        return _double(inputs, shape)

    thread = CaptureThread(DEVICE) if has_thread else None
    graphs = StepGraphs(collecting, DEVICE, thread)
    assert _captured(graphs) == [3]
    assert not dropped
    graphs.close()
    if thread is not None:
        thread.close()


@torch.inference_mode()
def test_a_shape_is_captured_ahead_of_its_first_step() -> None:
    eager: list[int] = []

    def noting(inputs: torch.Tensor, shape: int) -> tuple[torch.Tensor, torch.Tensor]:
        if not _is_capturing():
            eager.append(shape)
        return _double(inputs, shape)

    thread = CaptureThread(DEVICE)
    graphs = StepGraphs(noting, DEVICE, thread)
    graphs.capture_ahead({5: 4, 3: 4, 7: 4})
    assert _captured(graphs) == [3]  # the one that was met
    for _ in range(3):
        graphs.advance()
        graphs.settle()
    assert graphs.captured_shapes == [3, 5, 7]
    for shape in (5, 7, 5):
        logits, sampled = graphs.run(NUMBERS.pin_memory(), shape)
        assert (logits.tolist(), sampled.tolist()) == ([0, 2, 4, 6], [each + shape for each in range(4)])
    assert eager == [3]
    graphs.close()
    thread.close()


def test_torch_draws_numbers_after_a_capture_that_failed() -> None:
    def waiting(inputs: torch.Tensor, shape: int) -> tuple[torch.Tensor, torch.Tensor]:
        if _is_capturing():
            inputs.sum().item()  # no graph can hold this
        return _double(inputs, shape)

    graphs = StepGraphs(waiting, DEVICE)
    assert _captured(graphs) == []
    torch.manual_seed(5)
    first = torch.randn(8, device=DEVICE)
    torch.manual_seed(5)
    assert torch.equal(torch.randn(8, device=DEVICE), first)
    assert _captured(StepGraphs(_double, DEVICE)) == [3]
