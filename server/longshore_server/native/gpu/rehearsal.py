"""A model's first steps, run on its first layer alone while the others are being loaded.

Each kernel is compiled the first time it is launched, some seconds for all of a step's on a machine that has
kept none. Done here, that time passes beside the loading, not before the first answer; and a model whose
kernels fail is found before it serves.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from longshore_server.native.sampling_params import SamplingParams
from longshore_server.native.scheduler import Chunk
from longshore_server.native.sequence import Sequence

if TYPE_CHECKING:  # to import it takes its time, too: make_runner does, on a thread
    from longshore_server.native.gpu.runner import GpuRunner

# A decode, and a prompt long enough for the products of many rows. Each has a thread of its own.
STEP_TOKENS = (1, 128)
TIMEOUT_S = 120.0


class Rehearsal:
    """A context manager: what has begun has ended when it is left, or has had TIMEOUT_S for it."""

    def __init__(
        self, device: torch.device, make_runner: Callable[[PreTrainedModel, int], GpuRunner]
    ) -> None:
        """`make_runner` makes the runner of a model of few layers, with KV for so many tokens."""
        self._device = device
        self._make_runner = make_runner
        self._executor = ThreadPoolExecutor(len(STEP_TOKENS), "rehearsal")
        self._runs: list[Future[None]] = []

    def __enter__(self) -> Rehearsal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._executor.shutdown(wait=False)
        wait(self._runs, TIMEOUT_S)

    @property
    def has_begun(self) -> bool:
        return bool(self._runs)

    def begin(self, model: PreTrainedModel) -> None:
        """`model` is one of few layers, see model.first_layer. It returns at once."""
        is_ready = None
        if self._device.type == "cuda":
            is_ready = torch.cuda.current_stream(self._device).record_event()
        for num_tokens in STEP_TOKENS:
            self._runs.append(self._executor.submit(self._run_on_stream, model, num_tokens, is_ready))

    def finish(self) -> None:
        """Waits for the steps, TIMEOUT_S at most, and raises what one of them raised."""
        for run in self._runs:
            run.result(TIMEOUT_S)

    def _run_on_stream(
        self, model: PreTrainedModel, num_tokens: int, is_ready: torch.cuda.Event | None
    ) -> None:
        if is_ready is None:
            self._run(model, num_tokens)
            return
        with torch.cuda.stream(torch.cuda.Stream(self._device)):  # it sets the device, too
            is_ready.wait()
            self._run(model, num_tokens)

    def _run(self, model: PreTrainedModel, num_tokens: int) -> None:
        runner = self._make_runner(model, num_tokens)
        sequence = Sequence("rehearsal", [0] * num_tokens, SamplingParams(), max_model_len=num_tokens + 1)
        sequence.block_table = list(range(runner.cache.num_blocks))
        runner.launch([Chunk(sequence, num_tokens, samples=True)])()
