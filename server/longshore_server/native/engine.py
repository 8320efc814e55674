"""The engine: requests in, tokens out, one step at a time. It owns the scheduler and the runner.

It owns no socket and no clock; one thread calls it, and on a GPU its runner has one more, which captures
steps. A request that fails ends alone.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from itertools import count

from longshore_server.native.blocks import BlockPool
from longshore_server.native.checks import check_float, check_int
from longshore_server.native.config import EngineConfig
from longshore_server.native.errors import (
    DuplicateRequestError,
    InvalidRequestError,
    NativeEngineError,
    PromptTooLongError,
    RanksLostError,
)
from longshore_server.native.images import (
    CPU_STEP_PIXELS,
    GPU_STEP_PIXELS,
    ImageGeometry,
    ImageInput,
    PlacedImage,
)
from longshore_server.native.outputs import EngineStats, FinishReason, StepStats, TokenOutput
from longshore_server.native.ranks.start import build_on_ranks
from longshore_server.native.sampler import SampledToken
from longshore_server.native.sampling_params import SamplingParams
from longshore_server.native.scheduler import Chunk, Schedule, Scheduler
from longshore_server.native.sequence import Sequence, SequenceStatus
from longshore_server.native.step_time import StepBudget, StepTimes

logger = logging.getLogger(__name__)

MAX_PRIORITY = 1_000_000

ChunkResult = SampledToken | None


@dataclass(frozen=True, slots=True)
class Launch:
    """Chunks that were launched together, and what gives their results."""

    chunks: list[Chunk]
    read: Callable[[], SequenceOf[ChunkResult]]


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    """A step that is under way, and when its launch began, on the engine's clock."""

    launches: list[Launch]
    started_s: float

    def sizes(self) -> tuple[int, int]:
        """Rows of one token, and tokens of longer chunks."""
        sizes = [chunk.num_tokens for launch in self.launches for chunk in launch.chunks]
        num_decodes = sizes.count(1)
        return num_decodes, sum(sizes) - num_decodes

    @property
    def may_encode(self) -> bool:
        """Whether images may have taken part of its time."""
        chunks = (chunk for launch in self.launches for chunk in launch.chunks)
        return any(chunk.num_tokens > 1 and chunk.sequence.images for chunk in chunks)


class NativeEngine:
    """Continuous batching over one model.

    Raises ConfigError, ModelLoadError or UnsupportedModelError when it cannot start. Not thread-safe: one
    thread adds, aborts and steps.
    """

    capabilities: frozenset[str] = frozenset({"abort", "deadline", "preempt", "resume"})
    eos_token_ids: frozenset[int]
    vocab_size: int
    max_model_len: int
    images: ImageGeometry | None  # None where the model does not see
    batch_invariant: bool  # answers are the same to the last bit in every batch, and resume byte-equal

    def __init__(
        self,
        config: EngineConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
        on_ranks_lost: Callable[[str], None] | None = None,
    ) -> None:
        """`on_ranks_lost` is called from another thread when a rank dies; see RankGroup."""
        self.config = config
        self._clock = clock
        self._sparsity = config.sparsity
        built, self._ranks = build_on_ranks(config, on_ranks_lost)
        self.eos_token_ids = built.eos_token_ids
        self.vocab_size = built.vocab_size
        self.max_model_len = built.max_model_len
        self.batch_invariant = built.batch_invariant
        self._runner = built.runner
        self._step_times = StepTimes()
        self.last_step: StepStats | None = None
        self._scheduler = Scheduler(
            BlockPool(built.num_kv_blocks, config.block_size),
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.token_budget,
            max_num_waiting=config.max_num_waiting,
            enable_prefix_cache=config.enable_prefix_cache,
            offload=built.offload,
            step_budget=_step_budget(config, self._step_times),
            max_step_pixels=CPU_STEP_PIXELS if config.device == "cpu" else GPU_STEP_PIXELS,
        )
        self._offload = built.offload
        self.images = built.images
        if built.images is not None:
            self.capabilities |= {"images"}
        if built.offload is not None:
            self.capabilities |= {"swap"}
        self._overlaps = built.runner.overlaps
        self._in_flight = LaunchedStep([], 0.0)  # the last step, when steps overlap
        self._settled_s = float("-inf")  # when the last step's tokens were there
        self._arrivals = count()
        self._endings: list[TokenOutput] = []  # of requests that ended outside a step
        self._num_steps = 0
        self._num_prefill_tokens = 0
        self._num_generated_tokens = 0
        self._num_finished = 0
        self._num_failed = 0
        self._num_steps_over_target = 0

    # --- requests ---

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: SequenceOf[int],
        params: SamplingParams,
        *,
        tenant: str = "",
        priority: int = 0,
        deadline_s: float | None = None,
        continue_from: SequenceOf[int] = (),
        images: SequenceOf[ImageInput] = (),
    ) -> None:
        """Queues a request; raises InvalidRequestError (or a subclass) or QueueFullError and changes nothing.

        `priority`: smaller is served first. `deadline_s`: on the engine's clock. `continue_from`: the
        answer's tokens so far, which are computed again and count for limits, penalties and randomness.
        `images`: those that the prompt's image tokens stand for, in their order.
        """
        if request_id in self._scheduler:
            raise DuplicateRequestError(request_id)
        self._check_request(prompt_token_ids, params, priority, deadline_s, continue_from)
        sequence = Sequence(
            request_id,
            prompt_token_ids,
            params,
            max_model_len=self.max_model_len,
            eos_token_ids=self.eos_token_ids,
            tenant=tenant,
            priority=priority,
            arrival=next(self._arrivals),
            deadline_s=deadline_s,
            continue_from=continue_from,
            images=self._place_images(prompt_token_ids, images),
            sparse_from=self._sparse_from(len(prompt_token_ids)),
        )
        self._scheduler.add(sequence)
        ending = sequence.ending()
        if ending is not None:  # `continue_from` is a whole answer
            self._end(sequence, ending)

    def _sparse_from(self, num_prompt_tokens: int) -> int | None:
        return None if self._sparsity is None else self._sparsity.first_position(num_prompt_tokens)

    def _check_request(
        self,
        prompt_token_ids: SequenceOf[int],
        params: SamplingParams,
        priority: int,
        deadline_s: float | None,
        continue_from: SequenceOf[int],
    ) -> None:
        _check_token_ids("prompt_token_ids", prompt_token_ids, self.vocab_size)
        _check_token_ids("continue_from", continue_from, self.vocab_size)
        if not len(prompt_token_ids):
            raise InvalidRequestError("prompt_token_ids", "must hold at least one token")
        params.check_vocab(self.vocab_size)
        check_int(InvalidRequestError, "priority", priority, -MAX_PRIORITY, MAX_PRIORITY)
        if deadline_s is not None:
            check_float(InvalidRequestError, "deadline_s", deadline_s, 0.0)
        num_tokens = len(prompt_token_ids) + len(continue_from)
        if num_tokens > self.max_model_len or len(prompt_token_ids) == self.max_model_len:
            raise PromptTooLongError(num_tokens, self.max_model_len)

    def _place_images(
        self, prompt_token_ids: SequenceOf[int], images: SequenceOf[ImageInput]
    ) -> tuple[PlacedImage, ...]:
        if self.images is not None:
            return self.images.place(prompt_token_ids, images)
        if images:
            raise InvalidRequestError("images", "this model takes none")
        return ()

    def abort(self, request_id: str) -> bool:
        """Ends a request now; the next step reports it as "abort". False if it is not here."""
        sequence = self._scheduler.abort(request_id)
        if sequence is not None:
            self._report_ending(sequence)
        return sequence is not None

    def preempt(self, request_id: str) -> bool:
        """Sends a running request back to wait for its turn, by rank; its tokens so far stay. False if it
        is not running. With `kv_swap` its KV is kept where that is predicted to be faster than computing it.
        """
        is_done = self._scheduler.preempt(request_id)
        self._copy_kept()
        return is_done

    def swap_out(self, request_id: str) -> bool:
        """Takes a request out of the batch and the queue until swap_in(); False if it is not here or is out.

        It still counts as a request, can be aborted, and its deadline holds whenever a step is made.
        """
        is_done = self._scheduler.swap_out(request_id)
        self._copy_kept()
        return is_done

    def swap_in(self, request_id: str) -> bool:
        """Lets a request that swap_out() took out wait for its turn again; False if it is not out."""
        return self._scheduler.swap_in(request_id)

    def has_unfinished(self) -> bool:
        """True while a request is waiting or running, or an ending has not been handed out.

        Requests that swap_out() took out do not count.
        """
        return self._scheduler.has_unfinished or bool(self._endings)

    # --- the step ---

    def step(self) -> list[TokenOutput]:
        """Schedules, runs, postprocesses: at most one token per running request, and the pending endings.

        On a GPU steps overlap: the tokens are those of the step before, and are handed out while the GPU
        computes this one.
        """
        outputs = self._settle() if self._must_settle_first() else []
        schedule = self._schedule()
        step = LaunchedStep([], self._clock())
        step.launches.extend(self._launch(schedule))
        if self._overlaps:
            step, self._in_flight = self._in_flight, step
        return outputs + self._postprocess(step)

    def _must_settle_first(self) -> bool:
        """A penalty needs the token that is in flight before the next one can be drawn."""
        return bool(self._in_flight.launches) and any(s.params.has_penalties for s in self._scheduler.running)

    def _settle(self) -> list[TokenOutput]:
        step, self._in_flight = self._in_flight, LaunchedStep([], 0.0)
        return self._postprocess(step)

    def _schedule(self) -> Schedule:
        schedule = self._scheduler.schedule(self._clock())
        for sequence in schedule.expired:  # noted before the run, which may raise
            self._report_ending(sequence)
        self._swap(schedule)
        return schedule

    def _copy_kept(self) -> None:
        """Between steps only saves are planned: done now, so that the next schedule finds them."""
        if self._offload is not None:
            self._offload.execute()

    def _swap(self, schedule: Schedule) -> None:
        """Copies what the schedule wants copied; who misses content after that is computed again."""
        lost = self._offload.execute() if self._offload is not None else []
        if lost:
            losers = self._scheduler.recompute(lost)
            schedule.chunks = [chunk for chunk in schedule.chunks if chunk.sequence not in losers]

    def _note_step(self, step: LaunchedStep) -> None:
        """Learns from a step whose tokens are here. Its time is the gap to the step before, if it was under
        way by then: that is what the client of an answer sees.
        """
        now_s = self._clock()
        seconds = now_s - max(step.started_s, self._settled_s)
        self._settled_s = now_s
        num_decodes, num_prefill = step.sizes()
        line = self._step_times.line if num_prefill else None
        predicted_s = None if line is None else line.seconds(num_decodes + num_prefill)
        self.last_step = StepStats(num_decodes, num_prefill, seconds, predicted_s)
        target_ms = self.config.itl_target_ms
        self._num_steps_over_target += bool(num_decodes and target_ms and 1e3 * seconds > target_ms)
        if step.may_encode:
            return  # which tells little of what a token takes
        self._step_times.note(num_decodes, num_prefill, seconds)
        if self._offload is not None and num_prefill > num_decodes:  # mostly prefill: what a token takes
            self._offload.note_computed(num_decodes + num_prefill, seconds)

    def _launch(self, schedule: Schedule) -> list[Launch]:
        self._runner.clear_blocks(schedule.new_blocks)
        launches = self._launch_chunks(schedule.chunks)
        for chunk in schedule.chunks:
            self._scheduler.advance(chunk)
        return launches

    def _launch_chunks(self, chunks: list[Chunk]) -> list[Launch]:
        """Launches chunks together; if that fails, by halves, so that only the culprit gets an exception."""
        if not chunks:
            return []
        try:
            return [Launch(chunks, self._runner.launch(chunks))]
        except RanksLostError:
            raise
        except Exception as error:  # whatever one request's forward raises must not end the others
            if len(chunks) == 1:
                logger.exception("request %s failed in the model", chunks[0].sequence.request_id)
                failure = [SampledToken(0, error=f"{type(error).__name__} in the model")]
                return [Launch(chunks, lambda: failure)]
        # Behind the handler, where no traceback keeps the tensors of the pass that failed.
        half = len(chunks) // 2
        return self._launch_chunks(chunks[:half]) + self._launch_chunks(chunks[half:])

    def _postprocess(self, step: LaunchedStep) -> list[TokenOutput]:
        outputs, self._endings = self._endings, []
        if not step.launches:
            return outputs
        self._num_steps += 1
        results = [launch.read() for launch in step.launches]
        self._note_step(step)
        for launch, read in zip(step.launches, results, strict=True):
            for chunk, result in zip(launch.chunks, read, strict=True):
                output = self._apply(chunk, result)
                if output is not None:
                    outputs.append(output)
        return outputs

    def _apply(self, chunk: Chunk, result: ChunkResult) -> TokenOutput | None:
        sequence = chunk.sequence
        if sequence.status is SequenceStatus.FINISHED:
            return None  # it ended while this was under way
        if result is not None and result.error is not None:
            return self._fail(sequence, result.error)
        self._scheduler.commit(chunk)
        if result is None:
            self._num_prefill_tokens += chunk.num_tokens
            return None
        self._num_prefill_tokens += chunk.num_tokens - 1
        self._num_generated_tokens += 1
        ending = sequence.append(result.token_id)
        if ending is not None:
            self._num_finished += 1
            self._scheduler.finish(sequence, ending)
        return _output(sequence, result)

    def _fail(self, sequence: Sequence, message: str) -> TokenOutput:
        self._num_failed += 1
        self._scheduler.fail(sequence)
        return _output(sequence, None, error=message)

    def _end(self, sequence: Sequence, reason: FinishReason) -> None:
        self._scheduler.finish(sequence, reason)
        self._report_ending(sequence)

    def _report_ending(self, sequence: Sequence) -> None:
        self._num_finished += 1
        self._endings.append(_output(sequence, None))

    # --- offline and upkeep ---

    def generate(
        self, prompts: list[list[int]], params: SamplingParams | list[SamplingParams]
    ) -> list[list[int]]:
        """Answers all prompts and returns their token ids, stop tokens included.

        For an engine without other requests. Raises NativeEngineError when an answer fails, and whatever
        add_request() raises; nothing is left behind.
        """
        if self.has_unfinished():
            raise NativeEngineError("generate() needs an engine without other requests")
        each = params if isinstance(params, list) else [params] * len(prompts)
        answers: dict[str, list[int]] = {f"generate-{index}": [] for index in range(len(prompts))}
        pending = list(zip(answers, prompts, each, strict=True))[::-1]
        try:
            while pending or self.has_unfinished():
                while pending and not self._scheduler.is_full:
                    self.add_request(*pending.pop())
                self._collect(answers)
        finally:
            for request_id in answers:
                self.abort(request_id)
            self._endings.clear()
        self.settle()
        return list(answers.values())

    def _collect(self, answers: dict[str, list[int]]) -> None:
        for output in self.step():
            if output.error is not None:
                raise NativeEngineError(f"{output.request_id}: {output.error}")
            if output.token_id is not None:
                answers[output.request_id].append(output.token_id)

    def stats(self) -> EngineStats:
        scheduler = self._scheduler
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            kv_usage=scheduler.pool.usage,
            prefix_cache_hits=scheduler.prefix_cache_hits,
            prefix_cache_queries=scheduler.prefix_cache_queries,
            preemptions=scheduler.num_preemptions,
            num_steps=self._num_steps,
            num_prefill_tokens=self._num_prefill_tokens,
            num_generated_tokens=self._num_generated_tokens,
            num_finished=self._num_finished,
            num_failed=self._num_failed,
            num_steps_over_target=self._num_steps_over_target,
            num_held=len(scheduler.held),
            **({} if self._offload is None else self._offload.figures()),
        )

    def prepare(self) -> bool:
        """Goes on with what later steps need, beside them: call it while there is nothing to do.

        It returns at once, and says whether there is more to come. step() does so, too. On a GPU it is
        compiling kernels and capturing steps; on a CPU there is nothing of the kind.
        """
        return self._runner.prepare()

    def settle(self) -> None:
        """Waits for steps that are being captured beside the ones that ran.

        While a capture goes on, CUDA refuses to wait for a whole device, as torch.cuda.synchronize() does,
        and torch to draw random numbers with the device's own generator.
        """
        self._runner.settle()

    def close(self) -> None:
        """Ends what captured steps and other ranks hold; no step may follow. Harmless when repeated.

        The other ranks end as well when the engine is collected unclosed.
        """
        self._runner.close()
        if self._ranks is not None:
            self._ranks.close()

    def check_integrity(self) -> None:
        """Raises AssertionError when the scheduler's and the block pool's books disagree.

        With several ranks, also RanksLostError when one of them is not idle or not in step.
        """
        if self._ranks is not None:
            self._ranks.check_in_step()
        self._scheduler.check_integrity()
        if self._offload is not None:
            self._offload.check_integrity()


def _step_budget(config: EngineConfig, times: StepTimes) -> StepBudget | None:
    if config.itl_target_ms is None:
        return None
    return StepBudget(times, config.itl_target_ms / 1e3, config.block_size)


def _output(sequence: Sequence, token: SampledToken | None, error: str | None = None) -> TokenOutput:
    """The output of a sequence whose last token is `token`, or of one that ends without a token."""
    return TokenOutput(
        request_id=sequence.request_id,
        token_id=None if token is None else token.token_id,
        offset=sequence.num_generated_tokens - (token is not None),
        logprob=None if token is None else token.logprob,
        top_logprobs=() if token is None else token.top_logprobs,
        finish_reason=sequence.finish_reason,
        error=error,
        num_cached_tokens=sequence.num_cached_tokens,
        num_prompt_tokens=sequence.num_prompt_tokens,
    )


def _check_token_ids(field: str, token_ids: SequenceOf[int], vocab_size: int) -> None:
    for token_id in token_ids:
        if type(token_id) is not int or not 0 <= token_id < vocab_size:
            raise InvalidRequestError(field, f"{token_id!r} is not a token id below {vocab_size}")
