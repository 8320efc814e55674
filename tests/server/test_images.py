"""What the core does with a request's pictures before the engine: sizes, tokens, decoding within bounds."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from longshore.errors import (
    ConfigError,
    InvalidImageError,
    InvalidRequestError,
    OutOfRangeError,
    QueueFullError,
    UnavailableError,
)
from longshore.wire import ChatRequest, ImageUse, VisionBucket, decode_chat_request
from longshore_server.image_sizes import ImageSizes, Picture
from longshore_server.images import ImageReader, without_pictures
from longshore_server.text import ModelText
from seeing_models import write_seeing_model

IMAGE = 9
SIZES = ImageSizes(IMAGE, tuple(VisionBucket(16 * n, 16 * n, n * n) for n in (1, 2, 4, 8)))
MANY = 10**9


def png_url(width_px: int = 40, height_px: int = 30, colour: Any = (200, 10, 10)) -> str:
    out = io.BytesIO()
    Image.new("RGB", (width_px, height_px), colour).save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def chat(*urls: str, detail: str = "auto") -> ChatRequest:
    parts = [{"type": "image_url", "image_url": {"url": url, "detail": detail}} for url in urls]
    content = [{"type": "text", "text": "what is it?"}, *parts]
    return decode_chat_request({"model": "m", "messages": [{"role": "user", "content": content}]})


# -- sizes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width_px", "height_px", "is_low", "side_px", "why"),
    [
        (10, 10, False, 16, "full"),
        (33, 10, False, 64, "full"),
        (64, 64, False, 64, "full"),
        (65, 64, False, 128, "full"),
        (4000, 3000, False, 128, "full"),
        (4000, 3000, True, 16, "asked"),
        (10, 10, True, 16, "full"),
    ],
)
def test_a_picture_is_read_as_large_as_that_adds_something(width_px, height_px, is_low, side_px, why) -> None:
    picture = Picture(width_px, height_px, is_low)
    (use,) = SIZES.choose([picture], max_tokens=MANY, max_pixels=MANY)
    assert use == ImageUse(side_px, side_px, (side_px // 16) ** 2, why)


@given(
    st.lists(st.tuples(st.integers(1, 300), st.integers(1, 300)), max_size=6),
    st.integers(-5, 200),
    st.integers(0, 40_000),
)
def test_pictures_get_smaller_only_where_they_must(sizes, max_tokens, max_pixels) -> None:
    pictures = [Picture(*size) for size in sizes]
    full = SIZES.choose(pictures, max_tokens=MANY, max_pixels=MANY)
    try:
        uses = SIZES.choose(pictures, max_tokens=max_tokens, max_pixels=max_pixels)
    except OutOfRangeError:
        assert 256 * len(sizes) > max_pixels
        return
    num_tokens = sum(use.num_tokens for use in uses)
    is_least = all(use.width_px == 16 for use in uses)
    assert num_tokens <= max_tokens or is_least
    assert sum(use.width_px * use.height_px for use in uses) <= max_pixels
    if uses != full:
        larger = max(use.num_tokens for use in full)
        assert num_tokens * 4 + larger > max_tokens or num_tokens * 256 * 4 > max_pixels
    for use, best in zip(uses, full, strict=True):
        assert use.num_tokens <= best.num_tokens
        assert use.why == ("full" if use.num_tokens == best.num_tokens else "context")


def test_a_prompt_has_as_many_tokens_as_its_pictures() -> None:
    uses = (ImageUse(16, 16, 1, "full"), ImageUse(32, 32, 4, "full"))
    assert SIZES.expand((1, IMAGE, 2, IMAGE, 3), uses, "messages") == (1, *[IMAGE], 2, *[IMAGE] * 4, 3)
    assert SIZES.expand((1, 2), (), "messages") == (1, 2)
    for prompt in ((1, IMAGE), (IMAGE, IMAGE, IMAGE)):
        with pytest.raises(InvalidRequestError, match=r"^messages: the prompt has places for"):
            SIZES.expand(prompt, uses, "messages")
    with pytest.raises(InvalidRequestError, match="0 are given"):
        SIZES.expand((1, IMAGE), (), "prompt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_seeing_model(tmp_path_factory.mktemp("seeing"))


def test_a_folder_tells_its_sizes(folder: Path, tmp_path: Path) -> None:
    sizes = ImageSizes.load(folder)
    assert sizes is not None and sizes.image_token_id == 1024
    assert [bucket.width_px for bucket in sizes.buckets] == [32, 48, 64]
    assert ImageSizes.load(tmp_path) is None
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    assert ImageSizes.load(tmp_path) is None  # it sees, but nobody says at which sizes


@pytest.mark.parametrize(
    "buckets",
    [
        [[32, 32]],
        [[32, 32, 5]],
        [[40, 40, 4]],
        [[64, 16, 4]],
        [[-32, -32, 4]],
        [["32", 32, 4]],
        [[32, 32, 4, 4]],
        "32",
        7,
        [[99984, 99984, 39050001]],
    ],
)
def test_sizes_that_the_model_cannot_take_stop_the_start(folder: Path, tmp_path: Path, buckets: Any) -> None:
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"buckets": buckets}))
    with pytest.raises(ConfigError, match="picture sizes") as caught:
        ImageSizes.load(tmp_path)
    assert "\n" not in caught.value.message


# -- text --------------------------------------------------------------------------------------


async def test_a_picture_stands_where_it_is_in_the_message(folder: Path) -> None:
    text = ModelText.load(folder)
    image = {"type": "image_url", "image_url": {"url": png_url()}}
    words = [{"type": "text", "text": word} for word in ("first <image>", "second<|end|>")]
    shown = [words[0], image, words[1]]
    messages = [{"role": "user", "content": content} for content in (shown, "<image>")]
    (ids,) = await text.prompts(decode_chat_request({"model": "m", "messages": messages}))
    assert ids.count(1024) == 1  # the picture's; what people spell is text
    at = ids.index(1024)
    assert text.decode(list(ids[:at])) == "first <image>"
    assert text.decode(list(ids[at:])) == "second<|end|><image>"
    text.close()


# -- decoding ----------------------------------------------------------------------------------


async def test_pictures_come_in_their_order_and_size() -> None:
    reader = ImageReader(SIZES)
    request = chat(png_url(10, 10, (255, 0, 0)), png_url(100, 30, (0, 0, 255)))
    read = await reader.read(request, max_tokens=MANY, max_pixels=MANY)
    reader.close()
    assert [use.width_px for use in read.uses] == [16, 128]
    assert [(each.height_px, each.width_px) for each in read.images] == [(16, 16), (128, 128)]
    assert read.images[0].rgb == bytes([255, 0, 0]) * 256
    assert read.images[1].rgb == bytes([0, 0, 255]) * 128 * 128


def test_a_request_that_was_read_keeps_its_text_alone() -> None:
    request = chat(png_url())
    bare = without_pictures(request)
    assert [message.text for message in bare.messages] == ["what is it?"]
    assert not bare.messages[0].images and bare.model == request.model
    assert without_pictures(bare) is bare


async def test_a_bad_picture_is_named() -> None:
    reader = ImageReader(SIZES)
    with pytest.raises(InvalidImageError) as caught:
        await reader.read(chat(png_url(), "data:image/png;base64,AAAA"), max_tokens=MANY, max_pixels=MANY)
    assert caught.value.param == "messages[0].content[2].image_url"
    assert caught.value.message.startswith("messages[0].content[2].image_url: ")
    reader.close()


async def test_waiting_is_bounded_in_number_and_time() -> None:
    """A picture that takes long keeps its place until it is through; others are told to come later."""
    reader = ImageReader(SIZES, timeout_s=0.001, max_waiting=2)
    bounds = {"max_tokens": MANY, "max_pixels": MANY}
    large = chat(png_url(4000, 4000))
    for _ in range(2):
        with pytest.raises(UnavailableError, match=r"within 0\.001 s"):
            await reader.read(large, **bounds)
    with pytest.raises(QueueFullError):
        await reader.read(large, **bounds)
    assert (await reader.read(chat(), **bounds)).images == ()  # who shows none waits for nobody
    reader.close()
