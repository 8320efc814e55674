"""Guessing ahead: what is guessed, and that no guess ever changes an answer."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longshore.bundle import read_manifest, write_manifest
from longshore.device import DeviceSettings, Student
from longshore.device.generate import GeneratedToken, Generator, Job
from longshore.device.sampling import SamplingSettings
from longshore.device.session import DecoderSession
from longshore.device.speculate import MAX_GUESSES, DraftLength, DraftModel, PromptLookup, Proposer
from longshore.errors import BundleDamagedError, BundleIncompatibleError
from longshore.wire import TokenEvent, decode_chat_request, load_manifest

VOCAB = 11


class Machine:
    """A decoder whose logits depend on the last tokens alone; it counts what it computes."""

    max_tokens, vocab_size = 200, VOCAB

    def __init__(self, period: int = 3) -> None:
        self._held: list[int] = []
        self._period = period
        self.num_calls = 0

    def forward(self, token_ids: Sequence[int], num_past: int, image_features: object = None) -> np.ndarray:
        return self.forward_rows(token_ids, num_past)[-1]

    def forward_rows(self, token_ids: Sequence[int], num_past: int) -> np.ndarray:
        assert num_past <= len(self._held)
        self._held = [*self._held[:num_past], *token_ids]
        self.num_calls += 1
        rows = [self._row(num_past + index) for index in range(len(token_ids))]
        return np.stack(rows)

    def _row(self, index: int) -> np.ndarray:
        seed = [*self._held[max(0, index - 1) : index + 1], index % self._period]
        return np.random.default_rng(seed).standard_normal(VOCAB).astype(np.float32) * 3


class Parrot:
    """Guesses the same tokens always, right or wrong."""

    def __init__(self, guesses: list[int]) -> None:
        self._guesses = guesses

    def propose(self, tokens: Sequence[int], most: int) -> Sequence[int]:
        return self._guesses[:most]


def answer(decoder: Machine | DecoderSession, proposer: Proposer | None, job: Job) -> list[GeneratedToken]:
    told: list[GeneratedToken] = []
    Generator(decoder, 16, proposer).run(job, told.append, lambda: False)
    return told


def job(prompt: list[int], max_tokens: int = 60, **sampling: object) -> Job:
    return Job(
        prompt=tuple(prompt),
        generated=(),
        max_tokens=max_tokens,
        stop_token_ids=(0,),
        sampling=SamplingSettings(**sampling),  # type: ignore[arg-type]
    )


@given(
    st.lists(st.integers(1, VOCAB - 1), min_size=1, max_size=30),
    st.sampled_from([0.0, 0.7, 1.5]),
    st.lists(st.integers(1, VOCAB - 1), max_size=9),
    st.integers(1, 60),
    st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_guesses_never_change_an_answer(
    prompt: list[int], temperature: float, guesses: list[int], max_tokens: int, penalize: bool
) -> None:
    sampling = {"temperature": temperature, "seed": 5, "frequency_penalty": 0.4 * penalize, "num_logprobs": 2}
    asked = job(prompt, max_tokens, **sampling)
    plain = answer(Machine(), None, asked)
    for proposer in (PromptLookup(), Parrot(guesses), DraftModel(Machine())):
        assert answer(Machine(), proposer, asked) == plain


def test_a_draft_that_is_always_right_saves_most_calls() -> None:
    asked, plain, drafted = job([1, 2, 3], temperature=0.0), Machine(), Machine()
    told = answer(plain, None, asked)
    assert answer(drafted, DraftModel(Machine()), asked) == told
    assert len(told) > 20
    assert drafted.num_calls < plain.num_calls / 4


def test_a_next_answer_uses_the_cache_after_wrong_guesses() -> None:
    machine = Machine()
    generator, asked = Generator(machine, 16, Parrot([4, 4, 4])), job([1, 2, 3], 10, temperature=0.0)
    first: list[GeneratedToken] = []
    generator.run(asked, first.append, lambda: False)
    tokens = [1, 2, 3, *(token.sampled.token_id for token in first)]
    more, second = job([*tokens, 5], 10, temperature=0.0), list[GeneratedToken]()
    generator.run(more, second.append, lambda: False)
    assert second[0].num_cached >= len(tokens) - 1
    expected = answer(Machine(), None, more)
    assert [token.sampled for token in second] == [token.sampled for token in expected]


def test_lookup_takes_the_latest_and_longest_match() -> None:
    lookup = PromptLookup()
    assert lookup.propose([1, 2, 3, 4], 5) == ()
    assert list(lookup.propose([1, 2, 3, 4, 1, 2], 3)) == [3, 4, 1]
    assert list(lookup.propose([1, 2, 3, 9, 2, 3, 4, 1, 2, 3], 2)) == [9, 2]  # three agree there, two later
    assert list(lookup.propose([5, 6, 5, 6], 8)) == [5, 6]


def test_the_number_of_guesses_follows_their_luck() -> None:
    length = DraftLength()
    length.learn(4, 0)
    assert length.num_tokens == 1
    length.learn(0, 0)
    assert length.num_tokens == 1
    for _ in range(6):
        length.learn(length.num_tokens, length.num_tokens)
    assert length.num_tokens == MAX_GUESSES


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_real_session_answers_alike(bundle_dir: Path, temperature: float) -> None:
    manifest = load_manifest((bundle_dir / "manifest.json").read_bytes())
    session = DecoderSession(bundle_dir / manifest.variants[0].file, manifest.kv, 1)
    asked = job([5, 6, 7, 8] * 10, 80, temperature=temperature, seed=3)
    plain = [token.sampled.token_id for token in answer(session, None, asked)]
    for proposer in (PromptLookup(), Parrot([5, 6, 7])):
        assert [token.sampled.token_id for token in answer(session, proposer, asked)] == plain


def test_a_draft_bundle_guesses_and_changes_nothing(bundle_dir: Path, tmp_path: Path) -> None:
    ask = decode_chat_request(
        {"model": "m", "messages": [{"role": "user", "content": "One"}], "max_tokens": 24, "temperature": 0}
    )

    def ids(settings: DeviceSettings) -> list[int]:
        with Student(bundle_dir, settings=settings) as student:
            return [event.mark.token_id for event in student.stream(ask) if isinstance(event, TokenEvent)]

    plain = ids(DeviceSettings(calibration_s=0.0, speculation=False))
    draft = Path(shutil.copytree(bundle_dir, tmp_path / "draft"))
    assert ids(DeviceSettings(calibration_s=0.0, draft=draft)) == plain
    assert len(plain) == 24


def test_a_draft_is_checked_as_the_main_bundle_is(bundle_dir: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(bundle_dir, tmp_path / "damaged"))
    (damaged / "model.onnx").write_bytes((damaged / "model.onnx").read_bytes()[:-1])
    other = Path(shutil.copytree(bundle_dir, tmp_path / "other"))
    manifest = read_manifest(other)
    write_manifest(other, replace(manifest, capabilities=manifest.capabilities | {"vocab_size": 9}), None)
    for folder, error, words in (
        (tmp_path / "nowhere", BundleDamagedError, "no bundle"),
        (damaged, BundleDamagedError, r"model\.onnx"),
        (other, BundleIncompatibleError, "other tokens"),
    ):
        student = Student(bundle_dir, settings=DeviceSettings(calibration_s=0.0, draft=folder))
        with pytest.raises(error, match=words):
            student.start()
        student.close()
