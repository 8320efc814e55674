"""Pictures in messages: what people write becomes the wire's parts, clean, small and checked beforehand."""

from __future__ import annotations

import base64
import io
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from longshore import AsyncClient, Client
from longshore.config import HttpSettings
from longshore.errors import (
    ConfigError,
    InvalidImageError,
    InvalidRequestError,
    LongshoreError,
    OutOfRangeError,
    UnknownParameterError,
    UnsupportedParameterError,
)
from longshore.image_parts import holds_images
from longshore.images import image_bytes
from longshore.wire import ContentPart, ImageUrl, Message
from sdk_python.tier_server import Behaviour, TierServer

ARGUMENTS: dict[str, Any] = {"api_key": "key", "http": HttpSettings(trust_env=False)}
SECRET = "51.5007N 0.1246W"


def photo(kind: str = "JPEG", size: tuple[int, int] = (2000, 500)) -> bytes:
    exif = Image.Exif()
    exif[0x010E] = SECRET
    out = io.BytesIO()
    Image.radial_gradient("L").resize(size).save(out, kind, exif=exif)
    return out.getvalue()


def url_of(data: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(data).decode()


def ask(*content: Any) -> dict[str, Any]:
    return {"model": "shop", "messages": [{"role": "user", "content": list(content)}]}


QUESTION = {"type": "text", "text": "What does it cost?"}


def sources(folder: Path) -> list[Any]:
    """The same picture in every form that a part may hold."""
    (folder / "tag.jpg").write_bytes(photo())
    url = {"url": url_of(photo()), "detail": "high"}
    return [
        {"type": "image", "image": photo(), "detail": "high"},
        {"type": "image", "image": folder / "tag.jpg", "detail": "high"},
        {"type": "image", "image": str(folder / "tag.jpg"), "detail": "high"},
        {"type": "image", "image": Image.open(io.BytesIO(photo())), "detail": "high"},
        {"type": "image_url", "image_url": url},
        ContentPart("image_url", image_url=ImageUrl(**url)),
    ]


def test_every_form_arrives_as_the_same_clean_part(tmp_path: Path) -> None:
    with TierServer() as edge, Client(edge_url=edge.url, image_max_side_px=400, **ARGUMENTS) as client:
        for part in sources(tmp_path):
            client.chat.completions.create(**ask(QUESTION, part))
        message = Message("user", (ContentPart("text", "What does it cost?"), sources(tmp_path)[-1]))
        client.chat.completions.create(model="shop", messages=iter([message]))
    contents = [seen.body["messages"][0]["content"] for seen in edge.seen]
    assert len(contents) == 7 and all(content == contents[0] for content in contents)
    [text, image] = contents[0]
    assert text == QUESTION and image["image_url"]["detail"] == "high"
    body = image_bytes(image["image_url"]["url"])
    assert SECRET.encode() not in body
    with Image.open(io.BytesIO(body)) as found:
        assert (found.format, found.size) == ("JPEG", (400, 100))


async def test_async_clients_send_the_same(tmp_path: Path) -> None:
    with TierServer() as edge:
        async with AsyncClient(edge_url=edge.url, **ARGUMENTS) as client:
            for part in sources(tmp_path)[:2]:
                await client.chat.completions.create(**ask(part, QUESTION))
    first, second = (seen.body["messages"] for seen in edge.seen)
    assert first == second and first[0]["content"][0]["type"] == "image_url"


def test_plain_messages_are_left_alone() -> None:
    with TierServer() as edge, Client(edge_url=edge.url, **ARGUMENTS) as client:
        client.chat.completions.create(**ask(QUESTION))
        client.chat.completions.create(model="shop", messages=[{"role": "user", "content": "Hello"}])
    assert [seen.body["messages"][0]["content"] for seen in edge.seen] == [[QUESTION], "Hello"]
    assert not holds_images([{"role": "user", "content": "Hello"}, Message("user", "a"), 5])
    assert holds_images(ask(QUESTION)["messages"])


@pytest.mark.parametrize(
    ("part", "error", "param"),
    [
        ({"type": "image", "image": b"GIF89a"}, InvalidImageError, "image"),
        ({"type": "image", "image": "no/such/file.png"}, InvalidImageError, "image"),
        ({"type": "image", "image": "https://example.org/a.png"}, InvalidImageError, "image"),
        ({"type": "image", "image": None}, InvalidImageError, "image"),
        ({"type": "image"}, InvalidRequestError, "image"),
        ({"type": "image", "image": photo("PNG"), "size": 5}, UnknownParameterError, "size"),
        ({"type": "image", "image": photo("PNG"), "detail": "vast"}, OutOfRangeError, "image_url.detail"),
        ({"type": "image_url", "image_url": {"url": url_of(b"no")}}, InvalidImageError, "image_url.url"),
        (
            {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}},
            InvalidRequestError,
            "image_url.url",
        ),
        ({"type": "image_url", "image_url": 5}, InvalidRequestError, "image_url"),
        ({"type": "video", "video": b""}, LongshoreError, None),
    ],
)
def test_bad_parts_are_named_and_nothing_is_sent(
    part: Any, error: type[LongshoreError], param: str | None
) -> None:
    with TierServer() as edge, Client(edge_url=edge.url, **ARGUMENTS) as client:
        with pytest.raises(error) as caught:
            client.chat.completions.create(**ask(QUESTION, part))
        assert edge.seen == []
    if param is not None:
        assert caught.value.param == f"messages[0].content[1].{param}"


def test_without_pillow_a_picture_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with TierServer() as edge, Client(edge_url=edge.url, **ARGUMENTS) as client:
        client.chat.completions.create(**ask(QUESTION))
        with pytest.raises(ConfigError, match="pip install pillow") as caught:
            client.chat.completions.create(**ask({"type": "image_url", "image_url": {"url": url_of(b"")}}))
        assert caught.value.param == "messages[0].content[0].image_url.url" and len(edge.seen) == 1


@pytest.mark.parametrize("side_px", [0, -5, 100_000])
def test_odd_sizes_stop_the_construction(side_px: int) -> None:
    with pytest.raises(ConfigError) as caught:
        Client(edge_url="http://127.0.0.1:9", image_max_side_px=side_px, **ARGUMENTS)
    assert caught.value.param == "image_max_side_px"


def test_a_tier_that_takes_no_pictures_leaves_the_next_one() -> None:
    refusal = Behaviour(status=400, error=UnsupportedParameterError("this model takes no images", param="x"))
    picture = {"type": "image", "image": photo()}
    with TierServer(refusal) as blind, TierServer() as seeing:
        with Client(edge_url=blind.url, core_url=seeing.url, **ARGUMENTS) as client:
            answer = client.chat.completions.create(**ask(QUESTION, picture))
            assert answer.longshore is not None
            assert [attempt.outcome for attempt in answer.longshore.attempts][:2] == ["failed", "served"]
            with pytest.raises(UnsupportedParameterError):
                client.chat.completions.create(**ask(QUESTION))
        assert len(seeing.seen) == 1
