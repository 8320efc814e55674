"""The cache's parts without sockets: bounds and order of the LRU, the disk's bound, keys, stored forms."""

from __future__ import annotations

import asyncio
import weakref
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longshore.errors import ConfigError
from longshore.sse import DONE, encode_data
from longshore.wire import decode_chat_request, load_json
from longshore_edge import stored
from longshore_edge.auth import Client
from longshore_edge.cache import (
    AnswerCache,
    DiskStore,
    Entry,
    KeyMemo,
    MemoryLru,
    SingleFlight,
    answer_key,
    is_deterministic,
)
from longshore_edge.call import Call

keys = st.integers(0, 8).map(lambda number: bytes([number]))
steps = st.lists(
    st.tuples(st.just("put"), keys, st.integers(0, 2000)) | st.tuples(st.just("get"), keys, st.just(0)),
    max_size=60,
)


@given(steps, st.integers(0, 6000))
def test_lru_against_a_model(actions: list[tuple[str, bytes, int]], max_bytes: int) -> None:
    lru, model = MemoryLru(max_bytes), OrderedDict[bytes, Entry]()
    for action, key, size_bytes in actions:
        if action == "get":
            assert lru.get(key) == model.get(key)
            if key in model:
                model.move_to_end(key)
            continue
        entry = Entry(b"x" * size_bytes, 0.0)
        lru.put(key, entry)
        model.pop(key, None)
        if entry.size_bytes <= max_bytes:
            model[key] = entry
        while sum(item.size_bytes for item in model.values()) > max_bytes:
            model.popitem(last=False)
        assert lru.size_bytes == sum(item.size_bytes for item in model.values()) <= max_bytes
        assert len(lru) == len(model)


def test_disk_keeps_to_its_bytes_and_forgets_the_least_used(tmp_path: Path) -> None:
    disk = DiskStore(tmp_path / "c.sqlite", max_bytes=50_000)
    for number in range(100):
        disk.put(bytes([number]), Entry(b"x" * 1000, float(number)))
        disk.get(b"\0", 1000.0 + number * 100)  # in use all the time
        assert disk.size_bytes() <= 50_000
    assert disk.get(b"\0", 0.0) is not None
    assert disk.get(b"\1", 0.0) is None
    assert disk.get(bytes([99]), 0.0) == Entry(b"x" * 1000, 99.0)
    disk.put(bytes([99]), Entry(b"y", 5.0))  # a replaced entry counts once
    assert disk.get(bytes([99]), 0.0) == Entry(b"y", 5.0)
    reopened = DiskStore(tmp_path / "c.sqlite", max_bytes=50_000)
    assert reopened.size_bytes() == disk.size_bytes()
    disk.close()
    reopened.close()


def test_disk_keeps_what_models_were_told_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longshore_edge.cache._MAX_MODELS", 3)
    disk = DiskStore(tmp_path / "c.sqlite", 1000)
    disk.put_digests({"a": "1", "b": "2"})
    disk.put_digests({"a": "3"})
    assert disk.digests() == {"a": "3", "b": "2"}
    disk.put_digests({"c": "4", "d": "5"})
    disk.close()
    reopened = DiskStore(tmp_path / "c.sqlite", 1000)
    assert reopened.digests() == {"a": "3", "c": "4", "d": "5"}
    reopened.close()


def test_a_file_that_is_no_cache(tmp_path: Path) -> None:
    (tmp_path / "c.sqlite").write_bytes(b"no database at all" * 100)
    with pytest.raises(ConfigError):
        DiskStore(tmp_path / "c.sqlite", 1000)


async def test_entries_grow_old_and_stale_ones_are_for_last_resorts(tmp_path: Path) -> None:
    now_s = 1000.0
    cache = AnswerCache(MemoryLru(10_000), DiskStore(tmp_path / "c", 10**6), 60.0, lambda: now_s)
    cache.put(b"k", b"body")
    assert cache.get_from_memory(b"k") is not None
    now_s += 61
    assert cache.get_from_memory(b"k") is None
    assert await cache.get(b"k") is None
    entry = await cache.get(b"k", stale=True)
    assert entry is not None and entry.body == b"body"
    cache.close()


async def test_a_disk_that_fails_leaves_a_memory_cache(tmp_path: Path) -> None:
    disk = DiskStore(tmp_path / "c", 10**6)
    cache = AnswerCache(MemoryLru(10_000), disk, 60.0, lambda: 0.0)
    disk.close()
    cache.put(b"k", b"body")
    assert await cache.get(b"other") is None
    assert cache.get_from_memory(b"k") is not None
    assert cache.num_failures >= 1
    cache.close()


def request(**changes: Any) -> Any:
    return decode_chat_request({"model": "m", "messages": [{"role": "user", "content": "hi"}], **changes})


def test_key_holds_what_decides_the_answer_and_nothing_else() -> None:
    base = answer_key("t", "d", request(temperature=0))
    assert base == answer_key(
        "t",
        "d",
        request(
            temperature=0,
            user="u",
            metadata={"a": "b"},
            longshore={"request_id": "0" * 32, "deadline_ms": 5, "ttft_target_ms": 9, "lane": "batch"},
        ),
    )
    others = [
        answer_key("u", "d", request(temperature=0)),
        answer_key("t", "e", request(temperature=0)),
        answer_key("t", "d", request(temperature=0, model="n")),
        answer_key("t", "d", request(temperature=0, stream=True)),
        answer_key("t", "d", request(temperature=0, seed=1)),
        answer_key("t", "d", request(temperature=0, max_tokens=1)),
        answer_key("t", "d", request(temperature=0, longshore={"continue_from": {"token_ids": [1]}})),
    ]
    assert len({base, *others}) == 1 + len(others)


def test_deterministic() -> None:
    assert is_deterministic(request(temperature=0))
    assert is_deterministic(request(seed=0))
    assert not is_deterministic(request())


@given(st.text())
def test_replay_changes_the_slots_and_no_text(text: str) -> None:
    report = {"request_id": "a" * 32, "served_by": "core", "node": "n", "model_digest": "d" * 32, "hops": [1]}
    call = Call(request(), Client("t"), "f" * 32, 0.0)
    whole = {"id": "chatcmpl-" + "a" * 32, "choices": [{"message": {"content": text}}], "longshore": report}
    form = stored.store_whole(encode_data(whole).removeprefix(b"data: "))
    assert form is not None
    body = load_json(stored.replay(form, call, "node", 'why "so"', {"tier": "edge"}))
    assert body["choices"] == whole["choices"]
    assert body["id"] == "chatcmpl-" + "f" * 32
    assert body["longshore"]["hops"] == [{"tier": "edge"}]
    assert (body["longshore"]["reason"], body["longshore"]["cached"]) == ('why "so"', True)

    call = Call(request(), Client("t"), "a" * 32, 0.0)
    chunk = {"id": "chatcmpl-" + "a" * 32, "choices": [{"delta": {"content": text}}]}
    blocks = [
        encode_data(chunk),
        b": keepalive\n\n",
        encode_data(chunk | {"longshore": {"report": report}}),
        DONE,
    ]
    made = stored.store_stream(blocks, call)
    assert made is not None and made[1] == "d" * 32
    again = stored.replay(made[0], Call(request(), Client("t"), "f" * 32, 0.0), "node", "w", {}).decode()
    frames = again.split("\n\n")
    assert load_json(frames[0].removeprefix("data: ")) == chunk | {"id": "chatcmpl-" + "f" * 32}
    assert frames[2] == "data: [DONE]"


def test_answers_without_a_report_are_not_stored() -> None:
    assert stored.store_whole(b'{"id":"x","choices":[]}') is None
    assert stored.store_stream([DONE], Call(request(), Client("t"), "a" * 32, 0.0)) is None


async def test_single_flight_lets_one_in_and_survives_cancelled_waiters() -> None:
    flights, inside, most = SingleFlight(), 0, 0

    async def fly() -> None:
        nonlocal inside, most
        async with flights.turn(b"k"):
            inside += 1
            most = max(most, inside)
            try:
                await asyncio.sleep(0)
            finally:
                inside -= 1

    tasks = [asyncio.create_task(fly()) for _ in range(20)]
    await asyncio.sleep(0)
    for task in tasks[::3]:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert most == 1
    assert len(flights) == 0


def test_keys_are_remembered_for_the_very_request_and_hold_nothing() -> None:
    memo = KeyMemo(max_entries=2)
    for seed in range(50):  # identities are used again as requests go
        asked = request(seed=seed)
        assert memo.key_of("t", "d", asked) == memo.key_of("t", "d", asked) == answer_key("t", "d", asked)
        assert memo.key_of("u", "d", asked) != memo.key_of("t", "d", asked)
    gone = weakref.ref(asked)
    del asked
    assert gone() is None
