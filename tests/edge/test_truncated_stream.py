"""A stream that is cut, ends early or fails is never reported as a whole answer."""

from __future__ import annotations

import json
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
