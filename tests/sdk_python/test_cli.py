"""The command line as a process: its own commands, the tiers' entry points, and a light import."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from PIL import Image

from longshore import cli
from longshore.errors import AuthenticationError
from sdk_python.tier_server import WORDS, Behaviour, TierServer

TEXT = "".join(WORDS)
CHAT = ["chat", "--model", "shop"]


def longshore(
    *arguments: str, stdin: str = "", timeout_s: float = 60, **environment: str
) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LONGSHORE_")}
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "longshore.cli", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env={**kept, "LONGSHORE_API_KEY": "key", **environment},
        check=False,
    )


def python(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


@pytest.fixture
def tier() -> Iterator[TierServer]:
    with TierServer() as running:
        yield running


# -- chat --------------------------------------------------------------------------------------


def test_one_question_prints_the_answer_alone(tier: TierServer) -> None:
    done = longshore(*CHAT, "--edge-url", tier.url, "--once", "What does the lamp cost?")
    assert (done.returncode, done.stdout) == (0, TEXT + "\n")
    assert done.stderr.startswith("core, ") and "ms to the first token" in done.stderr
    asked = tier.seen[0].body
    assert asked["messages"] == [{"role": "user", "content": "What does the lamp cost?"}]
    assert tier.seen[0].headers["authorization"] == "Bearer key"


def test_address_and_model_may_come_from_elsewhere(tier: TierServer) -> None:
    done = longshore("chat", "--once", "hi", LONGSHORE_CORE_URL=tier.url)
    assert done.returncode == 0
    assert tier.seen[-1].body["model"] == "shop"  # the first that the tier lists


def test_conversation_keeps_its_turns_until_it_is_reset(tier: TierServer) -> None:
    lines = "first\n\nsecond\n/reset\nthird\n/tiers\n/what\n/quit\n"
    done = longshore(*CHAT, "--core-url", tier.url, "--system", "Be short.", stdin=lines)
    assert done.returncode == 0
    assert done.stdout.count(TEXT) == 3
    assert "core http://" in done.stdout and "/reset forgets" in done.stdout
    roles = [[message["role"] for message in seen.body["messages"]] for seen in tier.seen]
    assert roles == [["system", "user"], ["system", "user", "assistant", "user"], ["system", "user"]]


def test_pictures_stand_before_the_next_question(tier: TierServer, tmp_path: Path) -> None:
    for name in ("one.png", "two.png"):
        Image.new("RGB", (30, 20), (len(name), 9, 9)).save(tmp_path / name)
    lines = f"first\n/image {tmp_path}/no.png\n/image {tmp_path}/two.png\nsecond\nthird\n"
    done = longshore(*CHAT, "--core-url", tier.url, "--image", f"{tmp_path}/one.png", stdin=lines)
    assert done.returncode == 0 and "(invalid_image: " in done.stdout
    turns = [seen.body["messages"] for seen in tier.seen]
    kinds = [[part["type"] for part in turn[-1]["content"]] for turn in turns[:2]]
    assert kinds == [["image_url", "text"]] * 2 and turns[2][-1]["content"] == "third"
    assert turns[2][:3:2] == [turns[0][0], turns[1][2]]  # what was shown stays in the conversation
    failed = longshore(*CHAT, "--core-url", tier.url, "--image", "no.png", "--once", "hi")
    assert failed.returncode != 0 and "no.png" in failed.stderr and len(tier.seen) == 3


def test_errors_do_not_end_a_conversation(tier: TierServer) -> None:
    tier.script = [Behaviour(error=AuthenticationError("who are you")), Behaviour(stop_after=2)]
    done = longshore(*CHAT, "--core-url", tier.url, stdin="one\ntwo\nthree\n")
    assert done.returncode == 0
    assert "(invalid_api_key: who are you)" in done.stdout
    assert "(answer_interrupted after 2 tokens" in done.stdout
    assert done.stdout.count(TEXT) == 1
    assert len(tier.seen[-1].body["messages"]) == 1  # what failed is no part of the conversation


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["chat", "--once", "hi"], "at least one of edge_url, core_url and device"),
        (["chat", "--once", "hi", "--edge-url", "nowhere"], "must be an http:// or https:// address"),
        (["chat", "--once", "hi", "--device", "/nonexistent"], "nonexistent"),
        (["chat", "--once", "hi", "--model", "m", "--core-url", "http://127.0.0.1:9"], "127.0.0.1:9"),
    ],
)
def test_what_can_not_work_ends_in_one_line(arguments: list[str], words: str) -> None:
    done = longshore(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("longshore: ") and words in done.stderr
    assert done.stderr.count("\n") == 1 and done.stdout == ""


# -- the rest ----------------------------------------------------------------------------------


def test_version_names_the_extras() -> None:
    done = longshore("version")
    assert done.returncode == 0
    assert done.stdout.startswith("longshore 0.")
    assert {"device:", "edge:", "server:", "export:"} <= set(done.stdout.split())


def test_without_a_command_the_help_is_shown() -> None:
    done = longshore()
    assert done.returncode == 2
    assert "chat" in done.stdout and "demo" in done.stdout and "version" in done.stdout


def test_demo_of_an_install_says_where_it_is(tmp_path: Path) -> None:
    installed = tmp_path / "lib" / "site-packages" / "longshore" / "__init__.py"
    assert cli.find_examples(str(installed)) is None
    clone = tmp_path / "clone"
    (clone / "examples" / "demo").mkdir(parents=True)
    (clone / "examples" / "demo" / "__main__.py").write_text("")
    package = clone / "sdk_python" / "longshore" / "__init__.py"
    assert cli.find_examples(str(package)) == clone / "examples"


def test_demo_runs_the_clones_own_with_its_arguments(tmp_path: Path) -> None:
    """A copy of the package beside other examples: the demo started is the one that lies beside it."""
    clone = tmp_path / "clone"
    demo = clone / "examples" / "demo"
    demo.mkdir(parents=True)
    (demo / "__init__.py").write_text("")
    (demo / "__main__.py").write_text("import sys; print('demo of this clone', sys.argv[1:]); sys.exit(7)")
    (clone / "sdk_python").mkdir()
    shutil.copytree(Path(cli.__file__).parent, clone / "sdk_python" / "longshore")
    done = longshore("demo", "--keep", "--seed", "5", PYTHONPATH=str(clone / "sdk_python"))
    assert done.returncode == 7
    assert "['--keep', '--seed', '5']" in done.stdout


def test_tier_that_can_not_be_imported_keeps_its_command(capsys: pytest.CaptureFixture[str]) -> None:
    parser = ArgumentParser()
    subparsers = parser.add_subparsers()
    cli._register_tier(EntryPoint("serve", "no_such_package.cli:register", cli.ENTRY_POINT_GROUP), subparsers)
    options = parser.parse_args(["serve"])
    assert options.run(options) == 2
    assert "no_such_package" in capsys.readouterr().err


def test_registering_every_command_imports_nothing_heavy() -> None:
    code = (
        "import sys; from longshore.cli import build_parser; build_parser();"
        "print([m for m in ('torch','transformers','onnxruntime','numpy','fastapi','granian','aiohttp')"
        " if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"


def test_import_is_light() -> None:
    """`import longshore` and even making a remote client bring in no tier's libraries."""
    code = (
        "import sys, json, time; begin = time.perf_counter(); import longshore;"
        "took = time.perf_counter() - begin; light = sorted(sys.modules);"
        "client = longshore.Client(core_url='http://127.0.0.1:9', api_key='k'); client.close();"
        "print(json.dumps([took, light, sorted(sys.modules)]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    took_s, after_import, after_client = json.loads(done.stdout)
    heavy = {"torch", "transformers", "onnxruntime", "numpy", "fastapi", "pydantic", "granian", "tokenizers"}
    assert not heavy & {name.partition(".")[0] for name in after_client}
    assert not {"httpx2", "websockets", "asyncio", "ssl"} & set(after_import)
    assert took_s < 2  # milliseconds, but the machine may be busy
