"""Starts a tier as a process of its own and ends it: for examples, demos and tests that need a whole tier.

Owns the process and the text it prints; knows nothing of what the tier does.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import IO, Self

from longshore.errors import ConfigError

__all__ = ["TierProcess"]

_READY = re.compile(r"\bready on (http://\S+)")
_NUM_KEPT_LINES = 200


class TierProcess:
    """A `longshore` command that announces `ready on http://...`, as a context manager.

    `arguments` are those of the `longshore` command; `environment` is added to this process's.
    `start_timeout_s` bounds the start, `stop_timeout_s` the drain after SIGTERM. The process
    leads a group of its own, so that `kill` takes its children along. Raises ConfigError with
    the command's own last line when it does not come up.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        start_timeout_s: float = 120.0,
        stop_timeout_s: float = 15.0,
    ) -> None:
        self._arguments = tuple(arguments)
        self._environment = dict(environment or {})
        self._start_timeout_s = start_timeout_s
        self._stop_timeout_s = stop_timeout_s
        self._process: subprocess.Popen[str] | None = None
        self._lines: deque[str] = deque(maxlen=_NUM_KEPT_LINES)
        self._ready = threading.Event()
        self._url: str | None = None
        self._readers: list[threading.Thread] = []

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """Where the tier listens."""
        if self._url is None:
            raise ConfigError("the tier has not been started")
        return self._url

    @property
    def pid(self) -> int:
        """The process id of the tier's first process."""
        if self._process is None:
            raise ConfigError("the tier has not been started")
        return self._process.pid

    @property
    def output(self) -> str:
        """The last lines that the tier printed, on both streams."""
        return "\n".join(self._lines)

    @property
    def is_running(self) -> bool:
        """True between a successful start and the end of the first process."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start and wait until the tier says that it is ready."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "longshore.cli", *self._arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=os.environ | self._environment,
            start_new_session=True,
        )
        for stream in (self._process.stdout, self._process.stderr):
            reader = threading.Thread(target=self._read, args=(stream,), daemon=True)
            reader.start()
            self._readers.append(reader)
        self._wait_until_ready()

    def stop(self) -> None:
        """Ask it to drain and end; after `stop_timeout_s` it is killed. Safe to call twice."""
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(self._stop_timeout_s)
        self.kill()

    def kill(self) -> None:
        """End the whole process group at once, as a power cut would."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for reader in self._readers:
            reader.join(1.0)
        for stream in (self._process.stdout, self._process.stderr):
            if stream is not None:
                stream.close()

    def _wait_until_ready(self) -> None:
        assert self._process is not None
        deadline_s = time.monotonic() + self._start_timeout_s
        while not self._ready.wait(0.05):
            if self._process.poll() is not None:
                for reader in self._readers:
                    reader.join(1.0)
                self.kill()
                raise ConfigError(self._failure(f"ended with code {self._process.returncode}"))
            if time.monotonic() > deadline_s:
                self.kill()
                raise ConfigError(self._failure(f"was not ready within {self._start_timeout_s:.0f} s"))

    def _failure(self, what: str) -> str:
        last_line = self._lines[-1] if self._lines else "it printed nothing"
        return f"`longshore {' '.join(self._arguments[:1])}` {what}: {last_line}"

    def _read(self, stream: IO[str] | None) -> None:
        assert stream is not None
        with contextlib.suppress(ValueError):  # closed while being read, after a kill
            for line in stream:
                self._lines.append(line.rstrip("\n"))
                found = _READY.search(line)
                if found:
                    self._url = found.group(1)
                    self._ready.set()
