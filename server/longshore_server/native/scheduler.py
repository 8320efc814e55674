"""Which sequences run in the next step and how many tokens of each: pure bookkeeping over the block pool.

It does no I/O, reads no clock (the time is passed in) and never touches a tensor.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass, field

from longshore_server.native.blocks import BlockPool
from longshore_server.native.errors import DuplicateRequestError, QueueFullError
from longshore_server.native.images import GPU_STEP_PIXELS, fit_pixels
from longshore_server.native.outputs import FinishReason
from longshore_server.native.prefix import KnownPrefix, Offload, find_prefix, unit_keys
from longshore_server.native.sequence import Sequence, SequenceStatus
from longshore_server.native.step_time import StepBudget

SEQUENCES_PER_SPARE_BLOCK = 8


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next `num_tokens` uncomputed tokens of a sequence; `samples` when they reach its last one.

    As a piece of a larger chunk it begins behind the `offset` tokens of the pieces before it.
    """

    sequence: Sequence
    num_tokens: int
    samples: bool
    offset: int = 0

    @property
    def start(self) -> int:
        """Where its first token stands in the sequence."""
        return self.sequence.num_computed_tokens + self.offset

    @property
    def context_len(self) -> int:
        """Tokens of the sequence up to and including its own."""
        return self.start + self.num_tokens


@dataclass(slots=True)
class Schedule:
    """One step's work.

    `expired` are the sequences that ended because their deadline passed, `new_blocks` those given out with
    another owner's leavings in them.
    """

    chunks: list[Chunk] = field(default_factory=list)
    expired: list[Sequence] = field(default_factory=list)
    new_blocks: list[int] = field(default_factory=list)


class Scheduler:
    """Continuous batching: decodes every step, prefill in chunks with what is left of the token budget.

    Service goes by rank (priority, then arrival). When blocks run out, the last-ranked running sequence is
    preempted: its blocks are released and it waits to be computed again. A waiting sequence of a strictly
    better priority may preempt a running one to get in. `step_budget` bounds steps that decode further, and
    `max_step_pixels` the images that a step encodes.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_num_waiting: int,
        enable_prefix_cache: bool = True,
        offload: Offload | None = None,
        step_budget: StepBudget | None = None,
        max_step_pixels: int = GPU_STEP_PIXELS,
    ) -> None:
        assert max_num_batched_tokens >= max_num_seqs
        self.pool = pool
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_num_waiting = max_num_waiting
        self.enable_prefix_cache = enable_prefix_cache
        self.step_budget = step_budget
        self.max_step_pixels = max_step_pixels
        self.step_tokens = max_num_batched_tokens  # what the last schedule() was bounded by
        self.offload = offload
        if offload is not None:
            pool.on_evict = offload.evicted
        self.running: list[Sequence] = []  # by rank
        self.waiting: list[Sequence] = []  # by rank
        self.held: dict[str, Sequence] = {}  # waiting, but not let in before swap_in()
        self.num_preemptions = 0
        self.prefix_cache_queries = 0
        self.prefix_cache_hits = 0
        self._sequences: dict[str, Sequence] = {}
        self._earliest_deadline_s = float("inf")

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._sequences

    @property
    def has_unfinished(self) -> bool:
        """True while something is to be computed; what is held does not count."""
        return len(self._sequences) > len(self.held)

    @property
    def is_full(self) -> bool:
        return len(self._sequences) >= self.max_num_seqs + self.max_num_waiting

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence; raises DuplicateRequestError or QueueFullError."""
        if sequence.request_id in self._sequences:
            raise DuplicateRequestError(sequence.request_id)
        if self.is_full:
            raise QueueFullError(self.max_num_waiting)
        self._sequences[sequence.request_id] = sequence
        insort(self.waiting, sequence, key=_rank)
        if sequence.deadline_s is not None:
            self._earliest_deadline_s = min(self._earliest_deadline_s, sequence.deadline_s)

    def abort(self, request_id: str) -> Sequence | None:
        """Ends a sequence wherever it is; None when the id is not here."""
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            self.finish(sequence, "abort")
        return sequence

    def preempt(self, request_id: str) -> bool:
        """Sends a running sequence back to wait; False if it is not running."""
        sequence = self._sequences.get(request_id)
        if sequence is None or sequence.status is not SequenceStatus.RUNNING:
            return False
        self._preempt(sequence)
        return True

    def swap_out(self, request_id: str) -> bool:
        """Takes a sequence out until swap_in(); False if it is not here or is held already."""
        sequence = self._sequences.get(request_id)
        if sequence is None or request_id in self.held:
            return False
        self.preempt(request_id)
        _remove(self.waiting, sequence)
        self.held[request_id] = sequence
        return True

    def swap_in(self, request_id: str) -> bool:
        """Lets a held sequence wait for its turn again; False if it is not held."""
        sequence = self.held.pop(request_id, None)
        if sequence is not None:
            insort(self.waiting, sequence, key=_rank)
        return sequence is not None

    def recompute(self, blocks: list[int]) -> list[Sequence]:
        """Gives up what running sequences hold in blocks that could not be filled; who has to start again."""
        lost = set(blocks)
        losers = [sequence for sequence in self.running if not lost.isdisjoint(sequence.block_table)]
        for sequence in losers:
            self.pool.forget([block for block in sequence.block_table if block in lost])
        for sequence in losers:
            self._preempt(sequence, keep=False)
        return losers

    def schedule(self, now_s: float) -> Schedule:
        """Expires deadlines, lets waiting sequences in, then fills a step by rank."""
        expired = self._expire(now_s)
        self.step_tokens = self._max_step_tokens()
        self._admit_waiting()
        step = Schedule(expired=expired)
        self._fill_step(step)
        return step

    def advance(self, chunk: Chunk) -> None:
        """Notes that a chunk's computation is under way: what is scheduled next comes after it."""
        chunk.sequence.num_computed_tokens += chunk.num_tokens
        chunk.sequence.num_inflight_tokens += chunk.samples

    def commit(self, chunk: Chunk) -> None:
        """Notes that an advanced chunk's results are here, and indexes the full blocks of known tokens."""
        chunk.sequence.num_inflight_tokens -= chunk.samples
        if self.enable_prefix_cache:
            self._publish_full_blocks(chunk.sequence)

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """Takes a sequence out and releases its blocks."""
        if sequence.status is SequenceStatus.FINISHED:
            return
        if self.held.pop(sequence.request_id, None) is None:
            _remove(self.running if sequence.status is SequenceStatus.RUNNING else self.waiting, sequence)
        if not self.enable_prefix_cache:
            self._discard_kept(sequence, is_shared=False)  # it is of use to the sequence alone
        self._release_blocks(sequence)
        sequence.status = SequenceStatus.FINISHED
        sequence.finish_reason = reason
        del self._sequences[sequence.request_id]

    def fail(self, sequence: Sequence) -> None:
        """Ends a sequence whose computation went wrong: what it left for others is not trusted."""
        self.pool.forget(sequence.block_table)
        self._discard_kept(sequence, is_shared=self.enable_prefix_cache)
        self.finish(sequence, "error")

    def check_integrity(self) -> None:
        """Raises AssertionError unless queues, statuses and blocks agree."""
        for queue, status in (
            (self.running, SequenceStatus.RUNNING),
            (self.waiting, SequenceStatus.WAITING),
        ):
            assert all(sequence.status is status for sequence in queue), f"a sequence is not {status.value}"
            assert [s.rank for s in queue] == sorted(s.rank for s in queue), f"{status.value} is not by rank"
        queued = {s.request_id: s for s in (*self.running, *self.waiting, *self.held.values())}
        assert len(queued) == len(self.running) + len(self.waiting) + len(self.held), "queued twice"
        assert queued == self._sequences, "queues and ids disagree"
        assert all(
            not s.block_table and not s.num_computed_tokens for s in (*self.waiting, *self.held.values())
        ), "waiting holds blocks"
        for sequence in self.running:
            capacity = len(sequence.block_table) * self.pool.block_size
            assert sequence.num_computed_tokens <= capacity, "computed past the block table"
        self.pool.check_integrity(sequence.block_table for sequence in self.running)

    # --- running ---

    def _max_step_tokens(self) -> int:
        """All that a step may hold, or what the decodes' target allows where there are decodes."""
        num_decodes = sum(sequence.num_uncomputed_tokens == 1 for sequence in self.running)
        if self.step_budget is None or not num_decodes:
            return self.max_num_batched_tokens
        return min(self.max_num_batched_tokens, self.step_budget.tokens(num_decodes))

    def _fill_step(self, step: Schedule) -> None:
        """Gives running sequences their tokens by rank; each leaves one token for every one after it."""
        budget, max_pixels = max(self.step_tokens, len(self.running)), self.max_step_pixels
        index = 0
        while index < len(self.running):
            sequence = self.running[index]
            if sequence.num_inflight_tokens and sequence.is_full_length:
                index += 1  # it ends when its last token is seen
                continue
            num_later = len(self.running) - index - 1
            num_tokens = min(sequence.num_uncomputed_tokens, budget - num_later)
            if sequence.images:
                start = sequence.num_computed_tokens
                is_first = max_pixels == self.max_step_pixels
                num_tokens, num_pixels = fit_pixels(
                    sequence.images, start, num_tokens, max_pixels, is_first=is_first
                )
                max_pixels -= num_pixels
                if not num_tokens:
                    index += 1  # its image waits for the next step
                    continue
            if not self._make_room(sequence, num_tokens, step):
                break  # it was the last-ranked one and has been preempted itself
            step.chunks.append(Chunk(sequence, num_tokens, num_tokens == sequence.num_uncomputed_tokens))
            budget -= num_tokens
            index += 1

    def _make_room(self, sequence: Sequence, num_tokens: int, step: Schedule) -> bool:
        """Finds blocks for `num_tokens` more, preempting from the back; False if the sequence went itself."""
        num_missing = self._num_missing_blocks(sequence, num_tokens)
        while num_missing > self.pool.num_available:
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        new_blocks = self.pool.allocate(num_missing)
        sequence.block_table += new_blocks
        step.new_blocks += new_blocks
        return True

    def _num_missing_blocks(self, sequence: Sequence, num_tokens: int) -> int:
        num_slots = sequence.num_computed_tokens + num_tokens
        return max(0, -(-num_slots // self.pool.block_size) - len(sequence.block_table))

    def _preempt(self, victim: Sequence, *, keep: bool = True) -> None:
        self.running.remove(victim)
        victim.num_swapped_tokens = 0
        if keep and self.offload is not None and victim.num_computed_tokens:
            self._keep_elsewhere(victim, self.offload)
        self._release_blocks(victim)
        victim.status = SequenceStatus.WAITING
        victim.num_preemptions += 1
        insort(self.waiting, victim, key=_rank)
        self.num_preemptions += 1

    def _keep_elsewhere(self, victim: Sequence, offload: Offload) -> None:
        """Saves the computed blocks where that is the faster way; indexed ones go when they are evicted."""
        keys = unit_keys(victim, victim.num_computed_tokens, self.pool.block_size, self.enable_prefix_cache)
        if not offload.prefers_swap(len(keys), victim.num_computed_tokens):
            return
        for key, block in zip(keys, victim.block_table, strict=False):
            if not self.pool.is_indexed(block):
                offload.save(key, block)
        victim.num_swapped_tokens = victim.num_computed_tokens

    def _discard_kept(self, sequence: Sequence, *, is_shared: bool) -> None:
        """Forgets what was kept elsewhere when the sequence was last preempted."""
        if self.offload is not None and sequence.num_swapped_tokens:
            for key in unit_keys(sequence, sequence.num_swapped_tokens, self.pool.block_size, is_shared):
                self.offload.discard(key)

    def _release_blocks(self, sequence: Sequence) -> None:
        self.pool.release(sequence.block_table)
        sequence.block_table = []
        sequence.num_computed_tokens = 0
        sequence.num_published_blocks = 0

    # --- waiting ---

    def _admit_waiting(self) -> None:
        """Starts waiting sequences by rank while seats, blocks and the token budget last."""
        while self.waiting:
            sequence = self.waiting[0]
            if sequence.num_inflight_tokens:
                break  # preempted a moment ago: its last token is not known yet
            prefix = find_prefix(sequence, self.pool, self.offload, self.enable_prefix_cache)
            if not self._has_budget_for(sequence) or not self._can_get_in(sequence, prefix.on_device):
                break
            while not self._fits_beside(self.running, sequence, prefix.on_device):
                self._preempt(self.running[-1])
            self._start(self.waiting.pop(0), prefix)

    def _can_get_in(self, sequence: Sequence, cached_blocks: list[int]) -> bool:
        """True if there is room, or would be after preempting strictly worse priorities."""
        if self._fits_beside(self.running, sequence, cached_blocks):
            return True
        staying = [s for s in self.running if s.priority <= sequence.priority]
        return len(staying) < len(self.running) and self._fits_beside(staying, sequence, cached_blocks)

    def _fits_beside(self, others: list[Sequence], sequence: Sequence, cached_blocks: list[int]) -> bool:
        """A seat, and blocks for all of its tokens beside those that the others hold and still need.

        Admitting on the first chunk alone would preempt it again at once. Some blocks are kept spare for the
        growth of the others' answers.
        """
        if len(others) >= self.max_num_seqs:
            return False
        num_wanted = sum(self._num_missing_blocks(s, s.num_uncomputed_tokens) for s in (sequence, *others))
        num_wanted += len(others) // SEQUENCES_PER_SPARE_BLOCK
        num_held, num_shared = self._count_held(others, cached_blocks)
        return num_wanted - num_shared <= self.pool.num_blocks - num_held

    def _count_held(self, others: list[Sequence], cached_blocks: list[int]) -> tuple[int, int]:
        """How many blocks the others hold, and how many of these are among the cached ones."""
        if others is self.running:  # nobody else holds any, so the pool knows
            return self.pool.num_used, sum(map(self.pool.is_used, cached_blocks))
        held = {block for other in others for block in other.block_table}
        return len(held), len(held.intersection(cached_blocks))

    def _has_budget_for(self, sequence: Sequence) -> bool:
        """True if sequences of better rank, and one token for each of the others, leave budget in a step."""
        num_tokens = sum(s.num_uncomputed_tokens if s.rank < sequence.rank else 1 for s in self.running)
        return num_tokens < self.step_tokens

    def _start(self, sequence: Sequence, prefix: KnownPrefix) -> None:
        if self.offload is not None and prefix.elsewhere:
            prefix = prefix.cut(self.offload.fetch(prefix.elsewhere), self.pool.block_size)
        self.pool.share(prefix.on_device)
        sequence.block_table = list(prefix.on_device)
        sequence.num_published_blocks = len(prefix.on_device)
        sequence.num_computed_tokens = prefix.num_tokens
        if self.offload is not None and prefix.elsewhere:
            self._load(sequence, prefix, self.offload)
        if sequence.num_preemptions == 0:
            sequence.num_cached_tokens = min(sequence.num_computed_tokens, sequence.num_prompt_tokens)
        sequence.status = SequenceStatus.RUNNING
        insort(self.running, sequence, key=_rank)
        self.prefix_cache_queries += len(sequence.token_ids)
        self.prefix_cache_hits += sequence.num_computed_tokens

    def _load(self, sequence: Sequence, prefix: KnownPrefix, offload: Offload) -> None:
        """Takes blocks for what lies elsewhere, to be filled before the step, and indexes the full ones."""
        blocks = self.pool.allocate(len(prefix.elsewhere))
        sequence.block_table += blocks
        num_full = prefix.num_tokens // self.pool.block_size
        for index, (key, block) in enumerate(
            zip(prefix.elsewhere, blocks, strict=True), len(prefix.on_device)
        ):
            is_shared = self.enable_prefix_cache and index < num_full
            offload.load(key, block, only_once=not is_shared)
            if is_shared:
                self.pool.publish(block, key)
        if self.enable_prefix_cache:
            sequence.num_published_blocks = num_full

    # --- bookkeeping ---

    def _publish_full_blocks(self, sequence: Sequence) -> None:
        num_known = min(sequence.num_computed_tokens, len(sequence.token_ids))
        num_full = num_known // self.pool.block_size
        if num_full == sequence.num_published_blocks:
            return
        digests = sequence.digest_blocks(num_full, self.pool.block_size)
        for index in range(sequence.num_published_blocks, num_full):
            self.pool.publish(sequence.block_table[index], digests[index])
        sequence.num_published_blocks = num_full

    def _expire(self, now_s: float) -> list[Sequence]:
        if now_s < self._earliest_deadline_s:
            return []
        expired = [s for s in self._sequences.values() if s.deadline_s is not None and s.deadline_s <= now_s]
        for sequence in expired:
            self.finish(sequence, "deadline")
        self._earliest_deadline_s = min(self._deadlines(), default=float("inf"))
        return expired

    def _deadlines(self) -> Iterator[float]:
        return (s.deadline_s for s in self._sequences.values() if s.deadline_s is not None)


def _rank(sequence: Sequence) -> tuple[int, int]:
    return sequence.rank


def _remove(queue: list[Sequence], sequence: Sequence) -> None:
    index = bisect_left(queue, sequence.rank, key=_rank)
    assert queue[index] is sequence, "ranks must be unique"
    del queue[index]
