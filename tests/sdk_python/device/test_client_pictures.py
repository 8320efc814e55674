"""A client whose device sees: pictures stay on it where they must, and move between tiers where they may."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from longshore import AsyncClient, Client
from longshore.config import HttpSettings, RoutingSettings
from longshore.device import DeviceSettings, Student
from longshore.errors import EngineFailedError
from longshore.wire import Report
from sdk_python.tier_server import Behaviour, TierServer

SETTINGS = DeviceSettings(calibration_s=0.0, image_budget_ms=60_000)
ARGUMENTS: dict[str, Any] = {
    "api_key": "key",
    "http": HttpSettings(trust_env=False),
    "routing": RoutingSettings(backoff_base_s=0.01, backoff_cap_s=0.02),
}


def ask(seed: int = 1, **fields: Any) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    picture = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).resize((200, 100))
    content = [{"type": "text", "text": "Look:"}, {"type": "image", "image": picture}]
    return {
        "model": "shop",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 8,
        "ignore_eos": True,
        "temperature": 0,
        **fields,
    }


@pytest.fixture(scope="module")
def seeing(vision_dir: Path) -> Iterator[Student]:
    with Student(vision_dir, settings=SETTINGS) as running:
        yield running


def report_of(answer: Any) -> Report:
    assert answer.longshore is not None
    report: Report = answer.longshore
    return report


def loaded(client: Client | AsyncClient) -> None:
    end_s = time.monotonic() + 30
    while client.measurements()[-1].prefill_tokens_per_s is None and time.monotonic() < end_s:
        time.sleep(0.005)


def test_a_private_picture_never_leaves_the_device(seeing: Student) -> None:
    with TierServer() as edge, Client(edge_url=edge.url, device=seeing, **ARGUMENTS) as client:
        answer = client.chat.completions.create(**ask(), privacy="device-only")
        streamed = list(client.chat.completions.create(**ask(), privacy="device-only", stream=True))
    report = report_of(answer)
    assert report.served_by == "device" and edge.seen == []
    [use] = report.images
    assert (use.width_px, use.num_tokens, use.why) == (96, 36, "full")
    text = "".join(choice.delta.content or "" for chunk in streamed for choice in chunk.choices)
    assert text == answer.choices[0].message.content


def test_a_failing_edge_leaves_the_picture_to_the_device(seeing: Student) -> None:
    failing = Behaviour(status=500, error=EngineFailedError("broke"))
    with TierServer(failing) as edge, Client(edge_url=edge.url, device=seeing, **ARGUMENTS) as client:
        loaded(client)
        report = report_of(client.chat.completions.create(**ask(), ttft_target_ms=10_000))
    assert report.served_by == "device" and report.images
    assert [attempt.outcome for attempt in report.attempts] == ["failed", "served"]
    assert edge.seen[0].body["messages"][0]["content"][1]["type"] == "image_url"


def test_a_device_without_eyes_is_passed_over(student: Student) -> None:
    with TierServer() as edge, Client(edge_url=edge.url, device=student, **ARGUMENTS) as client:
        loaded(client)
        report = report_of(client.chat.completions.create(**ask(), mode="prefer-device"))
    assert ("device", "skipped", "takes no images") in [
        (attempt.tier, attempt.outcome, attempt.reason) for attempt in report.attempts
    ]
    assert len(edge.seen) == 1


def test_a_picture_that_the_device_refuses_is_asked_elsewhere(seeing: Student) -> None:
    """63 pictures do not fit its context; the edge's model may have a longer one."""
    text, picture = ask()["messages"][0]["content"]
    content = [text | {"text": "Which of them? " * 5}] + [picture] * 63
    request = ask() | {"messages": [{"role": "user", "content": content}]}
    with TierServer() as edge, Client(edge_url=edge.url, device=seeing, **ARGUMENTS) as client:
        loaded(client)
        report = report_of(client.chat.completions.create(**request, mode="prefer-device"))
    assert report.served_by == "core" and len(edge.seen) == 1


def test_encoding_counts_in_what_is_predicted(seeing: Student) -> None:
    with Client(device=seeing, **ARGUMENTS) as client:
        loaded(client)
        [view] = client.measurements()
        assert view.takes_images and 0 < view.image_ms < 60_000
        [card] = client.models.list().data
        assert card.input_modalities == ("text", "image")


async def test_async_pictures(seeing: Student) -> None:
    async with AsyncClient(device=seeing, **ARGUMENTS) as client:
        answer = await client.chat.completions.create(**ask(2), mode="device-only")
    assert report_of(answer).images and answer.usage is not None and answer.usage.prompt_tokens > 36
