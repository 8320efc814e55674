"""Pictures in messages as people write them, made into the wire's image parts.

    {"type": "image", "image": a PIL image, bytes, a path or a data: URL, "detail": "auto" | "low" | "high"}
    {"type": "image_url", "image_url": {"url": "data:image/...", "detail": ...}}

Both are written anew, so that nothing but pixels leaves this process.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from longshore.errors import ConfigError, InvalidImageError, InvalidRequestError, UnknownParameterError
from longshore.images import data_url
from longshore.wire import ContentPart, Message, encode

_FIELDS = frozenset({"type", "image", "detail"})


def holds_images(messages: Iterable[Any]) -> bool:
    """True if some content is more than text, so that making the request may take long."""
    return any(not isinstance(_content(message), str | None) for message in messages)


def with_data_urls(messages: Iterable[Any], max_side_px: int) -> list[Any]:
    """The messages with every picture as an `image_url` part of a fresh data: URL.

    What is no picture stays as it is, for the wire to judge. Raises InvalidImageError or another
    InvalidRequestError naming the part, and ConfigError where Pillow is not installed.
    """
    return [_message(message, number, max_side_px) for number, message in enumerate(messages)]


def _content(message: Any) -> Any:
    if isinstance(message, Message):
        return message.content
    return message.get("content") if isinstance(message, Mapping) else None


def _message(message: Any, number: int, max_side_px: int) -> Any:
    content = _content(message)
    if content is None or isinstance(content, str | bytes | Mapping) or not isinstance(content, Iterable):
        return message
    fields = encode(message) if isinstance(message, Message) else dict(message)
    at = f"messages[{number}].content"
    return fields | {
        "content": [_part(part, f"{at}[{index}]", max_side_px) for index, part in enumerate(content)]
    }


def _part(part: Any, at: str, max_side_px: int) -> Any:
    if isinstance(part, ContentPart):
        part = encode(part)
    if not isinstance(part, Mapping):
        return part
    if part.get("type") == "image":
        return _named(part, at, max_side_px)
    image_url = part.get("image_url")
    if part.get("type") != "image_url" or not isinstance(image_url, Mapping):
        return part
    url = image_url.get("url")
    if not isinstance(url, str) or url[:5].lower() != "data:":
        return part
    return dict(part) | {"image_url": {**image_url, "url": _url(url, f"{at}.image_url.url", max_side_px)}}


def _named(part: Mapping[str, Any], at: str, max_side_px: int) -> dict[str, Any]:
    for name in part:
        if name not in _FIELDS:
            raise UnknownParameterError(f"{at}.{name}: unknown field", param=f"{at}.{name}")
    if "image" not in part:
        raise InvalidRequestError(f"{at}.image: is missing", param=f"{at}.image")
    image_url: dict[str, Any] = {"url": _url(part["image"], f"{at}.image", max_side_px)}
    if part.get("detail") is not None:
        image_url["detail"] = part["detail"]
    return {"type": "image_url", "image_url": image_url}


def _url(source: Any, at: str, max_side_px: int) -> str:
    try:
        return data_url(source, max_side_px=max_side_px)
    except InvalidImageError as error:
        raise InvalidImageError(f"{at}: {error.message}", param=at) from None
    except ConfigError as error:
        raise ConfigError(error.message, param=at) from None
