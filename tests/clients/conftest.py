"""The signed Shop bundle that every runtime gets, questions, and what the Python runtime answers to them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from clients.runtimes import BROWSER, ROOT, lack, need, need_node_packages
from longshore.bundle import OperatorKey, read_manifest, sign_rotation, write_manifest
from longshore.device import Student
from longshore.signing import PrivateKey
from longshore.tier_process import TierProcess
from longshore.wire import FinishEvent, Manifest, TokenEvent, decode_chat_request
from longshore_export.bundle import SigningKey, export_student
from shop.chat import messages as shop_messages
from shop.question import KINDS, make_question
from shop.sheet import make_sheet, split_rng

KEY_ID = "operator-1"
KEY = PrivateKey("AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8")
NEXT_KEY_ID, NEXT_KEY = "operator-2", PrivateKey.generate()
API_KEY = "test-key"
INT8_NAME = "shop-student-int8"
NUM_TOKENS = 16
STUDENT = ROOT / "examples" / "models" / "shop-student"
_STDLIB = Path("/usr/share/java/kotlin-stdlib.jar")  # where Debian's package has it

Chat = list[dict[str, str]]


@dataclass(frozen=True)
class Harbour:
    """An edge, and the browser example's page that asks it."""

    page_url: str
    edge_url: str


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    """The Shop student in fp32, signed."""
    return _export(tmp_path_factory, "fp32", "shop-student")


@pytest.fixture(scope="session")
def int8_bundle(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    """The same in dynamic int8, which is the one for browsers."""
    return _export(tmp_path_factory, "int8", INT8_NAME)


def _export(factory: pytest.TempPathFactory, variant: str, name: str) -> tuple[Path, Manifest]:
    folder = factory.mktemp(variant) / name
    key = SigningKey(KEY_ID, KEY)
    return folder, export_student(STUDENT, folder, name=name, signing_key=key, variant=variant).manifest


@pytest.fixture(scope="session")
def chats() -> list[Chat]:
    """One held-out question of each kind, the sheets growing."""
    rng = split_rng("heldout", 20)
    found = []
    for number, kind in enumerate(KINDS):
        sheet = make_sheet(rng, 2 + 2 * number, "heldout")
        found.append(shop_messages(sheet, make_question(rng, sheet, kind)))
    return found


@pytest.fixture(scope="session")
def expected(bundle: tuple[Path, Manifest], chats: list[Chat]) -> list[list[int]]:
    """The first greedy tokens of the Python runtime."""
    return greedy_tokens(bundle[0], chats)


@pytest.fixture(scope="session")
def int8_expected(int8_bundle: tuple[Path, Manifest], chats: list[Chat]) -> list[list[int]]:
    """The same of the int8 bundle."""
    return greedy_tokens(int8_bundle[0], chats)


def greedy_tokens(folder: Path, chats: list[Chat], **settings: Any) -> list[list[int]]:
    """The first greedy tokens of `longshore.device` for each chat."""
    student = Student(folder, **settings)
    student.start()
    try:
        return [_ids(student, chat) for chat in chats]
    finally:
        student.close()


def _ids(student: Student, chat: Chat) -> list[int]:
    request = decode_chat_request(
        {"model": "shop", "messages": chat, "temperature": 0, "max_tokens": NUM_TOKENS}
    )
    events = list(student.stream(request))
    ids = [event.mark.token_id for event in events if isinstance(event, TokenEvent)]
    is_ended = any(isinstance(event, FinishEvent) and event.finish_reason == "stop" for event in events)
    return ids + list(student.manifest.eos_token_ids[:1]) * is_ended  # the end is told by no token event


@contextmanager
def page_server(config: Path) -> Iterator[str]:
    command = [need_node_packages(), str(BROWSER / "serve.mjs"), "--port", "0", "--config", str(config)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().split()[-1]
    finally:
        process.kill()
        process.wait(5)
        process.stdout.close()


def rotated(source: Path, folder: Path) -> list[Path]:
    """The bundle twice more, signed by the next key: with the statement that introduces it, and without."""
    chain = (sign_rotation(KEY_ID, KEY, OperatorKey(NEXT_KEY_ID, NEXT_KEY.public_key.text)),)
    found = []
    for name, statements in (("next", chain), ("bare", ())):
        path = Path(shutil.copytree(source, folder / name))
        write_manifest(
            path,
            replace(read_manifest(path), name=name, key_chain=statements),
            SigningKey(NEXT_KEY_ID, NEXT_KEY),
        )
        found.append(path)
    return found


@pytest.fixture(scope="session")
def harbour(
    bundle: tuple[Path, Manifest],
    int8_bundle: tuple[Path, Manifest],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Harbour]:
    """An edge whose only model is the student in fp32; it hands out that bundle, and the page's in int8."""
    folder = tmp_path_factory.mktemp("site")
    config = folder / "config.json"
    with page_server(config) as url:
        digest = hashlib.sha256(API_KEY.encode()).hexdigest()
        (folder / "edge.toml").write_text(
            f'node = "harbour"\nport = 0\nallowed_origins = ["{url.rstrip("/")}"]\n'
            f'student_bundle = "{bundle[0]}"\n'
            f'[[keys]]\ntenant = "page"\nkey_sha256 = "{digest}"\n'
            + "".join(
                f'[[bundles]]\npath = "{path}"\n'
                for path in (bundle[0], int8_bundle[0], *rotated(int8_bundle[0], folder))
            )
        )
        with TierProcess(["edge", "--config", str(folder / "edge.toml")], start_timeout_s=60) as edge:
            settings = json.loads((BROWSER / "config.json").read_text())
            settings |= {
                "edge_url": edge.url,
                "bundle": INT8_NAME,
                "trusted_keys": {KEY_ID: KEY.public_key.text},
            }
            config.write_text(json.dumps(settings))
            yield Harbour(url, edge.url)


@pytest.fixture(scope="session")
def kotlin_core(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The Android example's core and test programs, compiled: a java command without the program's name."""
    java, kotlinc = need("java"), need("kotlinc")
    if not _STDLIB.exists():
        lack(f"{_STDLIB} is not there")
    jar = tmp_path_factory.mktemp("kotlin") / "core.jar"
    sources = sorted(map(str, (ROOT / "examples" / "android" / "core" / "src").rglob("*.kt")))
    options = ["-jvm-target", "1.8", "-no-reflect", "-d", str(jar)]
    environment = os.environ | {"JAVA_OPTS": "-Xmx512m -XX:TieredStopAtLevel=1"}
    compiled = subprocess.run(
        [kotlinc, *options, *sources], capture_output=True, text=True, timeout=200, env=environment
    )
    assert compiled.returncode == 0, compiled.stderr[-3000:]
    return [java, "-XX:TieredStopAtLevel=1", "-cp", f"{jar}:{_STDLIB}"]
