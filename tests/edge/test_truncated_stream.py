"""A stream that is cut, ends early or fails is never reported as a whole answer."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import aiohttp
import pytest

from edge.harness import CoreProcess, ask, chat, stream, text_of


@pytest.mark.parametrize(
    ("orders", "code"),
    [
        ({"cut_after": 3}, "answer_interrupted"),
        ({"end_after": 3}, "answer_interrupted"),
        ({"done_after": 3}, "answer_interrupted"),
        ({"error_after": 3}, "engine_failed"),
    ],
    ids=["cut", "early end", "false done", "error event"],
)
async def test_interrupted(session: aiohttp.ClientSession, core: CoreProcess, orders: Any, code: str) -> None:
    events = await stream(session, chat(orders=orders | {"tokens": 8}))
    assert text_of(events) == "w0 w1 w2 "
    assert not any(event.is_done for event in events)
    assert events[-1].event == "error"
    error = json.loads(events[-1].data)["error"]
    assert (error["code"], error["tokens_delivered"]) == (code, 3)
    assert (await ask(session, chat()))[0] == 200


async def test_one_choice_of_two_is_not_enough(session: aiohttp.ClientSession) -> None:
    events = await stream(session, chat(n=2, orders={"tokens": 2, "done_after": 3}))
    assert events[-1].event == "error"


async def test_interrupted_answers_are_not_cached(session: aiohttp.ClientSession, core: CoreProcess) -> None:
    request = chat(temperature=0, seed=77)
    await core.set(cut_after=2)
    assert (await stream(session, request))[-1].event == "error"
    await core.set()
    events = await stream(session, request)
    assert events[-1].is_done
    assert text_of(events) == "w0 w1 w2 w3 "


async def test_a_whole_answer_that_is_none(session: aiohttp.ClientSession) -> None:
    status, body, _ = await ask(session, chat(orders={"garbage": True}))
    assert status == 503
    assert "not JSON" in body["error"]["message"]


async def test_many_at_once_each_whole_or_a_typed_error(session: aiohttp.ClientSession) -> None:
    """Failures of some answers touch no other one, and none of them passes for whole."""
    rng = random.Random(5)
    kinds = ["cut_after", "end_after", "done_after", "error_after", None]

    async def one(number: int) -> None:
        kind, place = kinds[number % len(kinds)], rng.randrange(1, 12)
        orders = {"tokens": 12, "gap_s": 0.002} | ({kind: place} if kind else {})
        events = await stream(session, chat(orders=orders))
        num_whole = 12 if kind is None else place
        assert text_of(events) == "".join(f"w{offset} " for offset in range(num_whole))
        assert events[-1].is_done if kind is None else events[-1].event == "error"
        assert sum(event.is_done for event in events) == (kind is None)

    await asyncio.gather(*(one(number) for number in range(60)))
