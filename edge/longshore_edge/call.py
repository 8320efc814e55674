"""One request on its way through the edge: what arrived, what remains of its time, and what was tried.

Pure data; the request that arrived is never changed, only the one that is sent on is built from it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from longshore.errors import DeadlineExceededError
from longshore.wire import (
    AnyRequest,
    Attempt,
    ChatRequest,
    CompletionRequest,
    Extension,
    Hop,
    Tier,
    dump_json,
    encode,
    limits,
)
from longshore.wire.event import Outcome
from longshore_edge.auth import Client, asks_for_a_lane
from longshore_edge.geo import Place

CHAT_PATH = "/v1/chat/completions"
COMPLETION_PATH = "/v1/completions"


@dataclass(slots=True)
class Call:
    """`arrived_s` and `deadline_s` are of this process's monotonic clock, in seconds."""

    request: AnyRequest
    client: Client
    request_id: str
    arrived_s: float
    deadline_s: float | None = None
    place: Place | None = None
    traceparent: str | None = None
    attempts: list[Attempt] = field(default_factory=list)
    cache_key: bytes | None = None

    @property
    def path(self) -> str:
        """The route of the request, the same on every tier."""
        return CHAT_PATH if isinstance(self.request, ChatRequest) else COMPLETION_PATH

    @property
    def id_prefix(self) -> str:
        """What stands before the request id in the answer's `id`."""
        return "chatcmpl-" if isinstance(self.request, ChatRequest) else "cmpl-"

    @property
    def num_choices(self) -> int:
        """Choices that the answer has: `n` for each prompt."""
        prompts = len(self.request.prompts) if isinstance(self.request, CompletionRequest) else 1
        return self.request.n * prompts

    @property
    def first_image(self) -> str | None:
        """The path of the request's first picture; None where there is none."""
        if not isinstance(self.request, ChatRequest):
            return None
        for number, message in enumerate(self.request.messages):
            parts = () if isinstance(message.content, str) else message.content
            for index, part in enumerate(parts):
                if part.image_url is not None:
                    return f"messages[{number}].content[{index}].image_url"
        return None

    @property
    def wants_usage(self) -> bool:
        """True if the stream ends with a usage chunk."""
        options = self.request.stream_options
        return options is not None and options.include_usage

    def remaining_s(self, now_s: float) -> float | None:
        """What is left of the caller's time; raises DeadlineExceededError when nothing is."""
        if self.deadline_s is None:
            return None
        left_s = self.deadline_s - now_s
        if left_s <= 0:
            raise DeadlineExceededError("the request's time ran out at the edge", request_id=self.request_id)
        return left_s

    def body(self, now_s: float) -> bytes:
        """The request as it is sent to a core now, rebuilt from its types."""
        left_s = self.remaining_s(now_s)
        came = self.request.longshore
        lane = came.lane
        if self.client.best_lane == "batch" and not asks_for_a_lane(self.request):
            lane = "batch"
        extension = Extension(
            request_id=self.request_id,
            lane=lane,
            deadline_ms=None if left_s is None else min(limits.MAX_DEADLINE_MS, max(1, int(left_s * 1e3))),
            ttft_target_ms=came.ttft_target_ms,
            traceparent=self.traceparent,
            continue_from=came.continue_from,
        )
        return dump_json(encode(dataclasses.replace(self.request, longshore=extension)))

    def note(
        self,
        tier: Tier,
        outcome: Outcome,
        reason: str,
        *,
        node: str | None = None,
        elapsed_s: float | None = None,
    ) -> None:
        """Add an attempt to the report; beyond the wire's bound the oldest go."""
        elapsed_ms = None if elapsed_s is None else round(elapsed_s * 1e3, 3)
        self.attempts.append(Attempt(tier, outcome, reason[:2000], node, elapsed_ms))
        del self.attempts[: -limits.MAX_ATTEMPTS // 2]


def complete_report(
    report: dict[str, Any], call: Call, node: str, ttft_s: float | None, now_s: float
) -> None:
    """Add this edge's attempts and hop to the report of the tier behind, in place."""
    theirs = report.get("attempts")
    kept = [item for item in theirs if _is_unserved(item)] if isinstance(theirs, list) else []
    report["attempts"] = [encode(attempt) for attempt in call.attempts] + kept[: limits.MAX_ATTEMPTS // 2]
    hops = report.get("hops")
    behind = hops[: limits.MAX_HOPS - 1] if isinstance(hops, list) else []
    report["hops"] = [hop(call, node, ttft_s, now_s), *behind]  # in the order in which the request met them
    if not report.get("reason") and call.attempts:
        report["reason"] = call.attempts[-1].reason


def hop(call: Call, node: str, ttft_s: float | None, now_s: float) -> dict[str, Any]:
    """The time that the request spent at this edge, as JSON; `ttft_s` is the clock's at the first token."""
    return encode(
        Hop(
            "edge",
            node,
            ttft_ms=None if ttft_s is None else round((ttft_s - call.arrived_s) * 1e3, 3),
            total_ms=round((now_s - call.arrived_s) * 1e3, 3),
        )
    )


def _is_unserved(attempt: object) -> bool:
    """Attempts of the tier behind that failed or were skipped; that it served is said already."""
    return isinstance(attempt, dict) and attempt.get("outcome") != "served"
