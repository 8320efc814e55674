"""Reads weights from files to the device, bounded by the disk or PCIe: several threads, pinned buffers.

Each thread reads pieces into two pinned buffers by turns and copies them asynchronously on a stream of its
own; the part after the one in use is read ahead. On a CPU the pieces are read straight into the tensors.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

import torch

from longshore_server.native.errors import ModelLoadError
from longshore_server.native.model.safetensors_index import Place

PIECE_BYTES = 32 * 1024 * 1024
NUM_CUDA_THREADS = 8
NUM_CPU_THREADS = 2


@dataclass(slots=True)
class _Pending:
    """One part on its way: its tensors in the files' own dtypes, and the reads that fill them."""

    tensors: dict[str, torch.Tensor]
    reads: list[Future[torch.cuda.Event | None]]


class WeightStream:
    """Hands out parts of the weights; a context manager that ends its threads."""

    def __init__(self, places: Mapping[str, Place], device: torch.device) -> None:
        self._places = places
        if device.type == "cuda" and device.index is None:  # a thread starts on GPU 0, whatever ours is
            device = torch.device("cuda", torch.cuda.current_device())
        self._device = device
        num_threads = NUM_CUDA_THREADS if device.type == "cuda" else NUM_CPU_THREADS
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="weights")
        self._lanes = threading.local()
        self._pending: dict[str, _Pending] = {}

    def __enter__(self) -> WeightStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def start(self, label: str, names: list[str]) -> None:
        """Begins to read a part; `take` with the same label waits for it."""
        ready = None
        tensors = {
            name: torch.empty(place.shape, dtype=place.dtype, device=self._device)
            for name, place in ((name, self._places[name]) for name in names)
        }
        if self._device.type == "cuda":
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(self._device))  # the memory's last user has gone by then
        reads = [
            self._pool.submit(self._read, self._places[name], tensor, first, ready)
            for name, tensor in tensors.items()
            for first in range(0, self._places[name].num_bytes, PIECE_BYTES)
        ]
        self._pending[label] = _Pending(tensors, reads)

    def take(self, label: str) -> dict[str, torch.Tensor]:
        """The part's tensors on the device; the current CUDA stream waits for the copies, the host does not.

        Raises ModelLoadError when a file cannot be read to its end.
        """
        pending = self._pending.pop(label)
        for read in pending.reads:
            copied = read.result()
            if copied is not None:
                torch.cuda.current_stream(self._device).wait_event(copied)
        return pending.tensors

    def _read(
        self, place: Place, tensor: torch.Tensor, first: int, ready: torch.cuda.Event | None
    ) -> torch.cuda.Event | None:
        count = min(PIECE_BYTES, place.num_bytes - first)
        target = tensor.reshape(-1).view(torch.uint8)[first : first + count]
        if ready is None:
            _read_fully(place, first, target)
            return None
        lane: _Lane | None = getattr(self._lanes, "lane", None)
        if lane is None:
            lane = self._lanes.lane = _Lane(self._device)
        return lane.read(place, first, target, ready)


class _Lane:
    """One thread's two pinned buffers and its stream."""

    def __init__(self, device: torch.device) -> None:
        if device.index is not None:
            torch.cuda.set_device(device)
        self._stream = torch.cuda.Stream(device)
        self._buffers = [torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._copied: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0

    def read(
        self, place: Place, first: int, target: torch.Tensor, ready: torch.cuda.Event
    ) -> torch.cuda.Event:
        self._turn = 1 - self._turn
        before = self._copied[self._turn]
        if before is not None:
            before.synchronize()
        buffer = self._buffers[self._turn][: target.numel()]
        _read_fully(place, first, buffer)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)
            target.copy_(buffer, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(self._stream)
        self._copied[self._turn] = copied
        return copied


def _read_fully(place: Place, first: int, target: torch.Tensor) -> None:
    """Fills a CPU tensor of bytes; reading releases the interpreter lock, so threads run side by side."""
    view = memoryview(target.numpy())
    try:
        descriptor = os.open(place.path, os.O_RDONLY)
        try:
            done = 0
            while done < len(view):
                count = os.preadv(descriptor, [view[done:]], place.offset + first + done)
                if count == 0:
                    raise ModelLoadError(f"{place.path} ends too early")
                done += count
        finally:
            os.close(descriptor)
    except OSError as error:
        raise ModelLoadError(f"{place.path} cannot be read: {error.strerror}") from error
