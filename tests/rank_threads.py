"""Ranks as threads of the test's own process: their messages, exchanges and passes are the real ones.

What only processes can show (deaths, silence, the end of the parent) is tested with processes.
"""

from __future__ import annotations

import functools
import socket
import subprocess
import threading
from collections.abc import Callable
from typing import Any

import pytest

from longshore_server.native import startup
from longshore_server.native.ranks import share as rank_share
from longshore_server.native.ranks import start as rank_start
from longshore_server.native.ranks.process import RankServer

_one_at_a_time = threading.Lock()  # transformers patches torch's initialization while it builds a model


class RankThread:
    """Looks to its group like a process."""

    def __init__(self, peer: socket.socket) -> None:
        self._peer = peer.dup()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def kill(self) -> None:
        self._peer.shutdown(socket.SHUT_RDWR)

    def wait(self, timeout: float | None = None) -> None:
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise subprocess.TimeoutExpired("a rank's thread", timeout or 0)

    def _serve(self) -> None:
        with self._peer:
            RankServer(self._peer, ended=lambda: None).serve()


def _locked(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        with _one_at_a_time:
            return function(*arguments, **options)

    return call


def use_rank_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines of several ranks that are made from here on run in this process alone."""
    monkeypatch.setattr(rank_start, "start_process", RankThread)
    for module in (startup, rank_share):
        monkeypatch.setattr(module, "load_model", _locked(module.load_model))
