"""onnxruntime-node gives the tokens that Python gives."""

from __future__ import annotations

from pathlib import Path

import pytest

from clients.conftest import NUM_TOKENS, Chat
from clients.runtimes import run_node
from longshore.wire import Manifest
from vision_bundle import make_vision_bundle


def node_tokens(folder: Path, precision: str, chats: list[Chat]) -> list[list[int]]:
    job = {"what": "tokens", "bundle": str(folder), "precision": precision, "numTokens": NUM_TOKENS}
    answers: list[list[int]] = run_node("node_tokens.mjs", job | {"chats": chats})["answers"]
    return answers


@pytest.mark.timeout(120)
def test_fp32_gives_the_same_tokens(
    bundle: tuple[Path, Manifest], chats: list[Chat], expected: list[list[int]]
) -> None:
    assert node_tokens(bundle[0], "fp32", chats) == expected
    assert max(map(len, expected)) == NUM_TOKENS and len({tuple(ids) for ids in expected}) == len(chats)


@pytest.mark.timeout(120)
def test_int8_gives_the_same_tokens(
    int8_bundle: tuple[Path, Manifest], chats: list[Chat], int8_expected: list[list[int]]
) -> None:
    assert node_tokens(int8_bundle[0], "int8", chats) == int8_expected


@pytest.mark.timeout(120)
def test_a_model_that_sees_answers_text_with_the_same_tokens(
    bundle: tuple[Path, Manifest], chats: list[Chat], expected: list[list[int]], tmp_path: Path
) -> None:
    """Its graph takes rows for image tokens, of which there are none here."""
    make_vision_bundle(bundle[0], tmp_path / "seeing")
    assert node_tokens(tmp_path / "seeing", "fp32", chats[:2]) == expected[:2]
