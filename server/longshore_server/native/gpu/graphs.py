"""CUDA graphs of steps, one for each of a few shapes, captured when a shape is used again.

The first step of a shape runs eagerly, which compiles kernels and warms libraries up; capturing is never on
the way to the first token. What cannot be captured goes on eagerly. It knows no sequences.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

logger = logging.getLogger(__name__)

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)

Shape = TypeVar("Shape", bound=Hashable)


@dataclass(frozen=True, slots=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: torch.Tensor
    outputs: tuple[torch.Tensor, torch.Tensor]


class StepGraphs(Generic[Shape]):
    """Runs `forward` for a shape, replayed where that is possible.

    `forward` goes from a step's inputs on the device to its logits [rows, vocab] and sampled tokens [rows].
    The tensors that run() gives are overwritten by its next call; use them on the same stream before.
    """

    def __init__(
        self,
        forward: Callable[[torch.Tensor, Shape], tuple[torch.Tensor, torch.Tensor]],
        device: torch.device,
    ) -> None:
        self._forward = forward
        self._device = device
        self._is_on = device.type == "cuda"
        self._warm: set[Shape] = set()
        self._captured: dict[Shape, _Captured] = {}
        self._pool: object | None = None

    @property
    def captured_shapes(self) -> list[Shape]:
        return list(self._captured)

    def switch_off(self) -> None:
        """Captures nothing more."""
        self._is_on = False

    def close(self) -> None:
        """Destroys the captured steps. NCCL's communicators do not end before the graphs that hold their work."""
        self.switch_off()
        for captured in self._captured.values():
            captured.graph.reset()
        self._captured.clear()

    def run(self, host_inputs: torch.Tensor, shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
        """`host_inputs` is pinned; it is copied without waiting."""
        captured = self._captured.get(shape)
        if captured is None and self._is_on and shape in self._warm:
            captured = self._capture(host_inputs, shape)
        if captured is None:
            self._warm.add(shape)
            return self._forward(host_inputs.to(self._device, non_blocking=True), shape)
        captured.inputs.copy_(host_inputs, non_blocking=True)
        captured.graph.replay()
        return captured.outputs

    def _capture(self, host_inputs: torch.Tensor, shape: Shape) -> _Captured | None:
        inputs = host_inputs.to(self._device)
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        try:
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                outputs = self._forward(inputs, shape)
        except RuntimeError:  # the model does something that a graph cannot hold
            logger.exception("a step of the shape %s cannot be captured; steps stay eager", shape)
            self._is_on = False
            torch.cuda.synchronize(self._device)
            return None
        self._captured[shape] = captured = _Captured(graph, inputs, outputs)
        return captured


def bucket_of(num_rows: int) -> int | None:
    """The smallest bucket that holds so many rows; None above the largest."""
    return next((bucket for bucket in BUCKETS if bucket >= num_rows), None)
