"""The scheduler alone, with tokens made up: budget, order, preemption, deadlines, books, any traffic."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from longshore_server.native.blocks import BlockPool
from longshore_server.native.errors import DuplicateRequestError, QueueFullError
from longshore_server.native.sampling_params import SamplingParams
from longshore_server.native.scheduler import Scheduler
from longshore_server.native.sequence import Sequence, SequenceStatus
from longshore_server.native.step_time import StepBudget, StepTimes

NUM_BLOCKS, BLOCK_SIZE, MAX_SEQS, BUDGET, MAX_WAITING = 10, 4, 4, 9, 6
MAX_LEN = NUM_BLOCKS * BLOCK_SIZE


def _scheduler(**changes) -> Scheduler:
    sizes = {"max_num_seqs": MAX_SEQS, "max_num_batched_tokens": BUDGET, "max_num_waiting": MAX_WAITING}
    return Scheduler(BlockPool(NUM_BLOCKS, BLOCK_SIZE), **{**sizes, **changes})


def _sequence(name: str, num_tokens: int = 5, max_tokens: int = 4, **fields) -> Sequence:
    fields.setdefault("arrival", int(name))
    params = SamplingParams(max_tokens=max_tokens)
    return Sequence(name, [1] * num_tokens, params, max_model_len=MAX_LEN, **fields)


def _run(scheduler: Scheduler, now_s: float = 0.0, token: int = 1) -> list[str]:
    """One step with a made-up model; returns the ids that sampled."""
    step = scheduler.schedule(now_s)
    sampled = []
    for chunk in step.chunks:
        scheduler.advance(chunk)
        scheduler.commit(chunk)
        if chunk.samples:
            sampled.append(chunk.sequence.request_id)
            ending = chunk.sequence.append(token)
            if ending is not None:
                scheduler.finish(chunk.sequence, ending)
    return sampled


class SchedulerMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.scheduler = _scheduler()
        self.live: dict[str, Sequence] = {}
        self.count = 0
        self.now_s = 0.0
        self.times = StepTimes()

    @initialize(target_s=st.sampled_from([None, 1e-9, 0.05, 1.0]))
    def aim_at(self, target_s) -> None:
        """Steps take 10 ms and 10 ms a token; a target bounds those that decode, or there is none."""
        if target_s is not None:
            self.scheduler.step_budget = StepBudget(self.times, target_s, min_prefill=2)

    @rule(
        num_tokens=st.integers(1, MAX_LEN - 1),
        max_tokens=st.integers(1, 12),
        priority=st.integers(0, 2),
        deadline_s=st.none() | st.floats(0, 8),
        tenant=st.sampled_from(["a", "b"]),
    )
    def add(self, num_tokens, max_tokens, priority, deadline_s, tenant) -> None:
        self.count += 1
        deadline_s = None if deadline_s is None else self.now_s + deadline_s
        sequence = _sequence(
            str(self.count), num_tokens, max_tokens, priority=priority, deadline_s=deadline_s, tenant=tenant
        )
        if len(self.live) >= MAX_SEQS + MAX_WAITING:
            with pytest.raises(QueueFullError):
                self.scheduler.add(sequence)
            return
        self.scheduler.add(sequence)
        self.live[sequence.request_id] = sequence

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def abort(self, data) -> None:
        name = data.draw(st.sampled_from(sorted(self.live)))
        assert self.scheduler.abort(name) is self.live.pop(name)
        assert self.scheduler.abort(name) is None

    @rule(elapsed_s=st.floats(0, 3), token=st.integers(1, 2))
    def step(self, elapsed_s, token) -> None:
        self.now_s += elapsed_s
        step = self.scheduler.schedule(self.now_s)
        for sequence in step.expired:
            assert sequence.deadline_s <= self.now_s and sequence.finish_reason == "deadline"
            del self.live[sequence.request_id]
        assert all(s.deadline_s is None or s.deadline_s > self.now_s for s in self.live.values())
        self._check_chunks(step.chunks)
        num_decodes = sum(chunk.num_tokens == 1 for chunk in step.chunks)
        num_tokens = sum(chunk.num_tokens for chunk in step.chunks)
        self.times.note(num_decodes, num_tokens - num_decodes, 0.01 + 0.01 * num_tokens)
        for chunk in step.chunks:
            self.scheduler.advance(chunk)
            self.scheduler.commit(chunk)
            if chunk.samples:
                ending = chunk.sequence.append(token)
                if ending is not None:
                    self.scheduler.finish(chunk.sequence, ending)
                    del self.live[chunk.sequence.request_id]

    def _check_chunks(self, chunks) -> None:
        assert bool(chunks) == bool(self.live), "work stands still, or is done for nobody"
        assert sum(chunk.num_tokens for chunk in chunks) <= max(self.scheduler.step_tokens, len(chunks))
        assert self.scheduler.step_tokens <= BUDGET
        assert len(chunks) <= MAX_SEQS
        assert [chunk.sequence for chunk in chunks] == self.scheduler.running
        for chunk in chunks:
            sequence = chunk.sequence
            assert 1 <= chunk.num_tokens <= sequence.num_uncomputed_tokens
            assert chunk.samples == (chunk.num_tokens == sequence.num_uncomputed_tokens)
            capacity = len(sequence.block_table) * BLOCK_SIZE
            assert sequence.num_computed_tokens + chunk.num_tokens <= capacity
            assert len(set(sequence.block_table)) == len(sequence.block_table)

    @invariant()
    def books_are_in_order(self) -> None:
        self.scheduler.check_integrity()
        assert {s.request_id for s in (*self.scheduler.running, *self.scheduler.waiting)} == set(self.live)

    def teardown(self) -> None:
        """Whatever came before, what is left finishes, best rank always moving."""
        for _ in range(4000):
            if not self.scheduler.has_unfinished:
                break
            _run(self.scheduler, self.now_s)
        assert not self.scheduler.has_unfinished, "sequences starve"
        assert self.scheduler.pool.usage == 0.0


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(stateful_step_count=30)


def test_decodes_run_beside_a_long_prefill() -> None:
    scheduler = _scheduler()
    scheduler.add(_sequence("1", 3, max_tokens=8))
    assert _run(scheduler) == ["1"]
    scheduler.add(_sequence("2", 24, max_tokens=8))
    assert [_run(scheduler) for _ in range(3)] == [["1"], ["1"], ["1", "2"]]  # 8 + 8 + 8 tokens of prefill


def test_smaller_priority_is_served_first_and_fifo_inside() -> None:
    scheduler = _scheduler(max_num_seqs=1)
    for name, priority in (("1", 1), ("2", 0), ("3", 1), ("4", 0)):
        scheduler.add(_sequence(name, 2, max_tokens=1, priority=priority))
    assert [_run(scheduler)[0] for _ in range(4)] == ["2", "4", "1", "3"]


def test_a_better_priority_takes_the_seat_of_the_worst_running() -> None:
    scheduler = _scheduler(max_num_seqs=2)
    scheduler.add(_sequence("1", priority=1))
    scheduler.add(_sequence("2", priority=1))
    _run(scheduler)
    scheduler.add(_sequence("3", priority=0))
    step = scheduler.schedule(0.0)
    assert [chunk.sequence.request_id for chunk in step.chunks] == ["3", "1"]
    assert scheduler.num_preemptions == 1 and scheduler.waiting[0].request_id == "2"


def test_equal_priority_never_preempts_to_get_in() -> None:
    scheduler = _scheduler(max_num_seqs=1)
    scheduler.add(_sequence("1"))
    _run(scheduler)
    scheduler.add(_sequence("2"))
    _run(scheduler)
    assert scheduler.num_preemptions == 0 and scheduler.running[0].request_id == "1"


def test_nobody_is_preempted_for_one_who_would_not_fit_even_then() -> None:
    scheduler = _scheduler(max_num_batched_tokens=40)
    scheduler.add(_sequence("1", 20, priority=0))  # five of ten blocks
    scheduler.add(_sequence("2", 4, priority=2))
    _run(scheduler)
    scheduler.add(_sequence("3", 24, priority=1, tenant="b"))  # six blocks: too many even without the second
    _run(scheduler)
    assert scheduler.num_preemptions == 0 and [s.request_id for s in scheduler.waiting] == ["3"]


def test_a_better_priority_gets_the_budget_of_a_long_prefill() -> None:
    scheduler = _scheduler()
    scheduler.add(_sequence("1", 30, priority=1))
    _run(scheduler)
    scheduler.add(_sequence("2", 5, priority=0))
    assert _run(scheduler) == ["2"]


def test_when_blocks_run_out_the_youngest_of_the_worst_priority_goes() -> None:
    scheduler = _scheduler(max_num_batched_tokens=40)
    for name, priority in (("1", 1), ("2", 0), ("3", 1)):
        scheduler.add(_sequence(name, 8, max_tokens=24, priority=priority))
    first_preempted = None
    for _ in range(40):
        _run(scheduler, token=3)
        if scheduler.num_preemptions and first_preempted is None:
            first_preempted = scheduler.waiting[0].request_id
    assert first_preempted == "3"


def test_a_full_queue_and_a_known_id_are_refused_and_change_nothing() -> None:
    scheduler = _scheduler(max_num_seqs=1, max_num_waiting=1)
    scheduler.add(_sequence("1"))
    with pytest.raises(DuplicateRequestError):
        scheduler.add(_sequence("1", arrival=9))
    scheduler.add(_sequence("2"))
    with pytest.raises(QueueFullError):
        scheduler.add(_sequence("3"))
    assert len(scheduler.waiting) == 2
    scheduler.check_integrity()


def test_an_expired_deadline_ends_waiting_and_running() -> None:
    scheduler = _scheduler(max_num_seqs=1)
    scheduler.add(_sequence("1", deadline_s=2.0))
    scheduler.add(_sequence("2", deadline_s=1.0))
    _run(scheduler, now_s=0.5)
    assert [s.request_id for s in scheduler.schedule(1.0).expired] == ["2"]
    assert [s.request_id for s in scheduler.schedule(2.5).expired] == ["1"]
    assert not scheduler.has_unfinished and scheduler.pool.usage == 0.0


def test_a_failed_sequence_leaves_nothing_in_the_prefix_index() -> None:
    scheduler = _scheduler()
    sequence = _sequence("1", 9)
    scheduler.add(sequence)
    chunk = scheduler.schedule(0.0).chunks[0]
    scheduler.advance(chunk)
    scheduler.commit(chunk)
    digests = sequence.digest_blocks(2, BLOCK_SIZE)
    assert len(scheduler.pool.match(digests)) == 2
    scheduler.fail(sequence)
    assert scheduler.pool.match(digests) == [] and sequence.status is SequenceStatus.FINISHED
    scheduler.check_integrity()
