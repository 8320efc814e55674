"""The Android example's core on a JDK: the golden vectors; downloads, keys and fallback on a real edge."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from clients.conftest import API_KEY, KEY, KEY_ID, NEXT_KEY, NEXT_KEY_ID, STUDENT, Chat, Harbour
from clients.test_golden import GOLDEN, load
from longshore.wire import Manifest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

TRUST = {"keys": [{"key_id": KEY_ID, "public_key": KEY.public_key.text}]}


def test_kotlin_reproduces_them(kotlin_core: list[str]) -> None:
    command = [*kotlin_core, "longshore.core.GoldenVectorsKt", str(GOLDEN), str(STUDENT / "tokenizer.json")]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    for name in (
        "tokenizer",
        "template",
        "pictures",
        "bundles",
        "runtimes",
        "rotations",
        "signatures",
        "buckets",
        "downloads",
        "answers",
    ):
        assert f"{name}: {len(load(name)['cases'])} cases" in ran.stdout
    assert ran.stdout.endswith("0 failed\n")


class Phone:
    """The core in a process of its own; what it stores lies in `store`."""

    def __init__(self, process: subprocess.Popen[str], edge_url: str, store: Path) -> None:
        self._process, self._edge_url, self.store = process, edge_url, store

    def act(self, do: str, bundle: str, **fields: Any) -> dict[str, Any]:
        common = {"do": do, "bundle": bundle, "edge": self._edge_url, "key": API_KEY, "trust": TRUST}
        job = common | {"store": str(self.store), "now_s": int(time.time())} | fields
        assert self._process.stdin and self._process.stdout
        print(json.dumps(job), file=self._process.stdin, flush=True)
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer


@pytest.fixture(scope="module")
def process(kotlin_core: list[str]) -> Iterator[subprocess.Popen[str]]:
    pipe = subprocess.PIPE
    command = [*kotlin_core, "longshore.core.EdgeTrialKt"]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as running:
        yield running
        running.kill()


@pytest.fixture
def phone(process: subprocess.Popen[str], harbour: Harbour, tmp_path: Path) -> Phone:
    return Phone(process, harbour.edge_url, tmp_path / "bundles")


def test_a_download_goes_on_where_it_stopped(phone: Phone, bundle: tuple[Path, Manifest]) -> None:
    (model,) = (file for file in bundle[1].files if file.path == "model.onnx")
    assert model.chunk_bytes is not None and model.size_bytes > 2 * model.chunk_bytes
    part = phone.store / "shop-student" / "1" / "model.onnx.part"
    part.parent.mkdir(parents=True)
    part.write_bytes((bundle[0] / "model.onnx").read_bytes()[: model.chunk_bytes + 5000])
    done = phone.act("update", "shop-student")
    assert (done["version"], done["key_id"]) == (1, KEY_ID)
    assert done["progress"][0] > model.chunk_bytes
    for file in bundle[1].files:
        installed = phone.store / "shop-student" / "1" / file.path
        assert installed.read_bytes() == (bundle[0] / file.path).read_bytes()
    assert phone.act("update", "shop-student")["progress"] == []  # nothing is fetched twice


def test_what_is_not_to_be_trusted_is_refused(phone: Phone) -> None:
    no_key = phone.act("update", "shop-student", trust={"keys": []})
    revoked = phone.act("update", "shop-student", trust=TRUST | {"revoked": [KEY_ID]})
    late = TRUST["keys"][0] | {"expires_at": 1_600_000_000}
    expired = phone.act("update", "shop-student", trust={"keys": [late]})
    other = phone.act(
        "update", "shop-student", trust={"keys": [late | {"public_key": NEXT_KEY.public_key.text}]}
    )
    assert [no_key, revoked, expired, other] == [{"error": "bundle_invalid"}] * 4
    assert phone.act("update", "nowhere") == {"error": "not_found"}
    assert phone.act("update", "shop-student", runtime="1.23.9") == {"error": "bundle_incompatible"}
    assert phone.act("update", "shop-student", key="wrong") == {"error": "invalid_api_key"}
    assert phone.act("current", "shop-student") == {"version": None}
    (phone.store / "shop-student").mkdir(parents=True, exist_ok=True)
    (phone.store / "shop-student" / "highest").write_text("2 " + "0" * 64)
    assert phone.act("update", "shop-student") == {"error": "bundle_rollback"}


def test_a_new_key_is_learnt_from_the_old_one_and_kept(phone: Phone) -> None:
    assert phone.act("update", "bare") == {"error": "bundle_invalid"}
    assert phone.act("update", "next")["key_id"] == NEXT_KEY_ID
    assert phone.act("update", "bare")["key_id"] == NEXT_KEY_ID  # each action opens the store anew
    revoked = TRUST | {"revoked": [KEY_ID]}
    assert phone.act("current", "bare") == {"version": 1}
    assert phone.act("current", "bare", trust=revoked) == {"version": None}


@pytest.mark.parametrize("num_said", [0, 1, 5])
def test_an_answer_that_breaks_off_is_gone_on_with_by_the_edge(
    phone: Phone, chats: list[Chat], num_said: int
) -> None:
    phone.act("update", "shop-student")
    case = load("answers")["cases"][0]
    assert case["messages"] == chats[0]
    answer = phone.act("ask", "shop-student", messages=chats[0], ids=case["ids"][:num_said])
    assert answer["text"] == answer["said"] == case["text"]
    assert (answer["by"], answer["why"]) == ("edge", "device_failed")
    kept_here = phone.act("ask", "shop-student", messages=chats[0], ids=case["ids"][:num_said], private=True)
    assert kept_here == {"error": "device_failed"}
