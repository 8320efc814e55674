"""CUDA graphs of steps, one for each of a few shapes, captured after a shape's first step or ahead of it.

The first step of a shape runs eagerly, unless that has been captured by then; capturing goes on in a thread
beside the steps, never on the way to a token. What cannot be captured stays eager. It knows no sequences.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from bisect import bisect_left
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

logger = logging.getLogger(__name__)

CAPTURE_TIMEOUT_S = 60.0
BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)

Shape = TypeVar("Shape", bound=Hashable)
# From a step's inputs on the device to its logits [rows, vocab] and sampled tokens [rows].
Forward = Callable[[torch.Tensor, Shape], tuple[torch.Tensor, torch.Tensor]]

# Held while a step is captured. CUDA refuses to wait for a whole device then, and torch to draw from its own
# generator of the device: what does either in another thread takes this first.
CAPTURING = threading.Lock()


@dataclass(frozen=True, slots=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: torch.Tensor
    outputs: tuple[torch.Tensor, torch.Tensor]


class CaptureThread:
    """Captures one step after the other, on `stream`. The thread is started when first needed."""

    def __init__(self, device: torch.device) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self._device = torch.device("cuda", index)
        self.stream = torch.cuda.Stream(device)
        self._executor = ThreadPoolExecutor(1, "capture", initializer=self._prepare)

    def submit(self, capture: Callable[[], _Captured]) -> Future[_Captured]:
        return self._executor.submit(capture)

    def close(self) -> None:
        """For when nothing is under way any more: it waits for nothing."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _prepare(self) -> None:
        """A product, since cuBLAS makes each thread a handle, and none while it captures."""
        torch.cuda.set_device(self._device)
        with torch.cuda.stream(self.stream):
            square = torch.zeros(16, 16, dtype=torch.bfloat16, device=self._device)
            torch.mm(square, square)
        self.stream.synchronize()


class StepGraphs(Generic[Shape]):
    """Runs `forward` for a shape, replayed where that is possible.

    With a `thread` it is called there too, while steps go on: it must keep nothing between its calls. Without
    one a shape is captured in its second step, at the same one on all ranks, whose exchanges must not mix.
    The tensors that run() gives are overwritten by its next call; use them on the same stream before.
    """

    def __init__(
        self,
        forward: Forward[Shape],
        device: torch.device,
        thread: CaptureThread | None = None,
    ) -> None:
        self._forward = forward
        self._device = device
        self._thread = thread
        self._is_on = device.type == "cuda"
        self._stream = None
        if self._is_on:
            self._stream = torch.cuda.Stream(device) if thread is None else thread.stream
        self._warm: set[Shape] = set()
        self._captured: dict[Shape, _Captured] = {}
        self._underway: tuple[Shape, Future[_Captured]] | None = None
        self._ahead: dict[Shape, int] = {}
        self._pool: tuple[int, int] | None = None

    @property
    def captured_shapes(self) -> list[Shape]:
        return list(self._captured)

    def switch_off(self) -> None:
        """Captures nothing more."""
        self._is_on = False

    def capture_ahead(self, num_inputs: Mapping[Shape, int]) -> None:
        """Names shapes to be captured before their first steps, and how many numbers each has as inputs.

        With a thread only. It begins with one at each advance(), in this order.
        """
        self._ahead |= num_inputs

    def advance(self) -> None:
        """Begins with the next shape that is to be captured, if nothing is under way."""
        self._adopt()
        while self._ahead and self._thread is not None and self._is_on and self._underway is None:
            shape = next(iter(self._ahead))
            num_inputs = self._ahead.pop(shape)
            if shape not in self._captured:
                self._begin(self._thread, torch.zeros(num_inputs, dtype=torch.int64), shape)

    @property
    def is_settled(self) -> bool:
        """Whether nothing is being captured, or to be captured."""
        return self._underway is None and not (self._is_on and self._ahead)

    def settle(self) -> None:
        """Waits for the capture under way, CAPTURE_TIMEOUT_S at most."""
        if self._underway is not None:
            wait([self._underway[1]], CAPTURE_TIMEOUT_S)
            self._adopt()

    def close(self) -> None:
        """Destroys the captured steps: NCCL's communicators do not end before graphs that hold their work."""
        self.switch_off()
        self.settle()
        for captured in self._captured.values():
            captured.graph.reset()
        self._captured.clear()

    def run(self, host_inputs: torch.Tensor, shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
        """`host_inputs` is pinned, and stays as it is; it is copied without waiting."""
        self._adopt()
        if self._is_on and self._thread is None and shape in self._warm and shape not in self._captured:
            self._note(shape, lambda: self._capture(host_inputs, shape))
        captured = self._captured.get(shape)
        if captured is not None:
            captured.inputs.copy_(host_inputs, non_blocking=True)
            captured.graph.replay()
            return captured.outputs
        outputs = self._forward(host_inputs.to(self._device, non_blocking=True), shape)
        self._warm.add(shape)
        if self._is_on and self._thread is not None:
            self._ahead = {shape: host_inputs.numel()} | self._ahead  # before all others
            self.advance()
        return outputs

    def _begin(self, thread: CaptureThread, host_inputs: torch.Tensor, shape: Shape) -> None:
        try:
            self._underway = shape, thread.submit(lambda: self._capture(host_inputs, shape))
        except RuntimeError:  # the thread could not start, or is closed
            logger.exception("there is no thread to capture steps; they stay eager")
            self._is_on = False

    def _adopt(self) -> None:
        """Takes over what the thread has captured by now."""
        if self._underway is not None and self._underway[1].done():
            (shape, capture), self._underway = self._underway, None
            self._note(shape, capture.result)

    def _note(self, shape: Shape, result: Callable[[], _Captured]) -> None:
        try:
            self._captured[shape] = result()
        except RuntimeError:  # the model does something that a graph cannot hold, or memory is short
            if shape in self._warm:
                logger.exception("a step of the shape %s cannot be captured; steps stay eager", shape)
                self._is_on = False
            else:
                logger.exception("a step of the shape %s cannot be captured; none is ahead of need", shape)
                self._ahead.clear()

    @torch.inference_mode()
    def _capture(self, host_inputs: torch.Tensor, shape: Shape) -> _Captured:
        """On a stream that is not the steps' own. Other threads may launch and allocate meanwhile.

        Relaxed, since Python may collect garbage in this thread: graphs of an engine that was dropped, say,
        whose destruction is refused in a stricter capture and spoils it.
        """
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        with CAPTURING, torch.cuda.stream(self._stream):
            inputs = host_inputs.to(self._device)
            graph.capture_begin(pool=self._pool, capture_error_mode="relaxed")
            try:
                outputs = self._forward(inputs, shape)
                graph.capture_end()
            except BaseException:
                with contextlib.suppress(RuntimeError):
                    graph.capture_end()
                _release_generator(self._device)
                raise
        return _Captured(graph, inputs, outputs)


def _release_generator(device: torch.device) -> None:
    """Torch 2.11 leaves its generator of the device in a capture that failed, where it draws nothing more."""
    index = torch.cuda.current_device() if device.index is None else device.index
    generator = torch.cuda.default_generators[index]
    generator.graphsafe_set_state(generator.clone_state())


def bucket_of(num_rows: int, buckets: Sequence[int] = BUCKETS) -> int | None:
    """The smallest bucket that holds so many rows; None above the largest."""
    return next((bucket for bucket in buckets if bucket >= num_rows), None)


def buckets_up_to(num_rows: int, buckets: Sequence[int] = BUCKETS) -> Sequence[int]:
    """Those that steps of up to so many rows have."""
    return buckets[: bisect_left(buckets, num_rows) + 1]
