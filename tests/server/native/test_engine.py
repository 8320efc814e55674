"""The engine's promises around the model: limits, endings, isolation, and clean books after any traffic."""

from __future__ import annotations

import gc
import logging
import random
import weakref

import pytest
import torch

from longshore_server.native import SamplingParams
from longshore_server.native.errors import (
    DuplicateRequestError,
    InvalidRequestError,
    NativeEngineError,
    PromptTooLongError,
    QueueFullError,
)


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def _drain(engine) -> dict[str, list]:
    outputs: dict[str, list] = {}
    for _ in range(2000):
        if not engine.has_unfinished():
            return outputs
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
    raise AssertionError("the engine does not come to an end")


# --- limits ---


def test_a_prompt_too_long_names_both_lengths(make_engine, greedy) -> None:
    engine = make_engine("llama", max_model_len=20)
    with pytest.raises(PromptTooLongError, match=r"20 .*20") as caught:
        engine.add_request("r", [5] * 20, greedy())
    assert (caught.value.num_prompt_tokens, caught.value.max_model_len) == (20, 20)
    with pytest.raises(PromptTooLongError):
        engine.add_request("r", [5] * 12, greedy(100, ignore_eos=True), continue_from=[6] * 9)
    assert not engine.has_unfinished()


def test_max_tokens_is_clipped_to_what_fits(make_engine, greedy) -> None:
    engine = make_engine("llama", max_model_len=20, num_kv_blocks=5)
    engine.add_request("r", [5] * 17, greedy(500, ignore_eos=True))
    outputs = _drain(engine)["r"]
    assert [o.offset for o in outputs] == [0, 1, 2]
    assert [o.finish_reason for o in outputs] == [None, None, "length"]


@pytest.mark.parametrize(
    ("field", "arguments"),
    [
        ("prompt_token_ids", {"prompt_token_ids": []}),
        ("prompt_token_ids", {"prompt_token_ids": [300]}),
        ("prompt_token_ids", {"prompt_token_ids": [-1]}),
        ("prompt_token_ids", {"prompt_token_ids": [True]}),
        ("prompt_token_ids", {"prompt_token_ids": ["5"]}),
        ("continue_from", {"continue_from": [5, 300]}),
        ("stop_token_ids", {"params": SamplingParams(stop_token_ids=(300,))}),
        ("logit_bias", {"params": SamplingParams(logit_bias={300: 1.0})}),
        ("deadline_s", {"deadline_s": float("nan")}),
        ("priority", {"priority": 1.5}),
    ],
    ids=str,
)
def test_a_bad_request_names_its_field_and_changes_nothing(field, arguments, make_engine) -> None:
    engine = make_engine("llama")
    request = {"prompt_token_ids": [5], "params": SamplingParams(), **arguments}
    with pytest.raises(InvalidRequestError) as caught:
        engine.add_request("r", **request)
    assert caught.value.field == field
    assert not engine.has_unfinished()
    engine.add_request("r", [5], SamplingParams(max_tokens=1))
    assert len(_drain(engine)["r"]) == 1


def test_duplicates_and_a_full_queue(make_engine, greedy) -> None:
    engine = make_engine("llama", max_num_seqs=1, max_num_waiting=1)
    engine.add_request("a", [5], greedy(2))
    with pytest.raises(DuplicateRequestError):
        engine.add_request("a", [6], greedy(2))
    engine.add_request("b", [5], greedy(2))
    with pytest.raises(QueueFullError):
        engine.add_request("c", [5], greedy(2))
    assert set(_drain(engine)) == {"a", "b"}
    engine.add_request("a", [5], greedy(2))  # the id is free again


# --- endings ---


def test_stop_tokens_and_min_tokens(make_engine, greedy) -> None:
    engine = make_engine("llama")
    free = engine.generate([[5, 6, 7]], greedy(12, ignore_eos=True))[0]
    stop = free[4]
    first = free.index(stop)
    engine.add_request("r", [5, 6, 7], greedy(12, ignore_eos=True, stop_token_ids=(stop,)))
    outputs = _drain(engine)["r"]
    assert [o.token_id for o in outputs] == free[: first + 1]
    assert outputs[-1].finish_reason == "stop"
    engine.add_request("m", [5, 6, 7], greedy(12, ignore_eos=True, stop_token_ids=(stop,), min_tokens=10))
    outputs = _drain(engine)["m"]
    assert len(outputs) > 10 and stop not in [o.token_id for o in outputs[:10]]


def test_eos_ends_unless_ignored(make_engine, greedy) -> None:
    engine = make_engine("llama")
    (eos,) = engine.eos_token_ids
    bias = {eos: 100.0}
    ends, goes_on = engine.generate(
        [[5], [5]], [greedy(4, logit_bias=bias), greedy(4, logit_bias=bias, ignore_eos=True)]
    )
    assert ends == [eos] and goes_on == [eos] * 4


def test_deadlines_end_waiting_and_running(make_engine, greedy) -> None:
    clock = Clock()
    engine = make_engine("llama", clock=clock, max_num_seqs=1)
    engine.add_request("running", [5, 6], greedy(50, ignore_eos=True), deadline_s=105.0)
    engine.add_request("waiting", [5, 6], greedy(50), deadline_s=101.0)
    engine.add_request("patient", [5, 6], greedy(3, ignore_eos=True))
    engine.step()
    clock.now_s = 102.0
    outputs = {o.request_id: o for o in engine.step()}
    assert outputs["waiting"].finish_reason == "deadline" and outputs["waiting"].offset == 0
    assert outputs["running"].offset == 1
    clock.now_s = 106.0
    outputs = _drain(engine)
    assert [(o.token_id, o.offset, o.finish_reason) for o in outputs["running"]] == [(None, 2, "deadline")]
    assert len(outputs["patient"]) == 3
    engine.check_integrity()


def test_abort_is_reported_once_and_frees_everything(make_engine, greedy) -> None:
    engine = make_engine("llama")
    engine.add_request("a", [5] * 30, greedy(50, ignore_eos=True))
    engine.step()
    assert engine.stats().kv_usage > 0
    assert engine.abort("a") and not engine.abort("a") and not engine.abort("never")
    assert engine.stats().kv_usage == 0.0 and engine.has_unfinished()
    (output,) = engine.step()
    assert (output.request_id, output.token_id, output.finish_reason, output.offset) == (
        "a",
        None,
        "abort",
        1,
    )
    assert not engine.has_unfinished()


# --- one request's failure ---


class Activations:
    """What a pass holds while it runs."""


class Poison:
    """A model forward that misbehaves when a token of the batch is the poison."""

    def __init__(self, engine, token: int, mode: str) -> None:
        self.model, self.token, self.mode = engine._runner.model, token, mode
        self.num_calls = 0
        self.passes = weakref.WeakSet()  # those that failed and still hold memory
        engine._runner.model = self

    def __call__(self, input_ids, logits_to_keep, **arguments):
        self.num_calls += 1
        poisoned = (input_ids[0] == self.token).nonzero()
        if len(poisoned) and self.mode == "raise":
            activations = Activations()
            self.passes.add(activations)
            assert len(self.passes) == 1, "an earlier pass still holds its memory"
            raise RuntimeError("poison")
        output = self.model(input_ids=input_ids, logits_to_keep=logits_to_keep, **arguments)
        if self.mode == "nan":
            output.logits[0, torch.isin(logits_to_keep, poisoned)] = float("nan")
        return output


@pytest.mark.parametrize("mode", ["raise", "nan"])
def test_a_request_that_breaks_the_model_ends_alone(mode, make_engine, greedy) -> None:
    prompts = {f"good-{index}": [10 + index, 20, 30] for index in range(6)}
    params = greedy(8, ignore_eos=True, logit_bias={99: -100.0})
    engine = make_engine("llama", enable_prefix_cache=False)
    expected = dict(zip(prompts, engine.generate(list(prompts.values()), params), strict=True))

    engine = make_engine("llama", fuse_layers=False)
    poison = Poison(engine, token=99, mode=mode)
    for request_id, prompt in prompts.items():
        engine.add_request(request_id, prompt, params)
    engine.add_request("bad", [5, 6, 99], params)
    logging.disable()  # pytest keeps the tracebacks that are logged
    gc.disable()  # what a pass that failed has allocated must not wait for the collector
    try:
        outputs = _drain(engine)
    finally:
        gc.enable()
        logging.disable(logging.NOTSET)
    assert not poison.passes
    (bad,) = outputs.pop("bad")
    assert bad.finish_reason == "error" and bad.error and bad.token_id is None
    assert {name: [o.token_id for o in outs] for name, outs in outputs.items()} == expected
    engine.check_integrity()
    assert engine.stats().num_failed == 1


def test_real_nan_in_one_requests_kv_reaches_no_other(make_engine, greedy, oracle) -> None:
    """A poisoned embedding makes NaN keys and values; the blocks are reused and the padding stays clean."""
    prompts = [[10 + index] * (3 + 5 * index) for index in range(5)]
    params = greedy(8, ignore_eos=True, logit_bias={99: -100.0})
    clean = make_engine("mistral").generate(prompts, params)
    engine = make_engine("mistral", num_kv_blocks=40, max_model_len=120, fuse_layers=False)
    with torch.no_grad():
        engine._runner.model.get_input_embeddings().weight[99] = float("nan")
    for round_number in range(3):
        engine.add_request("bad", [99] * 50, params)
        for index, prompt in enumerate(prompts):
            engine.add_request(f"good-{index}", prompt, params)
        outputs = _drain(engine)
        assert outputs.pop("bad")[-1].finish_reason == "error", round_number
        assert [[o.token_id for o in outputs[f"good-{index}"]] for index in range(5)] == clean
    engine.check_integrity()


# --- random traffic ---


@pytest.mark.parametrize("family", ["qwen2", "mistral"])
def test_random_adds_and_aborts_leave_the_books_clean(family, make_engine) -> None:
    chosen = random.Random(family)
    clock = Clock()
    engine = make_engine(
        family, clock=clock, num_kv_blocks=48, max_model_len=80, max_num_batched_tokens=24, max_num_waiting=24
    )
    live: set[str] = set()
    ended: dict[str, str] = {}
    offsets: dict[str, int] = {}
    refused = 0
    for number in range(250):
        for _ in range(chosen.randrange(3)):
            request_id = f"r{number}-{chosen.random()}"
            params = SamplingParams(
                max_tokens=chosen.randrange(1, 40),
                temperature=chosen.choice([0.0, 1.0]),
                frequency_penalty=chosen.choice([0.0, 0.5]),
                seed=number,
            )
            try:
                engine.add_request(
                    request_id,
                    [chosen.choice([7, 8])] * chosen.randrange(1, 79),
                    params,
                    tenant=chosen.choice("ab"),
                    priority=chosen.randrange(3),
                    deadline_s=chosen.choice([None, clock.now_s + chosen.random() * 40]),
                )
                live.add(request_id)
                offsets[request_id] = 0
            except QueueFullError:
                refused += 1
        if live and chosen.random() < 0.3:
            engine.abort(chosen.choice(sorted(live)))
        clock.now_s += chosen.random()
        for output in engine.step():
            assert output.request_id in live
            assert output.offset == offsets[output.request_id]
            offsets[output.request_id] += 1
            if output.finish_reason is not None:
                live.discard(output.request_id)
                ended[output.request_id] = output.finish_reason
        if number % 10 == 0:
            engine.check_integrity()
    for outputs in _drain(engine).values():
        ended[outputs[-1].request_id] = outputs[-1].finish_reason
    engine.check_integrity()
    stats = engine.stats()
    assert set(ended) == set(offsets) and stats.num_finished == len(ended)
    assert {"length", "abort", "deadline"} <= set(ended.values())
    assert refused and stats.preemptions and stats.prefix_cache_hits
    assert (stats.num_running, stats.num_waiting, stats.kv_usage) == (0, 0, 0.0)


def test_generate_leaves_nothing_behind_when_it_fails(make_engine, greedy) -> None:
    engine = make_engine("llama", max_num_seqs=2, max_num_waiting=0, fuse_layers=False)
    with pytest.raises(InvalidRequestError):
        engine.generate([[5], [6], [300]], [greedy(1), greedy(50, ignore_eos=True), greedy(1)])
    assert not engine.has_unfinished()
    engine.check_integrity()
    Poison(engine, token=99, mode="raise")
    with pytest.raises(NativeEngineError, match="generate-1"):
        engine.generate([[5], [99]], greedy(20, ignore_eos=True))
    assert not engine.has_unfinished() and engine.stats().kv_usage == 0.0
    engine.add_request("r", [5], greedy(2))
    with pytest.raises(NativeEngineError, match="other requests"):
        engine.generate([[5]], greedy(2))
