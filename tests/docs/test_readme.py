"""The README does what it says: its commands and its Python are run as they stand, on free ports."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
_FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_PORTS = ("8000", "8080")
_START_TIMEOUT_S = 240  # two servers and an export, each of which loads torch
# Waits until a background command has printed the line that the README shows below it.
_WAIT_FOR = r"""
wait_for() {  # file, text
    for _ in $(seq 1 3000); do
        grep -qF "$2" "$1" && return
        kill -0 $! 2>/dev/null || break
        sleep 0.05
    done
    echo "the line '$2' did not come:" >&2; cat "$1" >&2; exit 1
}
"""


pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def fences(language: str) -> list[str]:
    return [body for name, body in _FENCE.findall(README) if name == language]


@dataclass(frozen=True)
class Command:
    """A line after `$ `, and what the README shows below it."""

    text: str
    shown: tuple[str, ...]


def commands() -> list[Command]:
    found: list[tuple[str, list[str]]] = []
    for line in "".join(fences("console")).splitlines():
        if line.startswith("$ "):
            found.append((line[2:], []))
        elif found[-1][0].endswith("\\"):
            found[-1] = (found[-1][0] + "\n" + line, [])
        else:
            found[-1][1].append(line)
    return [Command(text, tuple(shown)) for text, shown in found]


def script(folder: Path) -> str:
    """The README's session as a script; servers stay up until its standard input closes."""
    lines = ["set -euo pipefail", _WAIT_FOR]
    for number, command in enumerate(commands()):
        if not command.text.endswith(" &"):
            lines.append(command.text)
            continue
        log = folder / f"{number}.log"
        lines.append(f"{command.text.removesuffix('&')} >{log} 2>&1 &")
        lines += [f"wait_for {log} '{shown}'" for shown in command.shown]
    return "\n".join([*lines, "echo THE SESSION IS UP", "cat"])


@dataclass(frozen=True)
class Session:
    """The README's shell session with its servers running."""

    ports: dict[str, str]
    output: str

    def with_ports(self, text: str) -> str:
        return _with_ports(text, self.ports)


def _with_ports(text: str, ports: dict[str, str]) -> str:
    for written, free in ports.items():
        text = re.sub(rf"\b{written}\b", free, text)
    return text


def _free_ports(count: int) -> list[str]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [str(sock.getsockname()[1]) for sock in sockets]
    for sock in sockets:
        sock.close()
    return ports


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    folder = tmp_path_factory.mktemp("readme")
    ports = dict(zip(_PORTS, _free_ports(len(_PORTS)), strict=True))
    text = _with_ports(script(folder), ports).replace("build/", f"{folder}/")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with (folder / "session.log").open("w+") as log:
        process = subprocess.Popen(
            ["bash", "-c", text],
            cwd=ROOT,
            env=os.environ | {"PATH": path},
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield Session(ports, _output_when_up(process, folder / "session.log"))
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.communicate(timeout=30)


def _output_when_up(process: subprocess.Popen[bytes], log: Path) -> str:
    for _ in range(int(_START_TIMEOUT_S / 0.1)):
        output = log.read_text()
        if "THE SESSION IS UP" in output:
            return output
        try:
            process.wait(0.1)
        except subprocess.TimeoutExpired:
            continue
        break
    raise AssertionError(f"the README's commands failed:\n{log.read_text()}")


def test_the_session_answers(session: Session) -> None:
    assert "blue" in session.output.lower()


@pytest.mark.parametrize("number", range(len(fences("python"))))
def test_python(session: Session, number: int) -> None:
    code = session.with_ports(textwrap.dedent(fences("python")[number]))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"LONGSHORE_API_KEY": "a-key-of-your-own"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip()


def test_every_fence_is_of_a_kind_that_is_checked() -> None:
    assert {name for name, _ in _FENCE.findall(README)} <= {"sh", "console", "python"}
    assert [line for line in "".join(fences("sh")).splitlines() if not line.startswith("make ")] == []
