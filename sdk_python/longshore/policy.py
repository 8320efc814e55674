"""Which tier next, how long it may take, and how long to wait: pure functions of live measurements.

Owns no clock, socket or state: what it is told is what it knows, and equal input gives equal output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from longshore.config import Mode, RoutingSettings
from longshore.wire import AnyRequest, ChatRequest, Tier

# What the figures of a prediction are worth: the next tier's need is multiplied by this.
_RESERVE_FACTOR = 1.25
_RESERVE_MS = 25.0
_OVERHEAD_TOKENS_PER_MESSAGE = 4
_TOKENS_PER_IMAGE = 256
_BYTES_PER_TOKEN = 4
# A tier whose slow measurement was forgotten must come out clearly under the target, not at it.
_OPTIMISM = 0.8
# Between asking the device's process and its first step; calibration measures the steps alone.
_DEVICE_OVERHEAD_MS = 2.0


@dataclass(frozen=True, slots=True)
class TierView:
    """What is known of one tier at one moment.

    `ttft_ms` and `ms_per_token` are moving averages, None before the first measurement, and
    `age_ms` is how long ago they were last updated. A device tells `prefill_tokens_per_s` of its
    calibration instead, and `slowdown`, the measured time over the calibrated one.
    `num_waiting` requests of ours wait there for their first token, the oldest for `oldest_wait_ms`;
    each of them makes the next one's wait longer by the measured share `crowding`.
    `image_ms` is what a device's encoder takes for one picture, beside the reading of its tokens.
    `open_for_ms` is above 0 while the breaker is open, `busy_for_ms` while a Retry-After runs,
    `broken` says why the tier can't serve at all.
    """

    tier: Tier
    node: str
    ttft_ms: float | None = None
    ms_per_token: float | None = None
    age_ms: float = 0.0
    prefill_tokens_per_s: float | None = None
    slowdown: float = 1.0
    num_in_flight: int = 0
    num_waiting: int = 0
    crowding: float = 0.25
    oldest_wait_ms: float = 0.0
    num_queued: int = 0
    ready_in_ms: float = 0.0
    open_for_ms: float = 0.0
    busy_for_ms: float = 0.0
    last_error: str = ""
    max_model_len: int | None = None
    takes_images: bool = True
    image_ms: float = 0.0
    broken: str = ""


@dataclass(frozen=True, slots=True)
class RequestFacts:
    """What of a request matters for choosing a tier. Times that remain, in ms."""

    num_prompt_tokens: int
    max_tokens: int | None
    remaining_ms: float
    ttft_target_ms: float
    device_only: bool = False
    num_images: int = 0
    answer_tokens: float = 64.0

    @property
    def expected_tokens(self) -> float:
        """How long the answer will probably be: what answers were so far, at most what is allowed."""
        return min(self.answer_tokens, self.max_tokens) if self.max_tokens else self.answer_tokens


@dataclass(frozen=True, slots=True)
class Candidate:
    """A tier to try. `note` says how it stands, `reason` why it is where it is in the order.

    `basis_ms` is the prediction before the measured slowdown is applied.
    """

    tier: Tier
    node: str
    predicted_ttft_ms: float
    predicted_total_ms: float
    reason: str
    note: str = ""
    basis_ms: float = 0.0
    is_measured: bool = False
    in_time: bool = True
    on_target: bool = True


@dataclass(frozen=True, slots=True)
class Skipped:
    """A tier that is ruled out now. `retry_in_ms` is when it may be asked again, None for never."""

    tier: Tier
    node: str
    reason: str
    retry_in_ms: float | None = None
    prompt_too_long: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """The tiers to try in order, and those ruled out."""

    candidates: tuple[Candidate, ...]
    skipped: tuple[Skipped, ...]


def plan(views: Sequence[TierView], facts: RequestFacts, mode: Mode, settings: RoutingSettings) -> Plan:
    """Order the tiers for a request.

    Auto prefers the core's model (through an edge where there is one), as long as the predicted
    time to first token meets the target; otherwise the fastest tier. Tiers predicted to miss the
    deadline come last.
    """
    candidates: list[Candidate] = []
    skipped: list[Skipped] = []
    for view in views:
        ruled_out = _ruled_out(view, facts, mode)
        if ruled_out is not None:
            skipped.append(ruled_out)
        else:
            candidates.append(_candidate(view, facts, settings))
    ordered = sorted(candidates, key=lambda item: _order(item, mode))
    return Plan(_with_reasons(ordered, facts, mode), tuple(skipped))


# -- ruling out --------------------------------------------------------------------------------

_ONLY: dict[str, Tier] = {"device-only": "device", "edge-only": "edge", "core-only": "core"}


def _ruled_out(view: TierView, facts: RequestFacts, mode: Mode) -> Skipped | None:
    if facts.device_only and view.tier != "device":
        return Skipped(view.tier, view.node, "the request must not leave the device")
    if mode in _ONLY and view.tier != _ONLY[mode]:
        return Skipped(view.tier, view.node, f"mode {mode}")
    if view.broken:
        return Skipped(view.tier, view.node, view.broken)
    if facts.num_images and not view.takes_images:
        return Skipped(view.tier, view.node, "takes no images")
    if view.max_model_len is not None and facts.num_prompt_tokens >= view.max_model_len:
        return Skipped(view.tier, view.node, _too_long(view, facts), prompt_too_long=True)
    if view.open_for_ms > 0:
        words = f"breaker open for another {_ms(view.open_for_ms)}"
        return Skipped(view.tier, view.node, _because(words, view.last_error), view.open_for_ms)
    if view.busy_for_ms > 0:
        words = f"said it is busy for another {_ms(view.busy_for_ms)}"
        return Skipped(view.tier, view.node, words, view.busy_for_ms)
    return None


def _too_long(view: TierView, facts: RequestFacts) -> str:
    return f"a prompt of about {facts.num_prompt_tokens} tokens does not fit its {view.max_model_len}"


def _because(words: str, last_error: str) -> str:
    return f"{words} after {last_error}" if last_error else words


# -- predicting --------------------------------------------------------------------------------


def _candidate(view: TierView, facts: RequestFacts, settings: RoutingSettings) -> Candidate:
    ms_per_token = view.ms_per_token if view.ms_per_token is not None else settings.prior_ms_per_token
    basis_ms, ttft_ms = _ttft(view, facts, settings, ms_per_token)
    total_ms = ttft_ms + facts.expected_tokens * ms_per_token
    is_measured = view.ttft_ms is not None or view.prefill_tokens_per_s is not None
    on_target = ttft_ms <= facts.ttft_target_ms
    sign = "<=" if on_target else ">"
    words = "predicted" if is_measured else "not measured yet, prior"
    return Candidate(
        view.tier,
        view.node,
        ttft_ms,
        total_ms,
        reason="",
        note=f"{view.tier} {words} {_ms(ttft_ms)} {sign} target {_ms(facts.ttft_target_ms)}",
        basis_ms=basis_ms,
        is_measured=is_measured,
        in_time=total_ms <= facts.remaining_ms,
        on_target=on_target,
    )


def _ttft(
    view: TierView, facts: RequestFacts, settings: RoutingSettings, ms_per_token: float
) -> tuple[float, float]:
    """The predicted time to first token, before and after the measured slowdown."""
    if view.prefill_tokens_per_s is not None:
        own_ms = _DEVICE_OVERHEAD_MS + facts.num_prompt_tokens / max(view.prefill_tokens_per_s, 1e-3) * 1000
        own_ms += facts.num_images * view.image_ms
        ahead = view.num_in_flight + view.num_queued  # the device answers one at a time
        basis_ms = own_ms + ahead * (own_ms + facts.answer_tokens * ms_per_token)
        slowdown = _faded(view.slowdown, 1.0, view.age_ms, settings)
        return basis_ms, view.ready_in_ms + basis_ms * slowdown
    prior_ms = prior_ttft_ms(view.tier, settings)
    if view.tier != "device":  # so that a target below the prior does not keep a tier unmeasured for ever
        prior_ms = _OPTIMISM * min(prior_ms, facts.ttft_target_ms)
    quiet_ms = prior_ms if view.ttft_ms is None else _faded(view.ttft_ms, prior_ms, view.age_ms, settings)
    crowded_ms = quiet_ms * (1 + view.num_waiting * view.crowding)
    ttft_ms = view.ready_in_ms + max(crowded_ms, view.oldest_wait_ms)
    return ttft_ms, ttft_ms


def prior_ttft_ms(tier: Tier, settings: RoutingSettings) -> float:
    """The time to first token that a tier is given before it was measured."""
    return {
        "edge": settings.edge_prior_ttft_ms,
        "core": settings.core_prior_ttft_ms,
        "device": settings.device_prior_ttft_ms,
    }[tier]


def _faded(measured: float, prior: float, age_ms: float, settings: RoutingSettings) -> float:
    """A measurement worse than the prior fades towards it with age; a better one stays."""
    if measured <= prior:
        return measured
    return float(prior + (measured - prior) * 0.5 ** (age_ms / 1000 / settings.measure_half_life_s))


# -- ordering ----------------------------------------------------------------------------------

_QUALITY: dict[Tier, int] = {"edge": 0, "core": 1, "device": 2}
_CORE_FIRST: dict[Tier, int] = {"core": 0, "edge": 1, "device": 2}


def _order(item: Candidate, mode: Mode) -> tuple[float | str, ...]:
    preferred = 0
    if mode == "prefer-device":
        preferred = int(item.tier != "device")
    elif mode == "prefer-core":
        preferred = _CORE_FIRST[item.tier]
    rank, tie = _QUALITY[item.tier], item.node
    if not item.in_time:
        return (preferred, 2, 0, item.predicted_total_ms, rank, tie)
    if not item.on_target:
        return (preferred, 1, 0, item.predicted_ttft_ms, rank, tie)
    return (preferred, 0, rank, item.predicted_ttft_ms, item.predicted_total_ms, tie)


def _with_reasons(ordered: list[Candidate], facts: RequestFacts, mode: Mode) -> tuple[Candidate, ...]:
    return tuple(
        replace(item, reason=_reason(item, passed_over(ordered[position:]), facts, mode))
        for position, item in enumerate(ordered)
    )


def passed_over(order: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """Those behind the first whose model is better, and which were too slow this time."""
    if not order:
        return ()
    first = order[0]
    return tuple(
        item
        for item in order[1:]
        if item.tier != first.tier and _QUALITY[item.tier] < _QUALITY[first.tier] and not _meets(item)
    )


def _meets(item: Candidate) -> bool:
    return item.on_target and item.in_time


def _reason(item: Candidate, slower: tuple[Candidate, ...], facts: RequestFacts, mode: Mode) -> str:
    if slower and mode == "auto":
        return "; ".join([*(_shortfall(other, facts) for other in slower), _brief(item)])
    if item.in_time:
        return item.note if mode == "auto" else f"mode {mode}; {_brief(item)}"
    return _shortfall(item, facts)


def _brief(item: Candidate) -> str:
    return f"{item.tier} {_ms(item.predicted_ttft_ms)}"


def _shortfall(item: Candidate, facts: RequestFacts) -> str:
    if item.in_time:
        return item.note
    return (
        f"{item.tier} predicted {_ms(item.predicted_total_ms)} in all > {_ms(facts.remaining_ms)} that remain"
    )


def _ms(value: float) -> str:
    return f"{value:.0f} ms" if value < 10_000 else f"{value / 1000:.1f} s"


# -- time --------------------------------------------------------------------------------------


def first_token_budget_ms(remaining_ms: float, fallbacks: Sequence[Candidate]) -> float:
    """How long a tier may take to its first token: what remains, less what the next one needs.

    Where the next one could not make it anyway, nothing is held back for it.
    """
    if not fallbacks:
        return remaining_ms
    need_ms = min(item.predicted_total_ms for item in fallbacks) * _RESERVE_FACTOR + _RESERVE_MS
    return remaining_ms - need_ms if need_ms < remaining_ms else remaining_ms


def backoff_s(
    num_rounds: int, random_unit: float, settings: RoutingSettings, retry_after_s: float | None = None
) -> float:
    """Full jitter (Brooker, AWS 2015) over a doubling cap, never before a Retry-After is over."""
    cap_s = min(settings.backoff_cap_s, settings.backoff_base_s * 2.0 ** min(num_rounds, 30))
    return (retry_after_s or 0.0) + random_unit * cap_s


# -- the request -------------------------------------------------------------------------------


def estimate_prompt_tokens(request: AnyRequest) -> int:
    """A rough count without a tokenizer: four bytes a token, and a fixed price for an image."""
    if not isinstance(request, ChatRequest):
        return max(_prompt_tokens(prompt) for prompt in request.prompts)
    num_text_bytes = sum(len(message.text.encode()) for message in request.messages)
    overhead = _OVERHEAD_TOKENS_PER_MESSAGE * len(request.messages)
    return num_text_bytes // _BYTES_PER_TOKEN + overhead + count_images(request) * _TOKENS_PER_IMAGE


def _prompt_tokens(prompt: str | tuple[int, ...]) -> int:
    return len(prompt.encode()) // _BYTES_PER_TOKEN + 1 if isinstance(prompt, str) else len(prompt)


def count_images(request: AnyRequest) -> int:
    """How many pictures its messages hold."""
    return sum(len(item.images) for item in request.messages) if isinstance(request, ChatRequest) else 0
