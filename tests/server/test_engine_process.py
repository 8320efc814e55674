"""The engine process as its peers see it, over its real socket: it outlives every one of them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import psutil
import pytest

from core_processes import (
    EngineProcess,
    RawPeer,
    engine_config,
    engine_process,
    tiny_model_folder,
    wait_until,
)
from longshore_server import ipc
from longshore_server.engine_process import EXIT_BROKEN, EXIT_CONFIG
from longshore_server.engines.base import EngineStats, SamplingSpec
from poison_engine import SICK_STEP, SLOW_STEP

PROMPT = tuple(range(10, 20))
LONG = SamplingSpec(max_tokens=4000, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    # long answers, so that none ends by itself while a test looks away
    model = tiny_model_folder(tmp_path_factory.mktemp("engine") / "tiny", max_position_embeddings=4096)
    with engine_process(engine_config(model, max_waiting=8)) as process:
        yield process


@pytest.fixture
def peer(engine: EngineProcess) -> Iterator[RawPeer]:
    raw = RawPeer(engine.socket_path)
    yield raw
    raw.close()


@pytest.fixture
def greeted(peer: RawPeer) -> RawPeer:
    peer.send(ipc.Hello(ipc.PROTOCOL_VERSION, "test"))
    assert isinstance(peer.receive(), ipc.Ready)
    # An aborted request leaves with the engine's next step: what the test before sent may still be there.
    wait_until(lambda: (now := stats(peer)).num_running == now.num_waiting == 0)
    return peer


def submit(stream: int, params: SamplingSpec = LONG, **fields: Any) -> ipc.Submit:
    values = {"request_id": f"request-{stream}", "prompt_token_ids": PROMPT}
    return ipc.Submit(stream=stream, params=params, **(values | fields))


def stats(peer: RawPeer) -> EngineStats:
    peer.send(ipc.StatsRequest(1))
    return peer.receive(ipc.StatsReply).stats


def answer(peer: RawPeer, stream: int, max_tokens: int = 5) -> list[int]:
    peer.send(submit(stream, SamplingSpec(max_tokens=max_tokens, temperature=0, ignore_eos=True)))
    token_ids: list[int] = []
    while True:
        message = peer.receive(ipc.Tokens, ipc.Failed)
        assert isinstance(message, ipc.Tokens), message
        token_ids += [item.token_id for item in message.items if item.stream == stream]
        if any(item.finish_reason for item in message.items if item.stream == stream):
            return token_ids


# -- peers that break the rules ----------------------------------------------------------------

HELLO = ipc.to_frame(ipc.Hello(ipc.PROTOCOL_VERSION, "test"))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "over the bound"),
        (b"\x7f\xff\xff\xff", "over the bound"),
        (b"\x00\x00\x00\x00", "not in the table"),
        (b"\x00\x00\x00\x03abc", "not in the table"),
        (HELLO + b"\x00\x00\x00\x02\x80\x80", "not in the table"),
        (ipc.to_frame(ipc.Abort(1)), "hello comes first"),
        (HELLO + HELLO, "hello comes first, and once"),
        (ipc.to_frame(ipc.Hello(99, "test")), "version 99"),
        (ipc.to_frame(ipc.Heartbeat(0.0)), "not in the table"),
        (HELLO + ipc.to_frame(submit(3)) + ipc.to_frame(submit(3)), "stream 3 was used before"),
    ],
)
def test_a_peer_that_breaks_the_rules_is_told_and_let_go(
    engine: EngineProcess, peer: RawPeer, data: bytes, words: str
) -> None:
    peer.send_bytes(data)
    refused = peer.receive(ipc.Refused)
    assert words in refused.message
    assert peer.receive(ipc.Tokens) is None  # the connection has ended
    other = RawPeer(engine.socket_path)
    other.send_bytes(HELLO)
    assert len(answer(other, 1)) == 5
    wait_until(lambda: stats(other).num_running == 0)
    other.close()


def test_half_a_frame_and_silence_hold_up_nobody(engine: EngineProcess, greeted: RawPeer) -> None:
    stalled = RawPeer(engine.socket_path)
    stalled.send_bytes(HELLO + b"\x00\x01")
    assert len(answer(greeted, 1)) == 5
    stalled.close()


def test_a_peer_that_never_says_hello_is_let_go(peer: RawPeer) -> None:
    assert peer.receive(timeout_s=ipc.HELLO_TIMEOUT_S + 5) is None


def test_aborts_of_streams_that_are_not_there_mean_nothing(greeted: RawPeer) -> None:
    for stream in (0, 5, 2**62):
        greeted.send(ipc.Abort(stream))
    assert len(answer(greeted, 6)) == 5


# -- requests ----------------------------------------------------------------------------------


def test_a_peer_that_leaves_takes_its_requests_along(engine: EngineProcess, greeted: RawPeer) -> None:
    leaver = RawPeer(engine.socket_path)
    leaver.send_bytes(HELLO)
    for stream in range(10):
        leaver.send(submit(stream))
    leaver.receive(ipc.Tokens)
    wait_until(lambda: stats(greeted).num_running > 0)  # statistics are taken behind a step's tokens
    leaver.close()
    wait_until(lambda: (now := stats(greeted)).num_running == now.num_waiting == 0)
    assert stats(greeted).kv_usage == 0


def test_an_abort_is_carried_out_within_a_step(greeted: RawPeer) -> None:
    greeted.send(submit(1))
    greeted.receive(ipc.Tokens)
    greeted.send(ipc.Abort(1))
    wait_until(lambda: stats(greeted).num_running == 0)
    steps = stats(greeted).num_steps
    assert len(answer(greeted, 2)) == 5
    assert stats(greeted).num_steps - steps <= 7


@pytest.mark.parametrize(
    ("bad", "code", "param"),
    [
        (submit(1, prompt_token_ids=()), "invalid_request", "prompt_token_ids"),
        (submit(1, prompt_token_ids=(5000,)), "invalid_request", "prompt_token_ids"),
        (submit(1, prompt_token_ids=(5,) * 5000), "context_length_exceeded", None),
        (submit(1, SamplingSpec(temperature=-1)), "invalid_request", "temperature"),
        (submit(1, SamplingSpec(temperature=float("nan"))), "invalid_request", "temperature"),
        (submit(1, SamplingSpec(logit_bias={9999: 1.0})), "invalid_request", "logit_bias"),
        (submit(1, SamplingSpec(max_tokens=0)), "invalid_request", "max_tokens"),
        (submit(1, continue_from=(5000,)), "invalid_request", "continue_from"),
        (submit(1, remaining_s=-1.0), "deadline_exceeded", None),
    ],
)
def test_a_bad_request_fails_alone(greeted: RawPeer, bad: ipc.Submit, code: str, param: str | None) -> None:
    greeted.send(bad)
    greeted.send(submit(2, SamplingSpec(max_tokens=3, temperature=0, ignore_eos=True)))
    failed = greeted.receive(ipc.Failed)
    assert (failed.stream, failed.code, failed.param) == (1, code, param)
    assert len(answer(greeted, 3)) == 5


def test_requests_over_the_bound_are_told_to_come_later(greeted: RawPeer) -> None:
    for stream in range(17):  # max_num_seqs 8 and max_waiting 8
        greeted.send(submit(stream))
    failed = greeted.receive(ipc.Failed)
    assert (failed.stream, failed.code, failed.retry_after_s) == (16, "queue_full", 1.0)
    for stream in range(16):
        greeted.send(ipc.Abort(stream))
    numbers = count(17)

    def is_let_in() -> bool:
        stream = next(numbers)
        greeted.send(submit(stream, SamplingSpec(max_tokens=1)))
        while True:  # tokens of the aborted ones may come before
            message = greeted.receive(ipc.Tokens, ipc.Failed)
            if isinstance(message, ipc.Failed):
                return False
            if any(item.stream == stream for item in message.items):
                return True

    wait_until(is_let_in)


def test_a_deadline_is_kept_in_mid_answer(greeted: RawPeer) -> None:
    greeted.send(submit(1, remaining_s=0.2))
    assert greeted.receive(ipc.Failed).code == "deadline_exceeded"


def test_replays_are_tried_one_at_a_time(greeted: RawPeer) -> None:
    """Of three replays and a new request sent at once, each begins after the one before has a token."""
    for stream in (1, 2, 3):
        greeted.send(submit(stream, replay=True))
    greeted.send(submit(4))
    order: list[int] = []
    while len(order) < 4:
        message = greeted.receive(ipc.Tokens)
        order += [item.stream for item in message.items if item.stream not in order]
        if len(order) < 4:
            assert len(message.items) <= len(order)
    assert order == [1, 2, 3, 4]


# -- the process -------------------------------------------------------------------------------


def test_an_idle_engine_costs_no_cpu(engine: EngineProcess, greeted: RawPeer) -> None:
    answer(greeted, 1)
    process = psutil.Process(engine.pid)
    before = process.cpu_times()
    for _ in range(8):  # two seconds
        greeted.receive(ipc.Heartbeat, timeout_s=5)
    after = process.cpu_times()
    assert (after.user + after.system) - (before.user + before.system) <= 0.04


def test_a_wrong_model_is_told_and_ends_the_start(tmp_path: Path) -> None:
    model = tiny_model_folder(tmp_path / "odd", model_type="no-such-model")
    engine = EngineProcess(engine_config(model))
    try:
        engine.start()
        assert engine.wait(60) == EXIT_CONFIG
        wait_until(lambda: bool(engine.error))
        assert "no-such-model" in engine.error
        assert "\n" not in engine.error
    finally:
        engine.close()


@pytest.mark.slow
def test_sick_steps_end_the_engine_after_three_in_a_row_and_a_slow_one_after_its_time(
    tmp_path: Path,
) -> None:
    config = engine_config(tiny_model_folder(tmp_path / "tiny"), engine_step_timeout_s=1.5)
    with engine_process(config, module="poison_engine") as engine:
        peer = RawPeer(engine.socket_path)
        peer.send_bytes(HELLO)
        peer.send(submit(1, prompt_token_ids=(SICK_STEP,)))
        assert engine.wait() == EXIT_BROKEN
        peer.close()
        engine.start()
        engine.wait_ready()
        peer = RawPeer(engine.socket_path)
        peer.send_bytes(HELLO)
        peer.send(submit(1, prompt_token_ids=(SLOW_STEP,)))
        assert engine.wait() == EXIT_BROKEN
        peer.close()


@pytest.mark.slow
def test_it_has_generated_before_it_says_that_it_is_ready(tmp_path: Path) -> None:
    with engine_process(engine_config(tiny_model_folder(tmp_path / "tiny"))) as engine:
        peer = RawPeer(engine.socket_path)
        peer.send_bytes(HELLO)
        before = stats(peer)
        assert (before.num_finished, before.num_running, before.kv_usage) == (2, 0, 0.0)
        peer.close()


def test_signals_leave_it_alone_and_the_end_of_its_lifeline_ends_it(tmp_path: Path) -> None:
    with engine_process(engine_config(tiny_model_folder(tmp_path / "tiny"))) as engine:
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(engine.pid, number)
        peer = RawPeer(engine.socket_path)
        peer.send_bytes(HELLO)
        assert len(answer(peer, 1)) == 5
        peer.close()
        assert engine.process is not None and engine.process.stdin is not None
        engine.process.stdin.close()
        assert engine.wait(10) == 0
