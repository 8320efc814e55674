"""What a client asks: OpenAI-shaped chat and completion requests, and Longshore's own fields.

Every field that decodes here is carried out by some tier or refused by it with 400; the few
that change nothing are marked neutral. Bounds stand on the fields.
"""

from __future__ import annotations

import dataclasses
import re
import secrets
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Gt, Interval, Le, Len, MaxLen, Predicate

from longshore.errors import InvalidRequestError, OutOfRangeError
from longshore.wire import limits
from longshore.wire.schema import decode

Lane = Literal["vip", "standard", "batch"]
LANES: tuple[Lane, ...] = ("vip", "standard", "batch")
Privacy = Literal["any", "device-only"]

_REQUEST_ID = re.compile(r"[0-9a-f]{32}\Z")
_TRACEPARENT = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}\Z")
_TOKEN_ID = re.compile(r"(0|[1-9][0-9]{0,9})\Z")
_DIGEST = re.compile(r"[0-9a-f]{16,64}\Z")


def _is_request_id(value: str) -> bool:
    return _REQUEST_ID.match(value) is not None


def _is_traceparent(value: str) -> bool:
    return _TRACEPARENT.match(value) is not None


def _is_digest(value: str) -> bool:
    return _DIGEST.match(value) is not None


RequestId = Annotated[str, Predicate(_is_request_id)]
ModelName = Annotated[str, Len(1, limits.MAX_MODEL_CHARS)]
ModelDigest = Annotated[str, Predicate(_is_digest)]
TokenId = Annotated[int, Interval(ge=0, le=limits.MAX_TOKEN_ID)]
Text = Annotated[str, MaxLen(limits.MAX_TEXT_CHARS)]
StopString = Annotated[str, Len(1, limits.MAX_STOP_CHARS)]
Bias = Annotated[float, Interval(ge=-100, le=100)]
MetadataText = Annotated[str, MaxLen(limits.MAX_METADATA_CHARS)]

_OPENAI_ONLY = frozenset(
    {
        "audio",
        "background",
        "best_of",
        "function_call",
        "functions",
        "include",
        "instructions",
        "modalities",
        "moderation",
        "parallel_tool_calls",
        "prediction",
        "previous_response_id",
        "prompt_cache_key",
        "prompt_cache_retention",
        "reasoning",
        "reasoning_effort",
        "safety_identifier",
        "suffix",
        "text",
        "tool_choice",
        "tools",
        "top_a",
        "truncation",
        "verbosity",
        "web_search_options",
    }
)


def new_request_id() -> str:
    """128 random bits in hexadecimal; chosen by the client, kept through every tier."""
    return secrets.token_hex(16)


# -- Longshore's own fields --------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Continuation:
    """Where an answer that began elsewhere goes on.

    `token_ids` are the answer's tokens so far, exact when the model is that of `model_digest`;
    `text` is the answer so far for a model with another tokenizer. `segment` is the number that
    the next events carry.
    """

    token_ids: Annotated[tuple[TokenId, ...], MaxLen(limits.MAX_TOKENS)] = ()
    text: Text = ""
    segment: Annotated[int, Interval(ge=0, lt=limits.MAX_SEGMENTS)] = 0
    model_digest: ModelDigest | None = None


@dataclass(frozen=True, slots=True)
class Extension:
    """The `longshore` field of a request.

    `deadline_ms` is what remains of the caller's time when the message is sent, never a
    wall-clock time. `ttft_target_ms` is the time to first token that the caller hopes for: a
    tier that expects to miss it may pass the request on. `traceparent` is W3C trace context.
    """

    request_id: RequestId | None = None
    lane: Lane | None = None
    deadline_ms: Annotated[int, Interval(ge=1, le=limits.MAX_DEADLINE_MS)] | None = None
    ttft_target_ms: Annotated[int, Interval(ge=1, le=limits.MAX_DEADLINE_MS)] | None = None
    privacy: Privacy = "any"
    traceparent: Annotated[str, Predicate(_is_traceparent)] | None = None
    continue_from: Continuation | None = None


# -- messages ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ImageUrl:
    """An image as a data: URL; servers fetch nothing."""

    url: Annotated[str, MaxLen(limits.MAX_IMAGE_URL_CHARS)]
    detail: Literal["auto", "low", "high"] = "auto"

    def __post_init__(self) -> None:
        if not self.url.startswith("data:image/"):
            raise InvalidRequestError("only data:image/... URLs are taken; nothing is fetched", param="url")


@dataclass(frozen=True, slots=True)
class ContentPart:
    """A piece of text or an image in a message; `type` names the field that is filled."""

    ALWAYS_SENT: ClassVar[frozenset[str]] = frozenset({"type"})

    UNSUPPORTED: ClassVar[frozenset[str]] = frozenset({"input_audio", "file", "refusal"})
    type: Literal["text", "image_url"]
    text: Text | None = None
    image_url: ImageUrl | None = None

    def __post_init__(self) -> None:
        if (self.text is None) == (self.type == "text") or (self.image_url is None) == (
            self.type == "image_url"
        ):
            raise InvalidRequestError(f"a part of type {self.type!r} holds exactly the field {self.type!r}")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    ALWAYS_SENT: ClassVar[frozenset[str]] = frozenset({"role", "content"})
    UNSUPPORTED: ClassVar[frozenset[str]] = frozenset(
        {"name", "tool_calls", "tool_call_id", "function_call", "refusal", "audio", "annotations"}
    )
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[tuple[ContentPart, ...], Len(1, limits.MAX_CONTENT_PARTS)]

    @property
    def text(self) -> str:
        """The text parts put together; images are left out."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content if part.text is not None)

    @property
    def images(self) -> tuple[ImageUrl, ...]:
        """The images in order."""
        if isinstance(self.content, str):
            return ()
        return tuple(part.image_url for part in self.content if part.image_url is not None)


# -- requests ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StreamOptions:
    """Whether a last chunk with the token counts is wanted."""

    UNSUPPORTED: ClassVar[frozenset[str]] = frozenset({"include_obfuscation"})
    include_usage: bool = False


@dataclass(frozen=True, slots=True)
class TextFormat:
    """The only response format there is; JSON modes are refused."""

    ALWAYS_SENT: ClassVar[frozenset[str]] = frozenset({"type"})
    UNSUPPORTED: ClassVar[frozenset[str]] = frozenset({"json_schema"})
    type: Literal["text"] = "text"


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """The fields that chat and completion requests share.

    Units: `max_tokens` and `min_tokens` in tokens; `temperature` 0 is greedy; penalties as
    OpenAI and vLLM define them. `user`, `metadata` and `store: false` change nothing.
    """

    ALWAYS_SENT: ClassVar[frozenset[str]] = frozenset({"model", "messages", "prompt"})
    UNSUPPORTED: ClassVar[frozenset[str]] = _OPENAI_ONLY

    model: ModelName
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Interval(ge=1, le=limits.MAX_TOKENS)] | None = None
    min_tokens: Annotated[int, Interval(ge=0, le=limits.MAX_TOKENS)] = 0
    temperature: Annotated[float, Interval(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Gt(0), Le(1)] = 1.0
    top_k: Annotated[int, Interval(ge=0, le=limits.MAX_TOP_K)] = 0
    min_p: Annotated[float, Interval(ge=0, le=1)] = 0.0
    n: Annotated[int, Interval(ge=1, le=limits.MAX_CHOICES)] = 1
    stop: StopString | Annotated[tuple[StopString, ...], MaxLen(limits.MAX_STOP_STRINGS)] | None = None
    ignore_eos: bool = False
    presence_penalty: Annotated[float, Interval(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Interval(ge=-2, le=2)] = 0.0
    repetition_penalty: Annotated[float, Gt(0), Le(2)] = 1.0
    logit_bias: Annotated[dict[str, Bias], MaxLen(limits.MAX_LOGIT_BIAS)] | None = None
    seed: Annotated[int, Interval(ge=-(2**63), le=2**63 - 1)] | None = None
    service_tier: Literal["auto", "default", "flex", "priority"] | None = None
    user: MetadataText | None = None
    metadata: Annotated[dict[str, MetadataText], MaxLen(limits.MAX_METADATA)] | None = None
    store: Literal[False] | None = None
    longshore: Extension = field(default_factory=Extension)

    def __post_init__(self) -> None:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError("is only allowed when stream is true", param="stream_options")
        for key in self.logit_bias or ():
            if _TOKEN_ID.match(key) is None or int(key) > limits.MAX_TOKEN_ID:
                raise OutOfRangeError(f"{key[:20]!r} is not a token id", param="logit_bias")
        if self.longshore.continue_from is not None and self.n != 1:
            raise InvalidRequestError("must be 1 where longshore.continue_from is given", param="n")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple, whichever way it was given."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else self.stop

    @property
    def lane(self) -> Lane:
        """The lane asked for: Longshore's own field, else OpenAI's `service_tier`."""
        if self.longshore.lane is not None:
            return self.longshore.lane
        return _LANE_OF_SERVICE_TIER[self.service_tier or "auto"]

    @property
    def token_limit(self) -> int | None:
        """The most tokens to generate; None leaves it to what the context holds."""
        return self.max_tokens


_LANE_OF_SERVICE_TIER: dict[str, Lane] = {
    "auto": "standard",
    "default": "standard",
    "flex": "batch",
    "priority": "vip",
}


@dataclass(frozen=True, kw_only=True)
class ChatRequest(GenerationRequest):
    """`POST /v1/chat/completions`."""

    messages: Annotated[tuple[Message, ...], Len(1, limits.MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Interval(ge=1, le=limits.MAX_TOKENS)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Interval(ge=0, le=limits.MAX_TOP_LOGPROBS)] = 0
    response_format: TextFormat | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequestError("needs logprobs to be true", param="top_logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens):
            raise InvalidRequestError("can't stand beside max_tokens", param="max_completion_tokens")
        if sum(len(message.images) for message in self.messages) > limits.MAX_IMAGES:
            raise OutOfRangeError(f"must hold at most {limits.MAX_IMAGES} images", param="messages")

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_logprobs(self) -> int | None:
        """How many alternatives to report per token; None reports no log-probabilities."""
        return self.top_logprobs if self.logprobs else None


Prompt = (
    Text
    | Annotated[tuple[Text, ...], Len(1, limits.MAX_PROMPTS)]
    | Annotated[tuple[TokenId, ...], Len(1, limits.MAX_PROMPT_TOKENS)]
    | Annotated[
        tuple[Annotated[tuple[TokenId, ...], Len(1, limits.MAX_PROMPT_TOKENS)], ...],
        Len(1, limits.MAX_PROMPTS),
    ]
)


@dataclass(frozen=True, kw_only=True)
class CompletionRequest(GenerationRequest):
    """`POST /v1/completions`; a prompt is text or token ids, or a list of either."""

    prompt: Prompt
    max_tokens: Annotated[int, Interval(ge=1, le=limits.MAX_TOKENS)] = 16
    logprobs: Annotated[int, Interval(ge=0, le=limits.MAX_TOP_LOGPROBS)] | None = None
    echo: Literal[False] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.longshore.continue_from is not None and len(self.prompts) != 1:
            raise InvalidRequestError("must be one prompt with longshore.continue_from", param="prompt")

    @property
    def prompts(self) -> tuple[str | tuple[int, ...], ...]:
        """The prompts one by one."""
        if isinstance(self.prompt, str):
            return (self.prompt,)
        if isinstance(self.prompt[0], int):
            return (self.prompt,)
        return self.prompt

    @property
    def num_logprobs(self) -> int | None:
        """How many alternatives to report per token; None reports no log-probabilities."""
        return self.logprobs


AnyRequest = ChatRequest | CompletionRequest


def decode_chat_request(body: Any) -> ChatRequest:
    """A chat request from a parsed body; raises InvalidRequestError naming the field."""
    return decode(ChatRequest, body)


def decode_completion_request(body: Any) -> CompletionRequest:
    """A completion request from a parsed body; raises InvalidRequestError naming the field."""
    return decode(CompletionRequest, body)


def decode_any_request(body: Any) -> AnyRequest:
    """A chat request where the body has `messages`, else a completion request."""
    if isinstance(body, dict) and "prompt" in body and "messages" not in body:
        return decode_completion_request(body)
    return decode_chat_request(body)


def with_extension(request: AnyRequest, **changes: Any) -> AnyRequest:
    """The request with some of its `longshore` fields replaced."""
    return dataclasses.replace(request, longshore=dataclasses.replace(request.longshore, **changes))


__all__ = [
    "LANES",
    "AnyRequest",
    "ChatRequest",
    "CompletionRequest",
    "ContentPart",
    "Continuation",
    "Extension",
    "GenerationRequest",
    "ImageUrl",
    "Lane",
    "Message",
    "ModelDigest",
    "Privacy",
    "RequestId",
    "StreamOptions",
    "TextFormat",
    "TokenId",
    "decode_any_request",
    "decode_chat_request",
    "decode_completion_request",
    "new_request_id",
    "with_extension",
]
