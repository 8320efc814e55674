"""The browser example in headless Chromium: same tokens as Python, offline, fallback, refused bundles."""

from __future__ import annotations

from pathlib import Path

import pytest

from clients.conftest import INT8_NAME, KEY, KEY_ID, NEXT_KEY_ID, NUM_TOKENS, Chat, Harbour
from clients.runtimes import run_browser
from longshore.signing import PrivateKey

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

BUNDLE = INT8_NAME
SHEET = "The lamp is red. The lamp costs $7. There are 12 lamps in stock."


@pytest.fixture
def site(harbour: Harbour) -> str:
    return harbour.page_url


def test_the_page_answers_on_the_device_and_falls_back(site: str, tmp_path: Path) -> None:
    ask = {"step": "ask", "sheet": SHEET, "question": "What is the price of the lamp?"}
    colour = {"step": "ask", "sheet": SHEET, "question": "What colour is the lamp?", "isPrivate": True}
    model = f"/bundles/{BUNDLE}/model.onnx"
    opened, first, brought, _, again, kept, offline, _, _, fallen, private, _ = run_browser(
        site,
        {"step": "open"},
        ask,
        {"step": "requests"},
        {"step": "block", "text": "/bundles/"},
        {"step": "open"},  # a second visit, without the edge
        {"step": "requests"},
        colour,
        {"step": "block", "text": ".wasm"},
        {"step": "open"},  # now the device can't start
        ask,
        {**ask, "isPrivate": True},
        {"step": "screenshot", "path": str(tmp_path / "page.png")},
    )
    assert "ready on this device" in opened["status"] and KEY_ID in opened["status"]
    assert (first["tier"], first["text"], first["why"]) == ("device", "The lamp costs $7.", "")
    assert "first token after" in first["time"]
    assert model in brought and "/v1/chat/completions" not in brought
    assert "ready on this device" in again["status"] and model not in kept
    assert offline["tier"] == "device" and "red" in offline["text"]
    assert fallen["tier"] == "edge" and fallen["text"] == "The lamp costs $7."
    assert "not by the device: device_failed" in fallen["why"]
    assert private["tier"] == "error" and "device_failed" in private["why"]


def test_onnxruntime_web_gives_the_same_tokens(
    site: str, chats: list[Chat], expected: list[list[int]], int8_expected: list[list[int]]
) -> None:
    job = {"step": "tokens", "chats": chats, "numTokens": NUM_TOKENS}
    _, fp32, int8 = run_browser(
        site, {"step": "open"}, {**job, "bundle": "shop-student"}, {**job, "bundle": BUNDLE}
    )
    assert fp32["answers"] == expected
    assert int8["answers"] == int8_expected


def test_a_bundle_of_another_key_or_damaged_or_older_is_not_run(site: str) -> None:
    other = {KEY_ID: PrivateKey.generate().public_key.text}
    _, refused, requests, _, _, damaged, _, rolled_back = run_browser(
        site,
        {"step": "configure", "changes": {"trusted_keys": other}},
        {"step": "open"},
        {"step": "requests"},
        {"step": "configure", "changes": {"trusted_keys": {KEY_ID: KEY.public_key.text}}},
        {"step": "damage", "text": "/model.onnx"},
        {"step": "open"},
        {"step": "remember", "key": f"longshore-highest-{BUNDLE}", "value": "2 -"},
        {"step": "open"},
    )
    assert "signature does not fit" in refused["status"]
    assert f"/bundles/{BUNDLE}/manifest.sig" in requests
    assert f"/bundles/{BUNDLE}/tokenizer.json" not in requests
    assert "model.onnx is damaged" in damaged["status"]
    assert "not newer than 2" in rolled_back["status"]


def test_a_new_key_is_learnt_from_the_old_one_and_kept(site: str) -> None:
    _, stranger, _, introduced, _, known, _, kept = run_browser(
        site,
        {"step": "configure", "changes": {"bundle": "bare"}},
        {"step": "open"},
        {"step": "configure", "changes": {"bundle": "next"}},
        {"step": "open"},
        {"step": "configure", "changes": {"bundle": "bare"}},
        {"step": "open"},
        {"step": "damage", "text": "/manifest.json"},
        {"step": "open"},  # what ran before is still there
    )
    assert "not signed by a trusted key" in stranger["status"]
    for page in (introduced, known, kept):
        assert "ready on this device" in page["status"] and NEXT_KEY_ID in page["status"]
