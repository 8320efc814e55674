"""OpenAI-shaped answers: whole and in chunks, for chat and for completions.

The dataclasses are what the SDK hands to its callers; decoding is lenient, so that answers of
other OpenAI-shaped servers are read too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from longshore.wire.event import Report, TokenLogprob, TokenMark, Usage
from longshore.wire.schema import decode

_CHOICE = frozenset({"index", "finish_reason", "logprobs"})


@dataclass(frozen=True, slots=True)
class AssistantMessage:
    """The answer of a chat."""

    ALWAYS_SENT: ClassVar[frozenset[str]] = frozenset({"role", "content"})
    content: str | None
    role: str = "assistant"


@dataclass(frozen=True, slots=True)
class ChatLogprobs:
    """One entry per token of the answer."""

    content: tuple[TokenLogprob, ...] | None = None


@dataclass(frozen=True, slots=True)
class ChatChoice:
    """One of the `n` answers."""

    ALWAYS_SENT: ClassVar[frozenset[str]] = _CHOICE | {"message"}
    index: int
    message: AssistantMessage
    finish_reason: str | None = None
    logprobs: ChatLogprobs | None = None


@dataclass(frozen=True, slots=True)
class ChatCompletion:
    """The body of a finished `POST /v1/chat/completions`. `created` is Unix time in seconds."""

    ALWAYS_SENT: ClassVar[frozenset[str]] = frozenset(
        {"id", "object", "created", "model", "choices", "usage"}
    )
    id: str
    created: int
    model: str
    choices: tuple[ChatChoice, ...]
    usage: Usage | None = None
    longshore: Report | None = None
    object: Literal["chat.completion"] = "chat.completion"


@dataclass(frozen=True, slots=True)
class Delta:
    """What a chunk adds to the message."""

    role: str | None = None
    content: str | None = None


@dataclass(frozen=True, slots=True)
class ChatChunkChoice:
    """What a chunk says of one choice."""

    ALWAYS_SENT: ClassVar[frozenset[str]] = _CHOICE | {"delta"}
    index: int
    delta: Delta
    finish_reason: str | None = None
    logprobs: ChatLogprobs | None = None


@dataclass(frozen=True, slots=True)
class ChunkExtension:
    """The `longshore` field of a chunk: a token's place, or at the end the report and the counts."""

    mark: TokenMark | None = None
    report: Report | None = None
    usage: Usage | None = None


@dataclass(frozen=True, slots=True)
class ChatCompletionChunk:
    """One `data:` event of a streamed chat."""

    ALWAYS_SENT: ClassVar[frozenset[str]] = frozenset({"id", "object", "created", "model", "choices"})
    id: str
    created: int
    model: str
    choices: tuple[ChatChunkChoice, ...]
    usage: Usage | None = None
    longshore: ChunkExtension | None = None
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"


@dataclass(frozen=True, slots=True)
class CompletionLogprobs:
    """Log-probabilities in the older completion API's shape: parallel lists, one entry a token."""

    tokens: tuple[str, ...] = ()
    token_logprobs: tuple[float | None, ...] = ()
    top_logprobs: tuple[dict[str, float] | None, ...] = ()
    text_offset: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class CompletionChoice:
    """One answer of a completion, or what a chunk adds to it."""

    ALWAYS_SENT: ClassVar[frozenset[str]] = _CHOICE | {"text"}
    index: int
    text: str
    finish_reason: str | None = None
    logprobs: CompletionLogprobs | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """The body of `POST /v1/completions`; its chunks have the same shape."""

    ALWAYS_SENT: ClassVar[frozenset[str]] = frozenset({"id", "object", "created", "model", "choices"})
    id: str
    created: int
    model: str
    choices: tuple[CompletionChoice, ...]
    usage: Usage | None = None
    longshore: Report | ChunkExtension | None = None
    object: Literal["text_completion"] = "text_completion"


@dataclass(frozen=True, slots=True)
class ModelCard:
    """One entry of `GET /v1/models`; aliases are listed under their own ids with `root` set.

    `input_modalities` is what its requests may hold, "text" and "image"; None where the tier does not say.
    """

    ALWAYS_SENT: ClassVar[frozenset[str]] = frozenset({"id", "object", "created", "owned_by"})
    id: str
    created: int = 0
    owned_by: str = "longshore"
    root: str | None = None
    max_model_len: int | None = None
    model_digest: str | None = None
    input_modalities: tuple[str, ...] | None = None
    object: Literal["model"] = "model"


@dataclass(frozen=True, slots=True)
class ModelList:
    """The body of `GET /v1/models`."""

    ALWAYS_SENT: ClassVar[frozenset[str]] = frozenset({"object", "data"})
    data: tuple[ModelCard, ...] = ()
    object: Literal["list"] = "list"


def decode_chat_completion(body: Any) -> ChatCompletion:
    """A whole chat answer; unknown fields are skipped."""
    return decode(ChatCompletion, body, lenient=True)


def decode_chat_chunk(body: Any) -> ChatCompletionChunk:
    """A chunk of a streamed chat; unknown fields are skipped."""
    return decode(ChatCompletionChunk, body, lenient=True)
