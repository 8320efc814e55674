"""One question all the way from the SDK through the edge to the core and back, on the trained models."""

from __future__ import annotations

import itertools
from pathlib import Path
from random import Random

import pytest

from demo.questions import Case, case, cases
from demo.tiers import MODEL_NAME, Keys
from longshore import AsyncClient, Client
from longshore.tier_process import TierProcess

NUM_QUESTIONS = 10


def some_cases(seed: int) -> list[Case]:
    return list(itertools.islice(cases(Random(seed)), NUM_QUESTIONS))


def answer(client: Client, asked: Case, **options: object) -> tuple[str, object]:
    completion = client.chat.completions.create(
        model=MODEL_NAME, messages=asked.messages, temperature=0, **options
    )
    return completion.choices[0].message.content or "", completion.longshore


def test_core_answers_through_the_edge(edge: TierProcess, keys: Keys) -> None:
    with Client(edge_url=edge.url, api_key=keys.api_key, ttft_target_ms=30_000) as client:
        answers = [(asked, *answer(client, asked)) for asked in some_cases(1)]
    assert sum(asked.is_correct(text) for asked, text, _ in answers) >= NUM_QUESTIONS - 1
    for _, _, report in answers:
        assert report.served_by == "core"
        assert [hop.tier for hop in report.hops] == ["device", "edge", "core"] or {
            hop.tier for hop in report.hops
        } >= {"edge", "core"}
        assert report.attempts[-1].outcome == "served"


def test_stream_and_whole_answer_agree(core: TierProcess, keys: Keys) -> None:
    asked = case(Random(2), "list", 5)
    with Client(core_url=core.url, api_key=keys.api_key) as client:
        whole, _ = answer(client, asked)
        stream = client.chat.completions.create(
            model=MODEL_NAME, messages=asked.messages, temperature=0, stream=True
        )
        with stream:
            pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert len(pieces) > 40
    assert "".join(pieces) == whole
    assert asked.is_correct(whole)


def test_device_answers_alone(bundle: Path) -> None:
    with Client(device=bundle, mode="device-only") as client:
        answers = [(asked, *answer(client, asked)) for asked in some_cases(3)]
    assert sum(asked.is_correct(text) for asked, text, _ in answers) >= NUM_QUESTIONS - 3
    assert {report.served_by for _, _, report in answers} == {"device"}


@pytest.mark.parametrize("privacy", ["device-only"])
def test_private_request_never_leaves_the_device(
    edge: TierProcess, keys: Keys, bundle: Path, privacy: str
) -> None:
    asked = case(Random(4), "price", 3)
    with Client(edge_url=edge.url, api_key=keys.api_key, device=bundle, mode="prefer-core") as client:
        _, report = answer(client, asked, privacy=privacy)
    assert report.served_by == "device"
    assert {hop.tier for hop in report.hops} <= {"device"}


async def test_many_at_once(edge: TierProcess, keys: Keys) -> None:
    import asyncio

    async with AsyncClient(edge_url=edge.url, api_key=keys.api_key, ttft_target_ms=30_000) as client:

        async def one(asked: Case) -> bool:
            completion = await client.chat.completions.create(
                model=MODEL_NAME, messages=asked.messages, temperature=0
            )
            return asked.is_correct(completion.choices[0].message.content or "")

        right = await asyncio.gather(*(one(asked) for asked in some_cases(5)))
    assert sum(right) >= NUM_QUESTIONS - 1
