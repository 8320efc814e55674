"""The edge's own student, a real model of random weights: last resort, quick answer, its name, its bounds."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from edge.harness import (
    CoreProcess,
    ask,
    chat,
    edge_toml,
    eventually,
    report_of,
    session_to,
    start_core,
    start_edge,
    stream,
)
from longshore.bundle import SigningKey, TrustStore, save_trust, write_manifest
from longshore.signing import PrivateKey
from longshore.tier_process import TierProcess
from longshore.wire import Report, decode
from longshore_export.bundle import export_student
from tiny_models import config_of, write_model
from vision_bundle import make_vision_bundle

OPERATOR = SigningKey("ops", PrivateKey.generate())


@pytest.fixture(scope="module")
def bundle_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = write_model(tmp_path_factory.mktemp("model") / "tiny-student", config_of("llama-tied"), seed=1)
    exported = export_student(model, tmp_path_factory.mktemp("exported") / "tiny-student").path
    out = tmp_path_factory.mktemp("bundle") / "tiny-student"
    write_manifest(out, make_vision_bundle(exported, out), OPERATOR)
    return out


@pytest.fixture(scope="module")
def far() -> Iterator[CoreProcess]:
    with start_core("far") as process:
        yield process


@pytest.fixture(scope="module")
def edge_with_student(
    far: CoreProcess, bundle_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TierProcess]:
    folder = tmp_path_factory.mktemp("edge")
    save_trust(folder / "trust.json", TrustStore().with_key(OPERATOR.public))
    extra = f'student_bundle = "{bundle_dir}"\nstudent_trust = "{folder}/trust.json"\n'
    extra += "student_max_waiting = 1\nfailure_threshold = 2"
    with start_edge(folder, edge_toml([far], extra)) as process:
        asyncio.run(_wait_for_student(process))
        yield process


async def _wait_for_student(edge: TierProcess) -> None:
    async with session_to(edge) as session:

        async def answers() -> bool:
            return (await ask(session, chat(model="tiny-student", max_tokens=1)))[0] == 200

        await eventually(answers, within_s=20)


async def test_listed_and_asked_by_its_own_name(edge_with_student: TierProcess) -> None:
    async with session_to(edge_with_student) as session:
        async with session.get("/v1/models") as response:
            assert {card["id"] for card in (await response.json())["data"]} == {"shop", "tiny-student"}
        _, body, _ = await ask(session, chat(model="tiny-student", max_tokens=3, temperature=0))
    report = decode(Report, body["longshore"])
    assert (report.served_by, report.node, report.degraded) == ("edge", "edge-1", False)
    assert [(hop.tier, hop.node) for hop in report.hops] == [("edge", "edge-1")]
    assert body["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize("is_stream", [False, True], ids=["whole", "stream"])
async def test_last_resort(edge_with_student: TierProcess, far: CoreProcess, is_stream: bool) -> None:
    await far.set(status=503)
    try:
        async with session_to(edge_with_student) as session:
            request = chat(max_tokens=5, temperature=0)
            if is_stream:
                events = await stream(session, request)
                assert events[-1].is_done
                report = decode(Report, report_of(events))
            else:
                status, body, _ = await ask(session, request)
                assert status == 200
                report = decode(Report, body["longshore"])
    finally:
        await far.set()
    assert (report.served_by, report.degraded, report.cached) == ("edge", True, False)
    assert [attempt.outcome for attempt in report.attempts] in (["failed", "served"], ["skipped", "served"])
    assert "far" in report.reason or "no core" in report.reason


def picture(colour: tuple[int, int, int]) -> list[dict[str, Any]]:
    """Messages that show a picture of one colour."""
    out = io.BytesIO()
    Image.new("RGB", (40, 30), colour).save(out, "PNG")
    url = "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]


async def test_a_student_that_sees_is_shown_pictures(
    edge_with_student: TierProcess, far: CoreProcess
) -> None:
    """By its own name, when the core fails, and when no core sees."""
    red, blue = picture((250, 10, 10)), picture((10, 10, 250))
    async with session_to(edge_with_student) as session:
        async with session.get("/v1/models/tiny-student") as response:
            assert (await response.json())["input_modalities"] == ["text", "image"]
        greedy = {"temperature": 0, "max_tokens": 6, "ignore_eos": True}
        answers = []
        for shown in (red, blue, red):
            status, body, _ = await ask(session, {"model": "tiny-student", "messages": shown, **greedy})
            assert status == 200, body
            answers.append(body["choices"][0]["message"]["content"])
            assert [use["num_tokens"] for use in body["longshore"]["images"]] == [16]
        assert answers[0] == answers[2] != answers[1]

        asked = {"model": "shop", "messages": red, "max_tokens": 6}  # drawn, so that no cache answers
        for settings in ({"status": 503}, {"modalities": ["text"]}):
            await far.set(**settings)

            async def is_students() -> bool:
                _, body, _ = await ask(session, asked)
                return (body.get("longshore") or {}).get("served_by") == "edge"

            await eventually(is_students, within_s=10)
            await far.set()
            await eventually(lambda: _core_is_back(session), within_s=10)
    assert (await far.log(clear=True))[-1]["body"]["messages"] != red


async def test_a_core_that_would_miss_the_target(edge_with_student: TierProcess, far: CoreProcess) -> None:
    async with session_to(edge_with_student) as session:
        await eventually(lambda: _core_is_back(session), within_s=10)
        await ask(session, chat(orders={"keepalive_first": True}, stream=False))
        await stream(session, chat(orders={"wait_s": 1.5}))  # measured: far is slow
        status, body, _ = await ask(session, chat(max_tokens=3, longshore={"ttft_target_ms": 200}))
        assert status == 200
        report = decode(Report, body["longshore"])
        assert (report.served_by, report.degraded) == ("edge", True)
        assert "ms > target 200 ms; student" in report.reason
        assert [attempt.outcome for attempt in report.attempts] == ["skipped", "served"]
        _, body, _ = await ask(session, chat(longshore={"ttft_target_ms": 60_000}))
        assert body["longshore"]["served_by"] == "core"
        _, body, _ = await ask(session, chat())
        assert body["longshore"]["served_by"] == "core"


async def _core_is_back(session) -> bool:
    _, body, _ = await ask(session, chat(max_tokens=1))
    return body["longshore"]["served_by"] == "core"


async def test_requests_at_fault_do_not_fall_back(edge_with_student: TierProcess, far: CoreProcess) -> None:
    async with session_to(edge_with_student) as session:
        await eventually(lambda: _core_is_back(session), within_s=10)
        status, _, _ = await ask(session, chat(orders={"status": 400}))
        assert status == 400


async def test_the_line_before_it_is_bounded(edge_with_student: TierProcess) -> None:
    async with session_to(edge_with_student) as session:
        request = chat(model="tiny-student", max_tokens=60, ignore_eos=True)
        replies = await asyncio.gather(*(ask(session, request) for _ in range(6)))
        statuses = [status for status, _, _ in replies]
        assert statuses.count(200) >= 2 and statuses.count(429) >= 1
        assert set(statuses) == {200, 429}
        assert (await ask(session, request))[0] == 200


async def test_a_core_killed_before_it_answers(bundle_dir: Path, tmp_path: Path) -> None:
    with start_core("doomed") as doomed:
        toml = edge_toml([doomed], f'student_bundle = "{bundle_dir}"')
        with start_edge(tmp_path, toml) as edge:
            await _wait_for_student(edge)
            doomed.kill()
            async with session_to(edge) as session:
                events = await stream(session, chat(max_tokens=3))
                assert events[-1].is_done
                assert report_of(events)["served_by"] == "edge"
                chunk = json.loads(events[0].data)
                assert chunk["model"] == "tiny-student"
