"""One request on its way through the device: its clock, its counts, and the means to cancel it."""

from __future__ import annotations

import threading
import time

from longshore.device.frames import Frame
from longshore.device.process import Channel, ModelProcess
from longshore.errors import CancelledError, DeadlineExceededError

_WAKE: Frame = {"type": "wake"}
_LONGEST_SILENCE_S = 600.0


class Call:
    """Times are of `time.monotonic()`; counts are over all choices."""

    def __init__(self, deadline_s: float | None) -> None:
        self.deadline_s = deadline_s
        self.arrived_s = time.monotonic()
        self.begun_s: float | None = None
        self.first_token_s: float | None = None
        self.num_tokens = 0
        self.num_cached = 0
        self.is_cancelled = threading.Event()
        self._process: ModelProcess | None = None
        self._channel: Channel | None = None

    def attach(self, process: ModelProcess, channel: Channel) -> None:
        """The job that works for this call now."""
        self._process, self._channel = process, channel

    def count_token(self) -> None:
        """One more token came."""
        self.num_tokens += 1
        self.first_token_s = self.first_token_s or time.monotonic()

    def cancel(self) -> None:
        """Have the waiting side see `is_cancelled`; from any thread."""
        self.is_cancelled.set()
        channel = self._channel
        if channel is not None:
            channel.wake(_WAKE)

    def next_frame(self, process: ModelProcess, channel: Channel) -> Frame:
        """The next token's frame.

        Raises CancelledError, DeadlineExceededError, or DeviceError for a process that failed, or that said
        nothing for ten minutes.
        """
        if self.is_cancelled.is_set():
            raise CancelledError("the request was cancelled")
        now_s = time.monotonic()
        remaining_s = _LONGEST_SILENCE_S if self.deadline_s is None else self.deadline_s - now_s
        frame = channel.get(remaining_s) if remaining_s > 0 else None
        if self.is_cancelled.is_set():
            raise CancelledError("the request was cancelled")
        if frame is None:
            if self.deadline_s is None:
                raise process.failure({"type": "error", "kind": "stalled", "message": "it stopped answering"})
            raise DeadlineExceededError("the time ran out on this device")
        if frame["type"] != "token":
            raise process.failure(frame)
        return frame

    def end(self, grace_s: float) -> None:
        """Have the job, if it still runs, ended."""
        if self._process is not None and self._channel is not None:
            self._process.cancel(self._channel, grace_s)
