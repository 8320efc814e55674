"""What happens to a request, as every tier tells it: tokens, the end of a choice, and who served it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Interval, MaxLen

from longshore.wire import limits
from longshore.wire.request import ModelDigest, Text, TokenId

Tier = Literal["device", "edge", "core"]
TIERS: tuple[Tier, ...] = ("device", "edge", "core")
FinishReason = Literal["stop", "length"]
Outcome = Literal["served", "skipped", "failed", "interrupted"]
ImageReason = Literal["full", "budget", "context", "quickest", "asked", "kept"]

Offset = Annotated[int, Interval(ge=0, le=limits.MAX_TOKENS)]
ByteOffset = Annotated[int, Interval(ge=0, le=2**40)]
Index = Annotated[int, Interval(ge=0, lt=limits.MAX_CHOICES * limits.MAX_PROMPTS)]
SegmentNumber = Annotated[int, Interval(ge=0, lt=limits.MAX_SEGMENTS)]
Milliseconds = Annotated[float, Interval(ge=0, le=1e9)]
ShortText = Annotated[str, MaxLen(2000)]


@dataclass(frozen=True, slots=True)
class TopLogprob:
    """One alternative at a position: its text, bytes and natural-log probability."""

    ALWAYS_SENT: ClassVar[frozenset[str]] = frozenset({"token", "logprob", "bytes"})
    token: str
    logprob: float
    bytes: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The chosen token's log-probability and the alternatives', as OpenAI's chat API has them."""

    ALWAYS_SENT: ClassVar[frozenset[str]] = frozenset({"token", "logprob", "bytes", "top_logprobs"})
    token: str
    logprob: float
    bytes: tuple[int, ...] | None = None
    top_logprobs: tuple[TopLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenMark:
    """Where a token stands in the answer, so that a reader can go on from exactly there.

    `offset` counts the tokens of the choice from 0, over all segments. `byte_offset` is where
    the token's text begins in the UTF-8 answer of the choice; text that is held back (part of a
    character, or of a stop string) comes with a later token, and `byte_offset` then says so by
    lagging behind.
    """

    ALWAYS_SENT: ClassVar[frozenset[str]] = frozenset(
        {"segment", "offset", "token_id", "byte_offset", "model_digest"}
    )
    segment: SegmentNumber
    offset: Offset
    token_id: TokenId
    byte_offset: ByteOffset
    model_digest: ModelDigest


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One token of one choice. `text` is what became readable with it, possibly nothing."""

    mark: TokenMark
    text: Text = ""
    index: Index = 0
    logprob: TokenLogprob | None = None


@dataclass(frozen=True, slots=True)
class PromptTokensDetails:
    """How much of the prompt came from the prefix cache, in tokens."""

    ALWAYS_SENT: ClassVar[frozenset[str]] = frozenset({"cached_tokens"})
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of a request, OpenAI's names."""

    ALWAYS_SENT: ClassVar[frozenset[str]] = frozenset({"prompt_tokens", "completion_tokens", "total_tokens"})
    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    prompt_tokens_details: PromptTokensDetails | None = None


@dataclass(frozen=True, slots=True)
class Attempt:
    """One tier that was considered, what came of it, and why in words with figures."""

    ALWAYS_SENT: ClassVar[frozenset[str]] = frozenset({"tier", "outcome", "reason"})
    tier: Tier
    outcome: Outcome
    reason: ShortText
    node: ShortText | None = None
    elapsed_ms: Milliseconds | None = None


@dataclass(frozen=True, slots=True)
class Hop:
    """Time that a request spent at one tier, by that tier's own monotonic clock, in ms.

    `total_ms` contains what the tiers behind took; `queue_ms` is waiting before work began.
    """

    ALWAYS_SENT: ClassVar[frozenset[str]] = frozenset({"tier", "node"})
    tier: Tier
    node: ShortText
    queue_ms: Milliseconds | None = None
    ttft_ms: Milliseconds | None = None
    total_ms: Milliseconds | None = None


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of tokens from one model; a new one begins where another model went on."""

    ALWAYS_SENT: ClassVar[frozenset[str]] = frozenset({"number", "tier", "node", "model_digest", "offset"})
    number: SegmentNumber
    tier: Tier
    node: ShortText
    model_digest: ModelDigest
    offset: Offset


@dataclass(frozen=True, slots=True)
class ImageUse:
    """One picture of the prompt: the size it was read at, its tokens, and why it was no larger.

    `why` is `full` where a larger size would add nothing or there is none, `budget` where one was predicted
    to take too long, `context` where it would not fit beside the text, `quickest` where every size was
    predicted to take too long, `asked` where the request's `detail` is low, and `kept` where an earlier turn
    had read the same picture at this size.
    `predicted_ms` is the time to the first token that the choice went by, None where nothing was measured.
    """

    ALWAYS_SENT: ClassVar[frozenset[str]] = frozenset({"width_px", "height_px", "num_tokens", "why"})
    width_px: Annotated[int, Interval(ge=1, le=8192)]
    height_px: Annotated[int, Interval(ge=1, le=8192)]
    num_tokens: Annotated[int, Interval(ge=1, le=65536)]
    why: ImageReason
    predicted_ms: Milliseconds | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """Who answered, what was tried first and where the time went; rides on every answer.

    `images` are the prompt's pictures in order, as the tier that began the answer read them.
    """

    ALWAYS_SENT: ClassVar[frozenset[str]] = frozenset({"request_id", "served_by", "node", "model_digest"})
    request_id: ShortText
    served_by: Tier
    node: ShortText
    model_digest: ModelDigest
    reason: ShortText = ""
    cached: bool = False
    resumed: bool = False
    degraded: bool = False
    attempts: Annotated[tuple[Attempt, ...], MaxLen(limits.MAX_ATTEMPTS)] = ()
    hops: Annotated[tuple[Hop, ...], MaxLen(limits.MAX_HOPS)] = ()
    segments: Annotated[tuple[Segment, ...], MaxLen(limits.MAX_SEGMENTS)] = ()
    images: Annotated[tuple[ImageUse, ...], MaxLen(limits.MAX_IMAGES)] = ()


@dataclass(frozen=True, slots=True)
class FinishEvent:
    """The true end of one choice; `text` is what was held back and turned out to be answer.

    The last choice's event carries `usage` and `report`.
    """

    finish_reason: FinishReason
    index: Index = 0
    text: Text = ""
    usage: Usage | None = None
    report: Report | None = None


AnswerEvent = TokenEvent | FinishEvent


def usage_of(prompt_tokens: int, completion_tokens: int, cached_tokens: int = 0) -> Usage:
    """Usage with its total; the cached part is told only where there is one."""
    details = PromptTokensDetails(cached_tokens) if cached_tokens else None
    return Usage(prompt_tokens, completion_tokens, prompt_tokens + completion_tokens, details)
