"""`longshore serve` as real processes: what starts, what a death costs, what a stop leaves behind."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from core_processes import tiny_model_folder, wait_until
from longshore.sse import SseDecoder
from longshore.tier_process import TierProcess

KEY = "a-key"
# On torch alone an answer lasts long enough to be broken into.
SETTINGS = ["--set", "batch_invariant=true", "--set", "fuse_layers=false"]
ENVIRONMENT = {"LONGSHORE_API_KEY": KEY, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("supervisor") / "tiny")


def serve(model: Path, *flags: str, **environment: str) -> TierProcess:
    arguments = ["serve", "--model", str(model), "--load-format", "random", "--port", "0", *flags]
    return TierProcess([*arguments, *SETTINGS], environment=ENVIRONMENT | environment)


@pytest.fixture(scope="module")
def core(model: Path) -> Iterator[TierProcess]:
    with serve(model, "--workers", "2", "--alias", "other-name") as process:
        yield process


class Answer:
    """One streamed chat answer, read in a thread of its own."""

    def __init__(self, url: str, **fields: Any) -> None:
        self.tokens: list[int] = []
        self.text = ""
        self.finish_reason: str | None = None
        self.is_done = False
        self.report: dict[str, Any] = {"resumed": False}  # the wire leaves out what is false
        self.error: dict[str, Any] | None = None
        body = {
            "model": "tiny",
            "messages": [{"role": "user", "content": "Tell me of the sea."}],
            "max_tokens": 600,
            "ignore_eos": True,
            "stream": True,
        }
        self._thread = threading.Thread(target=self._read, args=(url, body | fields), daemon=True)
        self._thread.start()

    def wait(self, timeout_s: float = 60.0) -> Answer:
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), "the answer did not end"
        return self

    def _read(self, url: str, body: dict[str, Any]) -> None:
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
        headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
        try:
            connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
            response = connection.getresponse()
            decoder = SseDecoder()
            while data := response.read1(65536):
                for event in decoder.feed(data):
                    self._take(event)
        except (OSError, http.client.HTTPException) as error:
            self.error = {"code": type(error).__name__}
        finally:
            connection.close()

    def _take(self, event: Any) -> None:
        if event.data == "[DONE]":
            self.is_done = True
            return
        chunk = json.loads(event.data)
        if "error" in chunk:
            self.error = chunk["error"]
            return
        for choice in chunk["choices"]:
            self.text += choice["delta"].get("content") or ""
            self.finish_reason = choice["finish_reason"] or self.finish_reason
        self.report |= chunk.get("longshore", {}).get("report", {})
        if mark := chunk.get("longshore", {}).get("mark"):
            self.tokens.append(mark["token_id"])


def children(process: TierProcess, module: str = "longshore_server") -> list[psutil.Process]:
    """The live processes under the supervisor that run a module of this name."""
    found = []
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):  # a zombie counts as gone
                if any(module in part for part in child.cmdline()):
                    found.append(child)
    return found


def is_ready(url: str) -> bool:
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=5)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def are_gone(processes: list[psutil.Process]) -> bool:
    return not any(process.is_running() and process.status() != "zombie" for process in processes)


# -- a running core ----------------------------------------------------------------------------


def test_a_core_that_says_ready_is_ready(core: TierProcess) -> None:
    assert is_ready(core.url)
    assert len(children(core, "engine_process")) == 1
    assert len(children(core, "http_worker")) == 2
    answer = Answer(core.url, max_tokens=5, model="other-name").wait()
    assert (len(answer.tokens), answer.finish_reason, answer.is_done) == (5, "length", True)


def test_no_secret_stands_on_a_command_line(core: TierProcess) -> None:
    for child in children(core):
        assert "key_sha256" not in " ".join(child.cmdline())
    command = children(core, "engine_process")[0].cmdline()
    folder = Path(command[command.index("--socket") + 1]).parent
    assert os.stat(folder).st_mode & 0o777 == 0o700


@pytest.mark.slow
def test_answers_go_on_byte_for_byte_when_the_engine_is_killed(core: TierProcess) -> None:
    kinds: list[dict[str, Any]] = [{"temperature": 0}, {"temperature": 1, "seed": 11, "top_p": 0.9}]
    whole = [Answer(core.url, **kind).wait() for kind in kinds]
    cut = [Answer(core.url, **kind) for kind in kinds]
    wait_until(lambda: min(len(answer.tokens) for answer in cut) >= 40)
    (engine,) = children(core, "engine_process")
    engine.kill()
    wait_until(lambda: not is_ready(core.url), timeout_s=1.0)
    for answer, undisturbed in zip(cut, whole, strict=True):
        answer.wait()
        assert answer.error is None
        assert answer.tokens == undisturbed.tokens
        assert (answer.text, answer.finish_reason) == (undisturbed.text, "length")
        assert answer.is_done
        assert (undisturbed.report["resumed"], answer.report["resumed"]) == (False, True)
    assert len(whole[0].tokens) == 600
    assert children(core, "engine_process") != [engine]


@pytest.mark.slow
def test_a_worker_that_is_killed_is_replaced_and_the_others_go_on(core: TierProcess) -> None:
    wait_until(lambda: is_ready(core.url))
    before = children(core, "http_worker")
    before[0].kill()
    for _ in range(10):
        assert Answer(core.url, max_tokens=3).wait().is_done
    wait_until(lambda: len(set(children(core, "http_worker")) - {before[0]}) == 2)
    assert before[1] in children(core, "http_worker")


# -- stopping ----------------------------------------------------------------------------------


@contextmanager
def started(model: Path, *flags: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A core in a process group of its own, and its URL."""
    command = [sys.executable, "-m", "longshore.cli", "serve", "--model", str(model), "--port", "0"]
    process = subprocess.Popen(
        [*command, "--load-format", "random", *SETTINGS, *flags],
        env=os.environ | ENVIRONMENT | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("longshore core ready on http://127.0.0.1:"), line
        yield process, line.split()[-1]
    finally:
        process.kill()
        process.communicate(timeout=10)


@pytest.mark.slow
def test_a_stop_lets_answers_finish_and_leaves_nothing(model: Path) -> None:
    folder = Path(tempfile.mkdtemp(prefix="ls-"))
    with started(model, TMPDIR=str(folder)) as (process, url):
        assert len(list(folder.glob("longshore-*"))) == 1
        answer = Answer(url)
        wait_until(lambda: len(answer.tokens) > 5)
        everything = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        wait_until(lambda: not is_ready(url), timeout_s=2)  # nothing new is taken
        out, err = process.communicate(timeout=20)
        assert (process.returncode, out, err) == (0, "", "")
        answer.wait(1)
        assert (len(answer.tokens), answer.is_done) == (600, True)
        assert are_gone(everything)
    assert not list(folder.glob("longshore-*"))
    shutil.rmtree(folder)  # torch keeps a cache there


@pytest.mark.slow
def test_a_drain_has_an_end_and_ctrl_c_is_a_stop(model: Path) -> None:
    with started(model, "--drain-timeout-s", "0.5") as (process, url):
        answers = [Answer(url, max_tokens=1000) for _ in range(8)]
        wait_until(lambda: all(answer.tokens for answer in answers))
        everything = psutil.Process(process.pid).children(recursive=True)
        asked_s = time.monotonic()
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them at once
        out, err = process.communicate(timeout=10)
        assert time.monotonic() - asked_s < 6
        assert (process.returncode, out) == (0, "")
        assert "Traceback" not in err
        assert are_gone(everything)
        for answer in answers:
            assert not answer.wait(5).is_done  # cut off, and not told that it was whole


@pytest.mark.slow
def test_a_killed_supervisor_takes_its_children_along(model: Path) -> None:
    # It can't remove its private folder any more, so that stands in a folder of the test's.
    with tempfile.TemporaryDirectory() as folder, serve(model, TMPDIR=folder) as core:
        everything = children(core)
        assert len(everything) == 2
        os.kill(core.pid, signal.SIGKILL)
        wait_until(lambda: are_gone(everything), timeout_s=2)


@pytest.mark.slow
def test_an_engine_that_keeps_dying_ends_the_core_with_a_line(model: Path) -> None:
    with serve(model, "--set", "engine_max_restarts=1") as core:
        (first,) = children(core, "engine_process")
        first.kill()
        wait_until(lambda: children(core, "engine_process") not in ([], [first]))
        (second,) = children(core, "engine_process")
        everything = children(core)
        second.kill()
        wait_until(lambda: not core.is_running)
        assert are_gone(everything)
        wait_until(lambda: "giving up" in core.output)
        assert "the engine process died more than 1 times in 60 s; giving up" in core.output
        assert "was ended by SIGKILL; restarting it" in core.output


# -- starts that can't succeed -----------------------------------------------------------------


def refused(*arguments: str, within_s: float = 10.0, **environment: str) -> str:
    """The one line that a start ends with; fails unless it is one line, code 2 and quick."""
    began_s = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "longshore.cli", "serve", *arguments],
        env=os.environ | ENVIRONMENT | environment,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    assert time.monotonic() - began_s < within_s
    return done.stderr


def test_a_wrong_model_path_is_one_line(tmp_path: Path) -> None:
    assert "does not exist" in refused("--model", str(tmp_path / "none"))
    assert "no model is given" in refused()
    assert "has no config.json" in refused("--model", str(tmp_path))


def test_a_missing_tokenizer_is_one_line(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path / "m")
    (folder / "tokenizer.json").unlink()
    assert "has no tokenizer.json" in refused("--model", str(folder), "--load-format", "random")


def test_a_taken_port_is_one_line(model: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        line = refused("--model", str(model), "--load-format", "random", "--port", port)
        assert f"port: {port} on 127.0.0.1 is taken" in line


def test_a_temporary_folder_too_deep_for_a_socket_is_one_line(model: Path, tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    flags = ("--model", str(model), "--load-format", "random", "--port", "0")
    assert "too long for a socket" in refused(*flags, TMPDIR=str(deep))
    assert list(deep.iterdir()) == []


def test_an_unknown_or_wrong_setting_is_one_line(model: Path, tmp_path: Path) -> None:
    (tmp_path / "core.toml").write_text("prot = 8000\n")
    assert "prot: is not a known setting" in refused("--config", str(tmp_path / "core.toml"))
    assert "can't read the settings file" in refused("--config", str(tmp_path / "none.toml"))
    assert "--port can't be read" in refused("--port", "eight")
    assert "port: must be at most 65535" in refused("--port", "80000")
    assert "unknown setting prot" in refused("--set", "prot=1")
    assert "--set takes NAME=VALUE" in refused("--set", "port")
    assert "LONGSHORE_CORE_PROT" in refused(LONGSHORE_CORE_PROT="1")


@pytest.mark.slow
def test_a_model_that_only_the_engine_can_judge_is_one_line(tmp_path: Path) -> None:
    odd = tiny_model_folder(tmp_path / "odd", model_type="no-such-model")
    flags = ("--load-format", "random", "--port", "0")
    assert "no-such-model" in refused("--model", str(odd), *flags, within_s=90)
    short = tiny_model_folder(tmp_path / "short")
    assert "max_model_len" in refused("--model", str(short), *flags, "--max-model-len", "5000", within_s=90)


def test_settings_are_printed_with_secrets_masked(model: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "longshore.cli", "serve", "--model", str(model), "--print-config"],
        env=os.environ | ENVIRONMENT | {"LONGSHORE_CORE_WORKERS": "3"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "workers = 3\n" in done.stdout
    assert 'key_sha256 = "***"' in done.stdout
    assert KEY not in done.stdout
