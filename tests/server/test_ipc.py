"""The message table and its framing: any bytes are read, or refused with ProtocolError."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longshore.errors import ProtocolError
from longshore_server import ipc
from longshore_server.engines.base import EngineStats, JobImage, ModelInfo, SamplingSpec

MESSAGES = [
    ipc.Hello(1, "http-1"),
    ipc.Submit(
        stream=7,
        request_id="ab" * 16,
        prompt_token_ids=(1, 2, 2**31 - 1),
        params=SamplingSpec(temperature=0, seed=2**64 - 1, logit_bias={3: -1.5}, stop_token_ids=(9,)),
        remaining_s=1.5,
        continue_from=(4, 5),
        replay=True,
        images=(JobImage(1, 2, bytes(range(6))), JobImage(16, 16, b"\xff" * 768)),
    ),
    ipc.Abort(7),
    ipc.StatsRequest(1),
]
ANSWERS = [
    ipc.Ready(1, "x", ModelInfo("m", "d" * 64, 10, frozenset({1, 2}), 20), frozenset({"abort"}), "ab"),
    ipc.Tokens((ipc.TokenItem(7, 3, 0, float("-inf"), ((3, -0.5), (4, -1.0)), "stop", 1, 2),)),
    ipc.Failed(7, "queue_full", "busy", None, 1.0),
    ipc.StatsReply(1, EngineStats(num_running=3, step_s_last=0.25)),
    ipc.Heartbeat(0.5),
    ipc.Refused("protocol_error", "no"),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_workers_message_survives_the_way(message: ipc.WorkerMessage) -> None:
    (payload,) = ipc.FrameDecoder().feed(ipc.to_frame(message))
    assert ipc.decode_worker_message(payload) == message


@pytest.mark.parametrize("message", ANSWERS, ids=lambda message: type(message).__name__)
def test_an_engines_message_survives_the_way(message: ipc.EngineMessage) -> None:
    (payload,) = ipc.FrameDecoder().feed(ipc.to_frame(message))
    assert ipc.decode_engine_message(payload) == message


@given(st.lists(st.binary(max_size=200), max_size=5), st.integers(1, 50))
def test_frames_come_out_whole_however_the_stream_is_cut(payloads: list[bytes], piece_bytes: int) -> None:
    stream = b"".join(len(payload).to_bytes(4, "big") + payload for payload in payloads)
    decoder = ipc.FrameDecoder()
    pieces = [stream[at : at + piece_bytes] for at in range(0, len(stream), piece_bytes)]
    assert [frame for piece in pieces for frame in decoder.feed(piece)] == payloads


@given(st.binary(max_size=300))
def test_any_payload_is_read_or_refused(payload: bytes) -> None:
    for decode in (ipc.decode_worker_message, ipc.decode_engine_message):
        try:
            message = decode(payload)
        except ProtocolError:
            continue
        assert isinstance(message, ipc._Message)


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.sampled_from(["hello", "submit", "abort", "stats?", "pickle", ""]),
    st.dictionaries(st.sampled_from(["stream", "params", "request_id", "prompt_token_ids", "x"]), _VALUES),
)
def test_any_fields_under_a_known_name_are_read_or_refused(name: str, fields: dict[str, object]) -> None:
    payload = msgspec.msgpack.encode({"type": name, **fields})
    try:
        message = ipc.decode_worker_message(payload)
    except ProtocolError:
        return
    assert ipc.decode_worker_message(msgspec.msgpack.encode(message)) == message


def test_a_length_over_the_bound_is_refused_before_its_bytes_come() -> None:
    with pytest.raises(ProtocolError, match="over the bound"):
        list(ipc.FrameDecoder(max_frame_bytes=100).feed((101).to_bytes(4, "big")))


def test_a_message_over_the_bound_is_not_sent() -> None:
    with pytest.raises(ProtocolError, match="over the bound"):
        ipc.to_frame(ipc.Refused("x", "y" * (ipc.MAX_FRAME_BYTES + 1)))


def test_an_unknown_field_is_refused() -> None:
    with pytest.raises(ProtocolError):
        ipc.decode_worker_message(msgspec.msgpack.encode({"type": "abort", "stream": 1, "force": True}))


def test_this_user_is_let_in() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    with ours, theirs:
        ipc.check_peer(ours)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_another_user_is_kept_out(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        listener.settimeout(10)
        for folder in (tmp_path, *tmp_path.parents):
            if folder.stat().st_mode & 0o077 == 0:  # pytest's own folders
                os.chmod(folder, 0o755)
        os.chmod(tmp_path / "s", 0o777)
        with socket.socket(socket.AF_UNIX) as peer:
            os.seteuid(65534)  # SO_PEERCRED keeps the effective user of the time of connect (unix(7))
            try:
                peer.connect(str(tmp_path / "s"))
            finally:
                os.seteuid(0)
            accepted, _ = listener.accept()
            with accepted, pytest.raises(ProtocolError, match="65534"):
                ipc.check_peer(accepted)
