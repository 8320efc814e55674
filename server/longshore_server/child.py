"""One child process of the supervisor: its command, its start, its end. It decides nothing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from longshore_server.status_pipe import read_status

_STATUS_LINE_BYTES = 64 * 1024


class Child:
    """A Python module run as a process that lives no longer than this one.

    Its standard input is its lifeline; its standard output holds status lines.
    """

    def __init__(
        self,
        name: str,
        module: str,
        arguments: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
    ) -> None:
        self.name = name
        self._command = [sys.executable, "-m", module, *arguments, "--parent", str(os.getpid())]
        self._environment = {**os.environ, **(environment or {})}
        self._pass_fds = tuple(pass_fds)
        self._process: asyncio.subprocess.Process | None = None

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def start(self) -> None:
        """Starts the process; it must not be running."""
        self._process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=self._environment,
            pass_fds=self._pass_fds,
            limit=_STATUS_LINE_BYTES,
        )

    async def wait(self) -> int:
        """Waits for the end; returns the exit code, negative for a signal."""
        assert self._process is not None
        return await self._process.wait()

    async def next_status(self) -> dict[str, Any] | None:
        """The next thing that it tells; None at its end."""
        assert self._process is not None and self._process.stdout is not None
        try:
            line = await self._process.stdout.readline()
        except ValueError:  # longer than any status
            return {}
        return read_status(line) if line else None

    def terminate(self) -> None:
        """Asks for an orderly end with SIGTERM."""
        self._signal(signal.SIGTERM)

    def let_go(self) -> None:
        """Asks for an orderly end by closing the lifeline."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()

    def kill(self) -> None:
        """Ends it at once."""
        self._signal(signal.SIGKILL)

    async def end_within(self, timeout_s: float) -> None:
        """Waits for the end that was asked for, then kills."""
        if self._process is None:
            return
        try:
            await asyncio.wait_for(self._process.wait(), timeout_s)
        except TimeoutError:
            self.kill()
            await self._process.wait()

    def _signal(self, number: signal.Signals) -> None:
        if self.is_running:
            assert self._process is not None
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)


def ending_words(code: int) -> str:
    """An exit code in words."""
    if code >= 0:
        return f"ended with code {code}"
    with contextlib.suppress(ValueError):
        return f"was ended by {signal.Signals(-code).name}"
    return f"was ended by signal {-code}"
