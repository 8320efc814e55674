"""The keyword arguments of `create(...)`: typed for editors and checkers, turned into wire requests.

Knows names and shapes; what a value may be is the wire's to say.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypedDict

from longshore.config import Mode
from longshore.image_parts import with_data_urls
from longshore.wire import (
    ChatRequest,
    CompletionRequest,
    Lane,
    Message,
    StreamOptions,
    TextFormat,
    decode_chat_request,
    decode_completion_request,
    encode,
)


class _LongshoreParams(TypedDict, total=False):
    """Longshore's own: routing, time, privacy."""

    mode: Mode | None
    deadline_ms: int | None
    ttft_target_ms: int | None
    lane: Lane | None
    privacy: Literal["any", "device-only"] | None
    request_id: str | None
    traceparent: str | None


class _SharedParams(_LongshoreParams, total=False):
    model: str
    stream_options: StreamOptions | Mapping[str, Any] | None
    max_tokens: int | None
    min_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    n: int | None
    stop: str | Iterable[str] | None
    ignore_eos: bool | None
    presence_penalty: float | None
    frequency_penalty: float | None
    repetition_penalty: float | None
    logit_bias: Mapping[str, float] | None
    seed: int | None
    service_tier: Literal["auto", "default", "flex", "priority"] | None
    user: str | None
    metadata: Mapping[str, str] | None
    store: Literal[False] | None


class ChatParams(_SharedParams, total=False):
    """What `client.chat.completions.create` takes beside `stream`.

    A part of a message's content may be `{"type": "image", "image": ...}`: a PIL image, bytes or a path.
    """

    messages: Iterable[Message | Mapping[str, Any]]
    max_completion_tokens: int | None
    logprobs: bool | None
    top_logprobs: int | None
    response_format: TextFormat | Mapping[str, Any] | None


class CompletionParams(_SharedParams, total=False):
    """What `client.completions.create` takes beside `stream`."""

    prompt: str | Iterable[str] | Iterable[int] | Iterable[Iterable[int]]
    logprobs: int | None
    echo: Literal[False] | None


_EXTENSION = frozenset(_LongshoreParams.__annotations__) - {"mode"}


def chat_request(
    params: Mapping[str, Any],
    stream: bool,
    defaults: Mapping[str, Any],
    image_max_side_px: int = 1536,
) -> ChatRequest:
    """The wire's request; TypeError for a name that does not exist, InvalidRequestError for a value.

    Pictures are read, scaled and written anew here, which takes some milliseconds each.
    """
    messages = params.get("messages")
    if isinstance(messages, Iterable) and not isinstance(messages, str | bytes | Mapping):
        params = {**params, "messages": with_data_urls(messages, image_max_side_px)}
    return decode_chat_request(_body(ChatRequest, ChatParams, params, stream, defaults))


def completion_request(
    params: Mapping[str, Any], stream: bool, defaults: Mapping[str, Any]
) -> CompletionRequest:
    """The same for a completion."""
    return decode_completion_request(_body(CompletionRequest, CompletionParams, params, stream, defaults))


def _body(
    cls: type[ChatRequest | CompletionRequest],
    known: Any,
    params: Mapping[str, Any],
    stream: bool,
    defaults: Mapping[str, Any],
) -> dict[str, Any]:
    body: dict[str, Any] = {"stream": stream}
    extension = dict(defaults)
    for name, value in params.items():
        # What OpenAI knows and we do not carry out goes on to the wire, which says so by name.
        if name not in known.__annotations__ and name not in cls.UNSUPPORTED:
            raise TypeError(f"create() got an unexpected keyword argument {name!r}")
        if value is None or name == "mode":
            continue
        (extension if name in _EXTENSION else body)[name] = _plain(value)
    body["longshore"] = extension
    return body


def _plain(value: Any) -> Any:
    """JSON's own types, out of tuples, mappings, iterators and wire dataclasses."""
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return encode(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, bytes | bytearray):
        return [_plain(item) for item in value]
    return value


__all__ = ["ChatParams", "CompletionParams", "chat_request", "completion_request"]
