"""CUDA graphs of decode steps, one for each of a few batch sizes, captured when a size is used again.

The first step of a size runs eagerly, which compiles kernels and warms libraries up; capturing is never on
the way to the first token. What cannot be captured goes on eagerly. It knows no sequences.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

logger = logging.getLogger(__name__)

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)

# From the inputs of a bucket on the device to its logits [rows, vocab] and sampled tokens [rows].
DecodeForward = Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: torch.Tensor
    outputs: tuple[torch.Tensor, torch.Tensor]


class DecodeGraphs:
    """Runs `forward` for a bucket, replayed where that is possible.

    The tensors that run() gives are overwritten by its next call; use them on the same stream before.
    """

    def __init__(self, forward: DecodeForward, device: torch.device) -> None:
        self._forward = forward
        self._device = device
        self._is_on = device.type == "cuda"
        self._warm: set[int] = set()
        self._captured: dict[int, _Captured] = {}
        self._pool: object | None = None

    @property
    def captured_buckets(self) -> list[int]:
        return sorted(self._captured)

    def switch_off(self) -> None:
        """Captures nothing more."""
        self._is_on = False

    def run(self, host_inputs: torch.Tensor, bucket: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`host_inputs` is pinned; it is copied without waiting."""
        captured = self._captured.get(bucket)
        if captured is None and self._is_on and bucket in self._warm:
            captured = self._capture(host_inputs, bucket)
        if captured is None:
            self._warm.add(bucket)
            return self._forward(host_inputs.to(self._device, non_blocking=True), bucket)
        captured.inputs.copy_(host_inputs, non_blocking=True)
        captured.graph.replay()
        return captured.outputs

    def _capture(self, host_inputs: torch.Tensor, bucket: int) -> _Captured | None:
        inputs = host_inputs.to(self._device)
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        try:
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                outputs = self._forward(inputs, bucket)
        except RuntimeError:  # the model does something that a graph cannot hold
            logger.exception("a decode step of %d rows cannot be captured; steps stay eager", bucket)
            self._is_on = False
            torch.cuda.synchronize(self._device)
            return None
        self._captured[bucket] = captured = _Captured(graph, inputs, outputs)
        return captured


def bucket_of(num_rows: int) -> int | None:
    """The smallest bucket that holds so many rows; None above the largest."""
    return next((bucket for bucket in BUCKETS if bucket >= num_rows), None)
