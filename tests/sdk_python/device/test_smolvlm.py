"""An exported SmolVLM on the device gives the tokens that transformers' own class gives."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from transformers import SmolVLMForConditionalGeneration

from longshore.device import DeviceSettings, Student
from longshore.images import data_url, image_bytes, pixel_values
from longshore.wire import TokenEvent, decode_chat_request
from longshore_export.bundle import export_student
from shop.picture_models import IMAGE, random_vision_model, vision_tokenizer
from shop.pictures import draw_photo, make_photo

SETTINGS = DeviceSettings(calibration_s=0.0, image_budget_ms=0.0, prefill_chunk_tokens=11)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_vision_model(tmp_path_factory.mktemp("smolvlm") / "model")


@pytest.fixture(scope="module")
def seeing(model_dir: Path) -> Iterator[Student]:
    bundle = export_student(model_dir, model_dir.parent / "bundle").path
    with Student(bundle, settings=SETTINGS) as running:
        yield running


def photos(count: int) -> list[str]:
    rng = Random(7)
    return [data_url(draw_photo(make_photo(rng, "heldout"))) for _ in range(count)]


def request(parts: list[str], detail: str) -> Any:
    """A chat of texts and data: URLs."""
    content = [
        {"type": "image_url", "image_url": {"url": part, "detail": detail}}
        if part.startswith("data:")
        else {"type": "text", "text": part}
        for part in parts
    ]
    fields = {"model": "s", "temperature": 0, "max_tokens": 16, "ignore_eos": True}
    return decode_chat_request(fields | {"messages": [{"role": "user", "content": content}]})


def theirs(model_dir: Path, parts: list[str], size: int, num_tokens: int) -> list[int]:
    """What `generate` gives for the same prompt, written with its image tokens, and the same pixels."""
    tokenizer = vision_tokenizer(model_dir / "tokenizer.json")
    text = "".join(IMAGE * num_tokens if part.startswith("data:") else part for part in parts)
    ids = tokenizer.encode(f"<|user|>{text}<|end|><|assistant|>", add_special_tokens=False).ids
    planes = [pixel_values(image_bytes(part), size, size) for part in parts if part.startswith("data:")]
    model = SmolVLMForConditionalGeneration.from_pretrained(model_dir, dtype=torch.float32)
    with torch.no_grad():
        tokens = model.generate(
            input_ids=torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            pixel_values=torch.from_numpy(np.stack(planes))[None],
            max_new_tokens=16,
            min_new_tokens=16,
            do_sample=False,
            suppress_tokens=[model.config.image_token_id],
        )
    found: list[int] = tokens[0, len(ids) :].tolist()
    return found


@pytest.mark.parametrize(("detail", "place"), [("low", 0), ("high", -1)])
def test_greedy_tokens_are_transformers(seeing: Student, model_dir: Path, detail: str, place: int) -> None:
    first, second = photos(2)
    parts = [first, "What is the price?", second, "And of this?"]
    bucket = seeing.manifest.vision_buckets[place]
    events = list(seeing.stream(request(parts, detail)))
    ours = [event.mark.token_id for event in events if isinstance(event, TokenEvent)]
    assert ours == theirs(model_dir, parts, bucket.width_px, bucket.num_tokens)
