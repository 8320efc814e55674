"""Steps as other ranks repeat them: what is told is what a step reads, whatever becomes of sequences."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from longshore_server.native import SamplingParams
from longshore_server.native.errors import RankProtocolError
from longshore_server.native.ranks.mirror import ON_GPU, StepReader, StepTeller
from longshore_server.native.scheduler import Chunk
from longshore_server.native.sequence import Sequence, SequenceStatus

BLOCK_SIZE = 4


class Traffic:
    """Sequences that run, end, are preempted and come back, with a token of each in flight at most."""

    def __init__(self, data: st.DataObject) -> None:
        self.data = data
        self.running: list[Sequence] = []
        self.count = 0

    def draw(self, strategy: st.SearchStrategy[Any]) -> Any:
        return self.data.draw(strategy)

    def change(self) -> None:
        for sequence in list(self.running):
            fate = self.draw(st.sampled_from(["stays", "stays", "ends", "is preempted"]))
            if fate == "ends":
                sequence.status = SequenceStatus.FINISHED
                self.running.remove(sequence)
            elif fate == "is preempted":  # and let in again before the next step
                sequence.block_table, sequence.num_computed_tokens = [], 0
                sequence.num_inflight_tokens = 0
        for _ in range(self.draw(st.integers(0, 2))):
            params = SamplingParams(
                temperature=self.draw(st.sampled_from([0.0, 0.7])),
                top_p=self.draw(st.sampled_from([1.0, 0.4])),
                top_k=self.draw(st.sampled_from([0, 5, 10**12])),
                min_p=self.draw(st.sampled_from([0.0, 0.25])),
                frequency_penalty=self.draw(st.sampled_from([0.0, 1.0])),
                seed=self.draw(st.integers(0, 2**64 - 1)),
            )
            tokens = self.draw(st.lists(st.integers(0, 2**31), min_size=1, max_size=9))
            sequence = Sequence(f"r{self.count}", tokens, params, max_model_len=99)
            sequence.status = SequenceStatus.RUNNING
            self.count += 1
            self.running.append(sequence)

    def chunks(self) -> list[Chunk]:
        made = []
        for sequence in self.running:
            num_tokens = self.draw(st.integers(1, sequence.num_uncomputed_tokens))
            num_blocks = -(-(sequence.num_computed_tokens + num_tokens) // BLOCK_SIZE)
            missing = num_blocks - len(sequence.block_table)
            sequence.block_table += self.draw(
                st.lists(st.integers(0, 2**31), min_size=missing, max_size=missing)
            )
            made.append(Chunk(sequence, num_tokens, num_tokens == sequence.num_uncomputed_tokens))
        return made

    def go_on(self, chunks: list[Chunk]) -> None:
        """The step before is seen, this one is in flight."""
        for chunk in chunks:
            sequence = chunk.sequence
            if sequence.num_inflight_tokens:
                sequence.token_ids.append(self.draw(st.integers(0, 2**31)))
                sequence.num_inflight_tokens = 0
            sequence.num_computed_tokens += chunk.num_tokens
            sequence.num_inflight_tokens = int(chunk.samples)


@given(st.data())
def test_what_is_read_is_what_was_told(data: st.DataObject) -> None:
    traffic, teller, reader = Traffic(data), StepTeller(), StepReader()
    mirrored: dict[Sequence, Any] = {}
    for _ in range(5):
        traffic.change()
        chunks = traffic.chunks()
        known = {c.sequence: 7 for c in chunks if data.draw(st.booleans())}
        read = reader.read(teller.payload(chunks, known))
        assert len(read) == len(chunks)
        for ours, theirs in zip(chunks, read, strict=True):
            one, other = ours.sequence, theirs.sequence
            assert mirrored.setdefault(one, other) is other  # a seat is found again by the sequence
            start = one.num_computed_tokens
            assert (theirs.num_tokens, theirs.samples) == (ours.num_tokens, ours.samples)
            assert (other.num_computed_tokens, other.next_offset) == (start, one.next_offset)
            assert other.num_prompt_tokens == one.num_prompt_tokens
            assert other.block_table == one.block_table and other.block_table is not one.block_table
            tokens = one.token_ids[start : start + ours.num_tokens]
            unseen = [known.get(one, ON_GPU)] if len(tokens) < ours.num_tokens else []
            assert other.token_ids[start : start + ours.num_tokens] == tokens + unseen
            assert other.params == dataclasses.replace(one.params, frequency_penalty=0.0)
            assert other.params.is_simple  # what else there is to a draw is the host's
        for one, other in mirrored.items():
            is_told = other.status is SequenceStatus.FINISHED
            assert is_told == (one.status is SequenceStatus.FINISHED)
        traffic.go_on(chunks)


def test_a_table_that_was_given_up_is_read_as_another_one() -> None:
    sequence = Sequence("r", [1] * 9, SamplingParams(), max_model_len=99)
    sequence.status = SequenceStatus.RUNNING
    teller, reader = StepTeller(), StepReader()
    tables = []
    for table in ([3, 4], [5, 6]):
        sequence.block_table = table
        chunk = Chunk(sequence, 5, False)
        tables.append(reader.read(teller.payload([chunk], {}))[0].sequence.block_table)
    assert tables == [[3, 4], [5, 6]] and tables[0] is not tables[1]


@given(st.binary(max_size=120), st.integers(0, 119), st.integers(0, 255))
def test_any_bytes_are_a_step_or_refused(noise: bytes, place: int, value: int) -> None:
    sequence = Sequence("r", [1, 2, 3], SamplingParams(), max_model_len=99)
    sequence.block_table = [4]
    sound = bytearray(StepTeller().payload([Chunk(sequence, 3, True)], {}))
    sound[place % len(sound)] = value
    for payload in (noise, bytes(sound), bytes(sound[:-8])):
        with contextlib.suppress(RankProtocolError):
            StepReader().read(payload)
    with pytest.raises(RankProtocolError):
        StepReader().read(bytes(sound[:-8]))
