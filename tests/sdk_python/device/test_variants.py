"""Quantized bundles behind the whole device tier: their answers are their graphs', guesses or not."""

from __future__ import annotations

from pathlib import Path

import pytest

from longshore.device import DeviceSettings, Student, calibrate
from longshore.wire import TokenEvent, decode_completion_request
from longshore_export.bundle import export_student


def answer(bundle: Path, num_tokens: int = 60, **settings: object) -> list[tuple[int, float]]:
    """Token ids with their log-probabilities to three places."""
    request = decode_completion_request(
        {
            "model": "s",
            "prompt": [5, 6, 7, 8] * 10,
            "temperature": 0,
            "max_tokens": num_tokens,
            "ignore_eos": True,
            "logprobs": 1,
        }
    )
    chosen = DeviceSettings(calibration_s=0.0, **settings)  # type: ignore[arg-type]
    with Student(bundle, settings=chosen) as student:
        events = list(student.stream(request))
    told = [event for event in events if isinstance(event, TokenEvent)]
    return [
        (event.mark.token_id, round(event.logprob.logprob, 3)) for event in told if event.logprob is not None
    ]


@pytest.mark.parametrize("variant", ["int8", "int4-b32", "int4-b32-p8"])
def test_guessing_ahead_leaves_a_variants_answer_alone(model_dir: Path, tmp_path: Path, variant: str) -> None:
    bundle = export_student(model_dir, tmp_path / "bundle", variant=variant).path
    told = answer(bundle)
    assert len(told) == 60
    plain = answer(bundle, speculation=False)
    assert [token_id for token_id, _ in told] == [token_id for token_id, _ in plain]


def test_a_graph_for_prompts_is_used_for_prompts_alone(model_dir: Path, tmp_path: Path) -> None:
    """Its int8 activations show in an answer; a prompt in pieces too short for it is read by the other."""
    with_prefill = export_student(model_dir, tmp_path / "p8", variant="int4-b32-p8").path
    plain = export_student(model_dir, tmp_path / "plain", variant="int4-b32").path
    assert answer(with_prefill, 1) != answer(plain, 1)
    assert answer(with_prefill, 1, prefill_chunk_tokens=4) == answer(plain, 1, prefill_chunk_tokens=4)


def test_threads_are_chosen_by_what_they_bring(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {1: 100.0, 2: 180.0, 4: 190.0, 8: 900.0}
    monkeypatch.setattr(calibrate, "measure", lambda session, _: (1.0, rates[session]))
    choose = calibrate.choose_threads
    assert choose(lambda num_threads: num_threads, 0.1, 8) == 2  # type: ignore[arg-type,return-value]
    assert choose(lambda num_threads: num_threads, 0.1, 1) == 1  # type: ignore[arg-type,return-value]


def test_a_student_can_measure_its_threads(bundle_dir: Path) -> None:
    assert len(answer(bundle_dir, 5, num_threads=0)) == 5
