"""A rank that does not schedule: holds its share of the model and runs the passes that the first rank tells.

`python -m longshore_server.native.ranks.process FD`; FD is a socket to the first rank, and its end is the
rank's end. It samples nothing and meets no client.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import logging
import os
import queue
import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from longshore_server.native.errors import NativeEngineError
from longshore_server.native.garbage import keep_for_good
from longshore_server.native.ranks.messages import (
    Kind,
    MessageDecoder,
    frame,
    pong_payload,
    read_blocks,
    read_step,
)
from longshore_server.native.ranks.moves import fetched_payload, read_fetch, read_move

BEAT_INTERVAL_S = 0.1
RECEIVE_BYTES = 1 << 20
MAX_WAITING_MESSAGES = 64
MAX_REASON_BYTES = 2000
_PR_SET_PDEATHSIG = 1

logger = logging.getLogger(__name__)

Ended = Callable[[], None]


class RankServer:
    """Serves one rank over its socket until that ends; `ended` is then called from the reading thread."""

    def __init__(self, peer: socket.socket, *, ended: Ended) -> None:
        self._peer = peer
        self._ended = ended
        self._send_lock = threading.Lock()
        self._is_over = threading.Event()
        self._messages: queue.Queue[tuple[Kind, bytes] | None] = queue.Queue(MAX_WAITING_MESSAGES)

    def serve(self) -> None:
        """Returns when the first rank has ended; a pass that fails ends the rank, and the engine with it."""
        threading.Thread(target=self._read, daemon=True, name="first-rank").start()
        threading.Thread(target=self._beat, daemon=True, name="beat").start()
        try:
            self._serve()
        except NativeEngineError as error:
            self._tell(Kind.FAILED, _one_line(str(error)))
        except Exception as error:
            if not self._is_over.is_set():  # the others' end interrupts a pass; that is no news
                logger.exception("the rank failed")
            self._tell(Kind.FAILED, _one_line(f"{type(error).__name__}: {error}"))
        finally:
            self._is_over.set()

    def _serve(self) -> None:
        first = self._messages.get()
        if first is None:
            return
        kind, payload = first
        assert kind is Kind.SETUP, f"{kind.name} before the setup"
        share = build_share(json.loads(payload))
        keep_for_good()  # all ranks wait for the slowest
        self._tell(Kind.READY)
        while (message := self._messages.get()) is not None:
            self._carry_out(share, *message)

    def _carry_out(self, share: Any, kind: Kind, payload: bytes) -> None:
        if kind is Kind.STEP:
            share.run_step(read_step(payload))
        elif kind is Kind.MIRROR:
            share.mirror_step(payload)
        elif kind is Kind.CLEAR:
            share.clear_blocks(read_blocks(payload))
        elif kind is Kind.MOVE:
            share.store.move(*read_move(payload))
        elif kind is Kind.FETCH:
            number, places = read_fetch(payload)
            self._tell(Kind.FETCHED, fetched_payload(number, share.store.fetch(places)))
        elif kind is Kind.PING:
            serial = int.from_bytes(payload, "little")
            self._tell(Kind.PONG, pong_payload(serial, share.links.num_collectives))

    def _tell(self, kind: Kind, payload: bytes = b"") -> None:
        try:
            with self._send_lock:
                self._peer.sendall(frame(kind, payload))
        except OSError:
            self._is_over.set()

    def _beat(self) -> None:
        while not self._is_over.wait(BEAT_INTERVAL_S):
            self._tell(Kind.BEAT)

    def _read(self) -> None:
        decoder = MessageDecoder()
        try:
            while data := self._peer.recv(RECEIVE_BYTES):
                for message in decoder.feed(data):
                    self._messages.put(message)
        except OSError:
            pass
        self._ended()
        self._messages.put(None)


def _one_line(text: str) -> bytes:
    return " ".join(text.split()).encode()[:MAX_REASON_BYTES]


def build_share(setup: dict[str, Any]) -> Any:
    """This rank's share of the model, connected to the other ranks, ready to step."""
    from longshore_server.native.ranks.share import make_share

    return make_share(setup["config"], setup["rank"], Path(setup["store"]), setup["num_threads"])


def main() -> None:
    """Entry of the process."""
    parser = argparse.ArgumentParser(prog="longshore_server.native.ranks.process")
    parser.add_argument("fd", type=int)
    parser.add_argument(
        "--tied", action="store_true", help="the kernel ends it with the thread that started it"
    )
    arguments = parser.parse_args()
    if (
        arguments.tied and sys.platform == "linux"
    ):  # ends it even while it is stopped; the socket is for the rest
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    for number in (signal.SIGTERM, signal.SIGINT):  # Ctrl-C reaches all processes; the engine is still needed
        signal.signal(number, signal.SIG_IGN)
    os.dup2(2, 1)  # standard output is the engine's own
    logging.basicConfig(level="WARNING", format="longshore rank: %(levelname)s %(message)s")
    server = RankServer(socket.socket(fileno=arguments.fd), ended=lambda: os._exit(0))
    server.serve()
    os._exit(1)  # a forward pass may have left threads behind that never end


if __name__ == "__main__":
    main()
