"""The parent's side of the model process: starts it, hands it jobs, routes what it says, ends it.

A process that dies or stalls ends its job in a DeviceError; starting the next one is the caller's.
"""

from __future__ import annotations

import itertools
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

from longshore.device.frames import Frame, read_frame, write_frame
from longshore.errors import BundleIncompatibleError, DeviceError, InvalidImageError

_PACKAGE_ROOT = Path(__file__).parent.parent.parent
_JOIN_S = 5.0
_STDERR_TAIL_BYTES = 400
_LOST: Frame = {"type": "lost"}

Nothing = Callable[[], None]


class Channel:
    """What the model process says of one job, in order; `ended` runs once, on the reading thread."""

    def __init__(self, job_id: int, ended: Nothing) -> None:
        self.job_id = job_id
        self.is_over = threading.Event()
        self._ended = ended
        self._frames: queue.SimpleQueue[Frame] = queue.SimpleQueue()

    def put(self, frame: Frame) -> None:
        self._frames.put(frame)
        if frame["type"] in ("end", "refused", "error", "lost") and not self.is_over.is_set():
            self.is_over.set()
            self._ended()

    def get(self, timeout_s: float | None) -> Frame | None:
        """The next frame; None when none came in time."""
        try:
            return self._frames.get(timeout=timeout_s)
        except queue.Empty:
            return None

    def wake(self, frame: Frame) -> None:
        """Put a frame of the parent's own, to end a wait."""
        self._frames.put(frame)


class _Router:
    """Sends each frame to the channel that waits for it; the reading thread holds this and no more."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._channel: Channel | None = None
        self.is_lost = False

    def attach(self, channel: Channel) -> None:
        with self._lock:
            self._channel = channel
        if self.is_lost:
            channel.put(_LOST)

    def pump(self, stream: BinaryIO) -> None:
        """Read until the process ends; every kind of broken stream counts as its end."""
        with suppress(Exception):
            while (frame := read_frame(stream)) is not None:
                if frame["type"] == "error":
                    self.is_lost = True  # an error is the process's last word
                with self._lock:
                    channel = self._channel
                if channel is not None and frame.get("id") in (None, channel.job_id):
                    channel.put(frame)
        self.is_lost = True
        with self._lock:
            channel = self._channel
        if channel is not None:
            channel.put(_LOST)


class ModelProcess:
    """One running model process."""

    def __init__(self) -> None:
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed in close)
        self._popen = subprocess.Popen(
            [sys.executable, "-P", "-m", "longshore.device.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=_environment(),
        )
        self._sink = cast(BinaryIO, self._popen.stdin)
        self._write_lock = threading.Lock()
        self._ids = itertools.count(1)
        self._router = _Router()
        source = cast(BinaryIO, self._popen.stdout)
        self._reader = threading.Thread(target=self._router.pump, args=(source,), daemon=True)
        self._load_channel = Channel(0, lambda: None)
        self._router.attach(self._load_channel)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def is_alive(self) -> bool:
        return not self._router.is_lost and self._popen.poll() is None

    def load(self, frame: Frame, timeout_s: float) -> Frame:
        """Have the model loaded; its `ready` frame, or DeviceError."""
        self._send({"type": "load", **frame})
        answer = self._load_channel.get(timeout_s)
        if answer is None:
            raise DeviceError(f"the model was not loaded within {timeout_s:g} s")
        if answer["type"] != "ready":
            raise self.failure(answer)
        return answer

    def submit(self, job: Frame, ended: Nothing) -> Channel:
        """Start a job; the process takes one at a time."""
        channel = Channel(next(self._ids), ended)
        self._router.attach(channel)
        self._send({"type": "job", "id": channel.job_id, **job})
        return channel

    def cancel(self, channel: Channel, grace_s: float) -> None:
        """End a job within one step; a process that does not listen for `grace_s` is killed."""
        if channel.is_over.is_set():
            return
        self._send({"type": "cancel", "id": channel.job_id})
        if not channel.is_over.wait(grace_s):
            self._popen.kill()
            channel.is_over.wait(_JOIN_S)

    def failure(self, frame: Frame) -> DeviceError | BundleIncompatibleError | InvalidImageError:
        """The error that a frame which is not a token tells of."""
        if frame["type"] == "refused":
            return InvalidImageError(frame["message"], param=frame["param"])
        if frame["type"] == "error":
            if frame["kind"] == "memory":
                return DeviceError(f"the model process reached its memory limit ({frame['message']})")
            if frame["kind"] == "incompatible":
                return BundleIncompatibleError(frame["message"].partition(": ")[2])
            return DeviceError(f"the model process failed: {frame['message']}")
        with suppress(subprocess.TimeoutExpired):
            self._popen.wait(_JOIN_S)
        return DeviceError(f"the model process ended ({_how(self._popen.returncode)}){self._last_words()}")

    def kill(self) -> None:
        """End the process without waiting; from any thread."""
        self._popen.kill()

    def close(self) -> None:
        """End the process and wait for it; safe to call again, and from a finalizer."""
        self._popen.kill()
        self._popen.wait()
        self._reader.join(_JOIN_S)
        for stream in (self._sink, self._popen.stdout, self._stderr):
            with suppress(OSError):
                stream and stream.close()

    def _send(self, frame: Frame) -> None:
        with suppress(OSError, ValueError), self._write_lock:  # a dead process is told by the reading thread
            write_frame(self._sink, frame)

    def _last_words(self) -> str:
        with suppress(OSError, ValueError):
            self._stderr.seek(0, os.SEEK_END)
            self._stderr.seek(max(0, self._stderr.tell() - _STDERR_TAIL_BYTES))
            text = self._stderr.read().decode("utf-8", "replace").strip()
            return f": {' '.join(text.split())}" if text else ""
        return ""


def _how(returncode: int | None) -> str:
    if returncode is None:
        return "its pipe broke"
    return f"signal {-returncode}" if returncode < 0 else f"exit status {returncode}"


def _environment() -> dict[str, str]:
    """The parent's environment, with this package importable and no thread pool beside the session's."""
    env: dict[str, Any] = dict(os.environ)
    paths = [str(_PACKAGE_ROOT), *filter(None, [env.get("PYTHONPATH")])]
    return env | {
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "PYTHONUTF8": "1",
    }
