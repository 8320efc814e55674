"""A core whose model lies on two processes: right answers, and nothing lost or left when one of them dies."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random
from typing import Any

import psutil
import pytest

from core_processes import wait_until
from longshore.sse import SseDecoder
from longshore.tier_process import TierProcess
from shop.chat import messages
from shop.question import make_question
from shop.sheet import make_sheet

KEY = "a-key"
ENVIRONMENT = {"LONGSHORE_API_KEY": KEY, "OMP_NUM_THREADS": "1"}
TEACHER = Path(__file__).parents[2] / "examples" / "models" / "shop-teacher"
SERVE = [
    "serve",
    "--model",
    str(TEACHER),
    "--port",
    "0",
    "--set",
    "batch_invariant=true",
    "--tensor-parallel-size",
]
NUM_TOKENS = 200
NOTICE_TIMEOUT_S = 5.0  # it takes 20 milliseconds where nothing else runs
RESTART_TIMEOUT_S = 200.0


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TierProcess]:
    folder = tmp_path_factory.mktemp("t")  # a killed supervisor cannot remove its private folder
    with TierProcess([*SERVE, "2"], environment=ENVIRONMENT | {"TMPDIR": str(folder)}) as process:
        yield process


class Answer:
    """A streamed answer of NUM_TOKENS tokens, read in a thread of its own."""

    def __init__(self, url: str) -> None:
        self.tokens: list[int] = []
        self.is_done = False
        self._thread = threading.Thread(target=self._read, args=(url,), daemon=True)
        self._thread.start()

    def wait(self) -> Answer:
        self._thread.join(RESTART_TIMEOUT_S)
        assert self.is_done, "the answer did not end well"
        return self

    def _read(self, url: str) -> None:
        body = {"messages": [{"role": "user", "content": "Tell me of the sea."}], "max_tokens": NUM_TOKENS}
        decoder = SseDecoder()
        with posted(url, body | {"ignore_eos": True, "stream": True, "seed": 4}) as response:
            while data := response.read1(65536):
                for event in decoder.feed(data):
                    self._take(event.data)

    def _take(self, data: str) -> None:
        if data == "[DONE]":
            self.is_done = True
        elif mark := json.loads(data).get("longshore", {}).get("mark"):
            self.tokens.append(mark["token_id"])


@contextmanager
def posted(url: str, body: dict[str, Any]) -> Iterator[http.client.HTTPResponse]:
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=RESTART_TIMEOUT_S)
    headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
    connection.request("POST", "/v1/chat/completions", json.dumps(body | {"model": TEACHER.name}), headers)
    try:
        yield connection.getresponse()
    finally:
        connection.close()


def children(core: TierProcess, module: str = "longshore_server") -> list[psutil.Process]:
    found = []
    for child in psutil.Process(core.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if any(module in part for part in child.cmdline()):
                found.append(child)
    return found


def are_gone(processes: list[psutil.Process]) -> bool:
    return not any(process.is_running() and process.status() != "zombie" for process in processes)


def test_shop_questions_are_answered_right(core: TierProcess) -> None:
    chance = Random(5)
    assert len(children(core, "native.ranks.process")) == 1
    num_right = 0
    for _ in range(6):
        sheet = make_sheet(chance, 3, "heldout")
        question = make_question(chance, sheet, "price")
        with posted(core.url, {"messages": messages(sheet, question), "temperature": 0}) as response:
            answer = json.load(response)
        num_right += question.is_correct(answer["choices"][0]["message"]["content"])
    assert num_right >= 5


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_answer_goes_on_byte_for_byte_when_a_rank_dies(core: TierProcess) -> None:
    whole = Answer(core.url).wait()
    cut = Answer(core.url)
    wait_until(lambda: len(cut.tokens) > 20)
    before = [*children(core, "engine_process"), *children(core, "native.ranks.process")]
    assert len(before) == 2
    before[1].kill()
    wait_until(lambda: are_gone(before), timeout_s=NOTICE_TIMEOUT_S)
    assert cut.wait().tokens == whole.tokens
    assert len(whole.tokens) == NUM_TOKENS


@pytest.mark.slow
def test_no_process_outlives_a_killed_supervisor_not_even_a_stopped_rank(core: TierProcess) -> None:
    everything = children(core)
    (rank,) = children(core, "native.ranks.process")
    rank.suspend()
    os.kill(core.pid, signal.SIGKILL)
    wait_until(lambda: are_gone(everything), timeout_s=NOTICE_TIMEOUT_S)


@pytest.mark.slow
def test_heads_that_do_not_divide_stop_the_start_with_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "longshore.cli", *SERVE, "4"],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "tensor_parallel_size: 4 does not divide the model's 6 attention heads" in done.stderr
