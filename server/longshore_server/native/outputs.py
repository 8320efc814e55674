"""What the engine hands out: one TokenOutput per token or ending, and a snapshot of its counters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length", "deadline", "abort", "error"]


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """One token of an answer, its ending, or both.

    `offset` is the token's index in the answer, counting `continue_from`. An ending without a token (abort,
    deadline, error) has `token_id` None and `offset` at the next index. A stop token is handed out, with
    `finish_reason` "stop": the caller leaves it out of the text.
    """

    request_id: str
    token_id: int | None
    offset: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    finish_reason: FinishReason | None = None
    error: str | None = None
    num_cached_tokens: int = 0
    num_prompt_tokens: int = 0


@dataclass(frozen=True, slots=True)
class StepStats:
    """One step that is over: how many rows decoded, how many tokens of prompts it computed, how long it took.

    `seconds` is from its launch, or from the end of the step before where that was later, to the moment its
    tokens were there. `predicted_s` is what the steps before had led to expect, for a step with prefill.
    """

    num_decodes: int
    num_prefill_tokens: int
    seconds: float
    predicted_s: float | None = None


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters since the start, and the state now; prefix cache figures are in tokens, kv_usage is 0..1."""

    num_running: int
    num_waiting: int
    kv_usage: float
    prefix_cache_hits: int
    prefix_cache_queries: int
    preemptions: int
    num_steps: int
    num_prefill_tokens: int
    num_generated_tokens: int
    num_finished: int
    num_failed: int
    num_steps_over_target: int = 0  # steps that decoded and took longer than `itl_target_ms`
    num_held: int = 0  # taken out by swap_out()
    num_swaps_chosen: int = 0  # preemptions whose KV was kept elsewhere
    num_recomputes_chosen: int = 0  # preemptions whose KV was given up, since computing it is faster
    num_blocks_swapped_out: int = 0
    num_blocks_swapped_in: int = 0
    num_swap_faults: int = 0
    num_blocks_in_swap: int = 0
