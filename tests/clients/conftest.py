"""The signed Shop bundle that every runtime gets, questions, and what the Python runtime answers to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from clients.runtimes import ROOT
from longshore.device import Student
from longshore.signing import PrivateKey
from longshore.wire import FinishEvent, Manifest, TokenEvent, decode_chat_request
from longshore_export.bundle import SigningKey, export_student
from shop.chat import messages as shop_messages
from shop.question import KINDS, make_question
from shop.sheet import make_sheet, split_rng

KEY_ID = "operator-1"
KEY = PrivateKey("AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8")
NUM_TOKENS = 16
STUDENT = ROOT / "examples" / "models" / "shop-student"

Chat = list[dict[str, str]]


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    """The Shop student in fp32, signed."""
    return _export(tmp_path_factory, "fp32", "shop-student")


@pytest.fixture(scope="session")
def int8_bundle(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    """The same in dynamic int8, which is the one for browsers."""
    return _export(tmp_path_factory, "int8", "shop-student-int8")


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
