"""The first rank's hold on the others: starts them, tells them each step, notices within a second who died.

It knows no model. When a rank is lost all of them end, and whoever runs the engine is told.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import selectors
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from longshore_server.native.config import EngineConfig
from longshore_server.native.errors import RankProtocolError, RanksLostError
from longshore_server.native.offload.moves import Fetched, Fill, Move, Place
from longshore_server.native.ranks.links import RankLinks
from longshore_server.native.ranks.messages import (
    Kind,
    MessageDecoder,
    blocks_payload,
    frame,
    read_pong,
    step_payload,
)
from longshore_server.native.ranks.mirror import StepTeller
from longshore_server.native.ranks.moves import fetch_payload, move_payload, read_fetched
from longshore_server.native.scheduler import Chunk

logger = logging.getLogger(__name__)

BEAT_INTERVAL_S = 0.1
# A rank is silent when so many looks in a row, each on time, found nothing: a machine that is too busy to
# look is too busy to blame a rank.
MAX_SILENT_LOOKS = 5
START_TIMEOUT_S = 1800.0
PONG_TIMEOUT_S = 5.0
FETCH_TIMEOUT_S = 60.0
END_TIMEOUT_S = 2.0
RECEIVE_BYTES = 1 << 16

OnLost = Callable[[str], None]


class RankHandle(Protocol):
    """One started rank: a process, in all but tests."""

    def kill(self) -> None: ...
    def wait(self, timeout: float | None = None) -> Any: ...


StartRank = Callable[[socket.socket], RankHandle]


def start_process(peer: socket.socket) -> RankHandle:
    """Starts a rank as a process that has `peer`, and nothing else of ours, and lives no longer than it."""
    is_main = threading.current_thread() is threading.main_thread()
    command = [sys.executable, "-m", "longshore_server.native.ranks.process", str(peer.fileno())]
    return subprocess.Popen(  # the kernel's tie is to the starting thread, so only the main one's will do
        [*command, *(["--tied"] if is_main else [])], stdin=subprocess.DEVNULL, pass_fds=[peer.fileno()]
    )


class MeetingPlace:
    """A file through which the ranks find each other at the start; only this user can open it.

    On Linux it is memory with a name under /proc, so an engine that is killed leaves nothing behind. Its
    descriptor stays open as long as this process: torch writes into the path again whenever a store is
    collected, and by then the number must not name another file.
    """

    def __init__(self) -> None:
        self._descriptor = os.memfd_create("longshore-ranks") if hasattr(os, "memfd_create") else None
        self._folder = None if self._descriptor is not None else Path(tempfile.mkdtemp())  # mode 0700
        self.path = (
            Path(f"/proc/{os.getpid()}/fd/{self._descriptor}")
            if self._folder is None
            else self._folder / "store"
        )

    def close(self) -> None:
        """Takes the file away where it has a folder; harmless when repeated."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


class RankGroup:
    """Ranks 1 to `num_ranks - 1` of one engine.

    `on_lost` is called once, from the group's own thread, when a rank is lost after the start; all ranks are
    dead by then, and a forward pass that waits for them ends in an exception over gloo, at the latest.
    """

    def __init__(
        self, config: EngineConfig, *, on_lost: OnLost | None = None, start: StartRank = start_process
    ) -> None:
        self.num_ranks = config.num_ranks
        self.lost: str | None = None
        self._on_lost = on_lost
        self._meeting_place = MeetingPlace()
        self._links: RankLinks | None = None
        self._is_closing = False
        self._is_watching_beats = False
        self._ready = 0
        self._pongs: dict[int, tuple[int, int]] = {}
        self._ping_serial = 0
        self._fetched: dict[int, tuple[int, Fetched]] = {}
        self._fetch_serial = 0
        self._news = threading.Condition()
        self._sockets: list[socket.socket] = []
        self._handles: list[RankHandle] = []
        try:
            for rank in range(1, self.num_ranks):
                self._start(rank, config, start)
        except BaseException:
            self.close()
            raise
        self._watcher = threading.Thread(target=self._watch, daemon=True, name="ranks")
        self._watcher.start()

    def _start(self, rank: int, config: EngineConfig, start: StartRank) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._sockets.append(ours)
            self._handles.append(start(theirs))
        setup = {
            "config": dataclasses.asdict(config),
            "rank": rank,
            "store": str(self._meeting_place.path),
            "num_threads": torch.get_num_threads(),
        }
        ours.sendall(frame(Kind.SETUP, json.dumps(setup).encode()))

    # --- the start ---

    def connect(self, device: torch.device, *, nccl: bool) -> RankLinks:
        """Meets the other ranks; raises RanksLostError if one of them failed instead."""
        try:
            self._links = RankLinks(0, self.num_ranks, self._meeting_place.path, device, nccl=nccl)
        except RuntimeError as error:
            raise RanksLostError(self.lost or f"the ranks did not meet: {error}") from error
        return self._links

    def wait_ready(self) -> None:
        """Waits until every rank has its share of the model; raises RanksLostError if one failed."""
        with self._news:
            all_ready = self._news.wait_for(
                lambda: self.lost is not None or self._ready == self.num_ranks - 1, START_TIMEOUT_S
            )
        if self.lost is not None or not all_ready:
            raise RanksLostError(self.lost or f"the ranks were not ready after {START_TIMEOUT_S:.0f} s")
        self._meeting_place.close()
        self._is_watching_beats = True

    # --- steps ---

    def clear_blocks(self, blocks: Sequence[int]) -> None:
        if blocks:
            self._tell(Kind.CLEAR, blocks_payload(blocks))

    def step(self, chunks: Sequence[Chunk]) -> None:
        """Lets every rank begin the forward pass of these chunks."""
        self._tell(Kind.STEP, step_payload(chunks))

    def mirror(self, payload: bytes) -> None:
        """Lets every rank launch a step on its GPU; see `mirror`."""
        self._tell(Kind.MIRROR, payload)

    # --- blocks that leave the device and come back, see Followers ---

    def move(self, moves: Sequence[Move], fills: Sequence[Fill]) -> None:
        self._tell(Kind.MOVE, move_payload(moves, fills))

    def fetch(self, places: Sequence[Place]) -> Callable[[], Fetched]:
        """Raises RanksLostError, now or when the answers are waited for."""
        self._fetch_serial += 1
        self._tell(Kind.FETCH, fetch_payload(self._fetch_serial, places))
        return self._wait_fetched

    def _wait_fetched(self) -> Fetched:
        if not self._wait_answers(self._fetched, self._fetch_serial, FETCH_TIMEOUT_S):
            self._lose(f"a rank did not say within {FETCH_TIMEOUT_S:.0f} s what it could read")
        self.raise_if_lost()
        answers = [fetched for _, fetched in self._fetched.values()]
        closed = frozenset[int]().union(*(answer.closed_tiers for answer in answers))
        return Fetched(min(answer.num_read for answer in answers), closed)

    # --- whether all go on ---

    def check_in_step(self) -> None:
        """Raises RanksLostError unless every rank is idle after as many exchanges as this one.

        For when a pass failed here: if it failed between two exchanges, the others wait for one that never
        comes, and no later pass could be right.
        """
        assert self._links is not None
        self._ping_serial += 1
        wanted = (self._ping_serial, self._links.num_collectives % 2**32)
        self._tell(Kind.PING, self._ping_serial.to_bytes(4, "little"))
        self._wait_answers(self._pongs, wanted[0], PONG_TIMEOUT_S)
        if any(self._pongs.get(rank) != wanted for rank in range(1, self.num_ranks)):
            self._lose("the ranks are out of step after a failed pass")
        self.raise_if_lost()

    def raise_if_lost(self) -> None:
        if self.lost is not None:
            raise RanksLostError(self.lost)

    def _wait_answers(self, answers: Mapping[int, tuple[int, object]], serial: int, timeout_s: float) -> bool:
        """Waits until every rank has answered; False if one has not in time, or was lost."""

        def has_all() -> bool:
            return sum(answer[0] == serial for answer in answers.values()) == self.num_ranks - 1

        with self._news:
            self._news.wait_for(lambda: self.lost is not None or has_all(), timeout_s)
            return has_all()

    def _tell(self, kind: Kind, payload: bytes) -> None:
        self.raise_if_lost()
        message = frame(kind, payload)
        try:
            for each in self._sockets:
                each.sendall(message)
        except OSError as error:
            self._lose(f"a rank is gone: {error}")
            self.raise_if_lost()

    # --- the end ---

    def close(self) -> None:
        """Ends all ranks: in order, by the end of their sockets, or by a kill after END_TIMEOUT_S.

        The first rank's captured steps must be gone: its end of NCCL waits for them.
        """
        self._is_closing = True
        self._shut_sockets()
        for handle in self._handles:
            try:
                handle.wait(END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                handle.kill()
                handle.wait()
        watcher = getattr(self, "_watcher", None)
        if watcher is not None and watcher is not threading.current_thread():
            watcher.join(END_TIMEOUT_S)
        if self._links is not None and self.lost is None:
            self._links.abort()  # left to the garbage collector, it would wait there for ranks that are gone
        self._links = None
        for each in self._sockets:
            each.close()
        self._meeting_place.close()

    def _lose(self, reason: str) -> None:
        """Ends all ranks at once; only the first reason counts."""
        with self._news:
            if self.lost is not None or self._is_closing:
                return
            self.lost = reason
            self._news.notify_all()
        logger.critical("%s", reason)
        for handle in self._handles:
            handle.kill()
        self._shut_sockets()
        if self._on_lost is not None and self._is_watching_beats:
            self._on_lost(reason)
        if self._links is not None:
            self._links.abort()

    def _shut_sockets(self) -> None:
        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    # --- watching, in a thread of its own ---

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for rank, each in enumerate(self._sockets, start=1):
                selector.register(each, selectors.EVENT_READ, (rank, MessageDecoder()))
            silent_looks = dict.fromkeys(range(1, self.num_ranks), 0)
            while self.lost is None and not self._is_closing:
                self._look(selector, silent_looks)

    def _look(self, selector: selectors.BaseSelector, silent_looks: dict[int, int]) -> None:
        """Takes what the ranks say during one interval, and counts for whom it was nothing."""
        began_s = time.monotonic()
        heard: set[int] = set()
        while (left_s := began_s + BEAT_INTERVAL_S - time.monotonic()) > 0 and self.lost is None:
            for key, _ in selector.select(left_s):
                rank, decoder = key.data
                heard.add(rank)
                if not self._hear(rank, key.fileobj, decoder):  # type: ignore[arg-type]
                    return
        was_late = time.monotonic() - began_s > 2 * BEAT_INTERVAL_S
        for rank, looks in silent_looks.items():
            silent_looks[rank] = 0 if rank in heard else looks + (not was_late)
            if self._is_watching_beats and silent_looks[rank] > MAX_SILENT_LOOKS:
                self._lose(f"rank {rank} gave no sign of life")

    def _hear(self, rank: int, each: socket.socket, decoder: MessageDecoder) -> bool:
        """False when the rank is lost."""
        try:
            data = each.recv(RECEIVE_BYTES)
            if not data:
                raise EOFError
            for kind, payload in decoder.feed(data):
                self._take(rank, kind, payload)
        except (OSError, EOFError, RankProtocolError) as error:
            self._lose(f"rank {rank} ended" + (f": {error}" if str(error) else ""))
        return self.lost is None and not self._is_closing

    def _take(self, rank: int, kind: Kind, payload: bytes) -> None:
        with self._news:
            if kind is Kind.READY:
                self._ready += 1
            elif kind is Kind.PONG:
                self._pongs[rank] = read_pong(payload)
            elif kind is Kind.FETCHED:
                self._fetched[rank] = read_fetched(payload)
            self._news.notify_all()
        if kind is Kind.FAILED:
            self._lose(f"rank {rank}: {payload.decode(errors='replace')}")


class RankedRunner:
    """Rank 0's runner: tells the other ranks before each pass, and samples alone.

    Everything but the calls below is the plain runner's.
    """

    def __init__(self, runner: Any, group: RankGroup) -> None:
        self._runner = runner
        self._group = group
        self._teller = StepTeller()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def clear_blocks(self, blocks: Sequence[int]) -> None:
        self._group.clear_blocks(blocks)
        self._runner.clear_blocks(blocks)

    def launch(self, chunks: Sequence[Chunk]) -> Callable[[], Any]:
        """As the runner's own; raises RanksLostError when the ranks cannot go on together."""
        if not self._runner.overlaps:
            results = self.run(chunks)
            return lambda: results
        self._group.mirror(self._teller.payload(chunks, self._runner.drawn))
        read = self._together(lambda: self._runner.launch(chunks))

        def read_together() -> Any:
            results = read()
            self._group.raise_if_lost()  # then the exchanges were broken off, and the tokens are none
            return results

        return read_together

    def run(self, chunks: Sequence[Chunk]) -> Any:
        """As the plain runner's; raises RanksLostError when the ranks cannot go on together."""
        self._group.step(chunks)
        return self._together(lambda: self._runner.run(chunks))

    def _together(self, run: Callable[[], Any]) -> Any:
        try:
            return run()
        except Exception as error:
            self._group.raise_if_lost()
            try:
                self._group.check_in_step()
            except RanksLostError as lost:
                raise lost from error
            raise
