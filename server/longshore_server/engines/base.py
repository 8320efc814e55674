"""What every engine of the core offers: token ids in, token ids out, over one small async protocol.

Plain data and a Protocol; it imports no torch, no HTTP framework and no engine. Text is not its business.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

FinishReason = Literal["stop", "length"]

#: What an engine may be able to do beyond answering; callers ask before they rely on it.
CAPABILITIES = frozenset({"abort", "deadline", "resume", "preempt", "swap", "images"})


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The model that an engine holds. `digest` is hexadecimal and names the weights."""

    name: str
    digest: str
    max_model_len: int
    eos_token_ids: frozenset[int]
    vocab_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingSpec:
    """How one answer is sampled, in token ids; field for field what the native engine's SamplingParams takes.

    Checked by the engine, which answers a wrong field with InvalidRequestError naming it. `seed` is
    0..2**64-1; `top_k` 0 is off; `num_logprobs` None asks for none, 0 for the chosen token's alone.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    num_logprobs: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int = 0


@dataclass(frozen=True, slots=True)
class JobImage:
    """A picture in the size that the model reads it at; `rgb` holds height x width x 3 bytes, row by row."""

    height_px: int
    width_px: int
    rgb: bytes = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateJob:
    """One choice to generate.

    A smaller `priority` is served first. `deadline_s` is a time of this process's `time.monotonic()`.
    `continue_from` are answer tokens that exist already: the first new token has their number as its offset,
    and `params.max_tokens` counts them in. `images` are those that the prompt's image tokens stand for.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingSpec = SamplingSpec()
    tenant: str = ""
    priority: int = 0
    deadline_s: float | None = None
    continue_from: tuple[int, ...] = ()
    images: tuple[JobImage, ...] = ()


@dataclass(frozen=True, slots=True)
class EngineToken:
    """One token of an answer, its ending, or both.

    The last one of an answer carries `finish_reason`; a stop token is handed out as well and is no part of
    the text. `token_id` is None where an answer ends without a further token. Answers that end in any other
    way (deadline, failure) raise instead. `was_resumed` says that this answer has been taken up again from
    its tokens so far, which may round differently where batches are not invariant.
    """

    token_id: int | None
    offset: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    finish_reason: FinishReason | None = None
    num_cached_tokens: int = 0
    num_prompt_tokens: int = 0
    was_resumed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """Counters since the engine started, and its state now.

    `num_swaps_chosen` and `num_recomputes_chosen` say what became of preempted sequences' KV.
    `kv_usage` is 0..1; prefix cache figures are in tokens; `step_s_total` is the time spent in steps, whose
    number is `num_steps`; `num_restarts` and `num_replays` are counted by the side that watches the engine.
    """

    num_running: int = 0
    num_waiting: int = 0
    kv_usage: float = 0.0
    prefix_cache_hits: int = 0
    prefix_cache_queries: int = 0
    preemptions: int = 0
    num_steps: int = 0
    num_prefill_tokens: int = 0
    num_generated_tokens: int = 0
    num_finished: int = 0
    num_failed: int = 0
    num_steps_over_target: int = 0
    num_held: int = 0
    num_swaps_chosen: int = 0
    num_recomputes_chosen: int = 0
    num_blocks_swapped_out: int = 0
    num_blocks_swapped_in: int = 0
    num_swap_faults: int = 0
    num_blocks_in_swap: int = 0
    step_s_total: float = 0.0
    step_s_last: float = 0.0
    step_s_max: float = 0.0
    num_step_errors: int = 0
    uptime_s: float = 0.0
    num_restarts: int = 0
    num_replays: int = 0


@runtime_checkable
class Engine(Protocol):
    """An engine as the HTTP side sees it.

    `info` may be read once `start` has returned. `generate` yields the tokens of one job in order; closing or
    cancelling the iterator aborts the job in the engine within one step. It raises InvalidRequestError,
    PromptTooLongError, QueueFullError, DeadlineExceededError, EngineFailedError or UnavailableError.
    """

    @property
    def capabilities(self) -> frozenset[str]: ...

    @property
    def info(self) -> ModelInfo: ...

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    def generate(self, job: GenerateJob) -> AsyncIterator[EngineToken]: ...

    async def stats(self) -> EngineStats: ...

    def is_ready(self) -> bool: ...
