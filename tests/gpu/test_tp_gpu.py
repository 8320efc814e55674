"""Ranks on GPUs: over NCCL where there are two GPUs, else two ranks on one over gloo, against one rank.

Runs under pytest, and without it: `PYTHONPATH=server:sdk_python:tests python3 tests/gpu/test_tp_gpu.py`.
"""

from __future__ import annotations

import faulthandler
import json
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from longshore_server.native import EngineConfig, NativeEngine, SamplingParams

try:
    import pytest

    pytestmark = [
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    ]
except ImportError:  # a bare GPU machine
    pass

CONFIG: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 1024,
    "intermediate_size": 2816, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2,
    "head_dim": 128, "vocab_size": 32000, "max_position_embeddings": 1024, "eos_token_id": 2,
    "initializer_range": 0.06, "tie_word_embeddings": False,
}  # fmt: skip
PROMPTS = [[(7 * i + 911 * k) % 31000 + 5 for i in range(40 + 12 * k)] for k in range(16)]
# bf16 holds 8 bits, and partial sums of ranks are rounded before they are added.
MAX_LOGPROB_ERROR = 0.15
# Ranks round what they multiply in FP8 on their own: two roundings differ by the root of 2 of one.
MAX_RATIO_TO_FP8 = 2.0
NUM_TOKENS = 12
NUM_LOGPROBS = 20
NUM_RANDOM_REQUESTS = 400
TEST_TIMEOUT_S = 100


def _has_two_gpus() -> bool:
    return torch.cuda.device_count() >= 2


def _spread() -> dict[str, Any]:
    """Two ranks: each on a GPU of its own, or both on the only one."""
    return {"device": "cuda" if _has_two_gpus() else "cuda:0", "tensor_parallel_size": 2}


def _engine(folder: Path, **settings: Any) -> NativeEngine:
    defaults: dict[str, Any] = {
        "load_format": "random",
        "dtype": "bfloat16",
        "num_kv_blocks": 256,
        "max_num_seqs": 8,
        "device": "cuda:0",
    }
    return NativeEngine(EngineConfig(model=str(folder), **{**defaults, **settings}))


def _folder(name: str) -> Path:
    folder = Path(name)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def _first_logprobs(engine: NativeEngine) -> list[tuple[tuple[int, float], ...]]:
    """Each prompt's likeliest first tokens with their logprobs, and that longer answers come to an end."""
    params = SamplingParams(
        max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True, num_logprobs=NUM_LOGPROBS
    )
    for index, prompt in enumerate(PROMPTS):
        engine.add_request(str(index), prompt, params)
    first: dict[str, tuple[tuple[int, float], ...]] = {}
    num_tokens = 0
    while engine.has_unfinished():
        for output in engine.step():
            assert output.error is None and output.token_id is not None and output.logprob is not None
            first.setdefault(output.request_id, output.top_logprobs)
            num_tokens += 1
    assert num_tokens == NUM_TOKENS * len(PROMPTS)
    engine.check_integrity()
    return [first[str(index)] for index in range(len(PROMPTS))]


@dataclass(frozen=True)
class _Answers:
    """The likeliest first tokens of each prompt, and three rounds of greedy answers without logprobs."""

    likeliest: list[tuple[tuple[int, float], ...]]
    rounds: list[list[list[int]]]

    @property
    def best(self) -> torch.Tensor:
        return torch.tensor([each[0][1] for each in self.likeliest])

    def first_tokens(self) -> list[list[int]]:
        """One list for each time that the prompts were answered."""
        return [
            [each[0][0] for each in self.likeliest],
            *([a[0] for a in answers] for answers in self.rounds),
        ]


def _answers(folder: Path, **settings: Any) -> _Answers:
    greedy = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
    began_s = time.monotonic()
    engine = _engine(folder, **settings)
    try:
        likeliest = _first_logprobs(engine)
        rounds = [engine.generate(PROMPTS, greedy) for _ in range(3)]  # graphs, from the second on
    finally:
        engine.close()
    answers = _Answers(likeliest, rounds)
    print(f"{settings}: {time.monotonic() - began_s:.1f} s, first tokens {answers.first_tokens()[0]}")
    return answers


def _compare(spread: dict[str, Any], **settings: Any) -> None:
    """Ranks against one rank; in FP8, where both round, by what FP8 itself changes."""
    with tempfile.TemporaryDirectory() as name:
        folder = _folder(name)
        alone = _answers(folder, **settings)
        together = _answers(folder, **settings, **spread)
        error = alone.best - together.best
        if "quantization" in settings:
            rounding = alone.best - _answers(folder).best
            off, most = float(error.norm()), MAX_RATIO_TO_FP8 * float(rounding.norm())
            margin = 2 * MAX_RATIO_TO_FP8 * float(rounding.abs().max())
        else:
            off, most = float(error.abs().max()), MAX_LOGPROB_ERROR
            margin = 2 * MAX_LOGPROB_ERROR
    print(f"first logprobs are off by {off:.3f}, {most:.3f} are allowed")
    assert off <= most
    for tokens in together.first_tokens():
        behind = [
            each[0][1] - dict(each).get(token, float("-inf"))
            for token, each in zip(tokens, alone.likeliest, strict=True)
        ]
        print(f"first tokens are behind one rank's by {max(behind):.3f} at most, {margin:.3f} are allowed")
        assert max(behind) <= margin
    firsts = [a[0] == b[0] for a, b in zip(alone.rounds[0], together.rounds[0], strict=True)]
    print(f"first tokens equal: {sum(firsts)} of {len(firsts)}")
    assert sum(firsts) >= len(firsts) * 0.4
    again, once_more = together.first_tokens()[2:]
    agreeing = [a == b for a, b in zip(again, once_more, strict=True)]
    assert sum(agreeing) >= len(agreeing) - 1, "a graph's answers differ from those of the step it holds"


def test_two_ranks_answer_as_one() -> None:
    _compare(_spread())


def test_two_ranks_in_fp8_answer_as_one() -> None:
    _compare(_spread(), quantization="fp8")


def test_two_ranks_with_kv_in_fp8_answer_as_one() -> None:
    _compare(_spread(), quantization="fp8", kv_cache_dtype="fp8")


def test_attention_and_feed_forward_on_one_gpu_over_gloo() -> None:
    _compare({"device": "cuda:0", "placement": "attention_feed_forward"})


def test_two_ranks_on_one_gpu_over_gloo_where_there_are_two() -> None:
    if _has_two_gpus():
        _compare({"device": "cuda:0", "tensor_parallel_size": 2})


def test_two_ranks_capture_graphs_and_keep_clean_books() -> None:
    """Random requests, aborts, priorities, penalties and filters; ranks stay in step through all of it."""
    chosen = random.Random(7)
    with tempfile.TemporaryDirectory() as name:
        engine = _engine(_folder(name), num_kv_blocks=90, max_model_len=128, max_num_waiting=64, **_spread())
        try:
            num_ended = _random_traffic(engine, chosen)
            engine.check_integrity()
            assert num_ended == NUM_RANDOM_REQUESTS and engine.stats().kv_usage == 0.0
            assert engine.stats().preemptions > 0
            captured = engine._runner._graphs.captured_shapes
            print(f"captured: {captured}")
            assert bool(captured) == _has_two_gpus()  # gloo goes through the host
        finally:
            engine.close()


def test_two_ranks_go_on_from_blocks_that_left_and_came_back() -> None:
    """An answer that is taken out twice, while others fill its blocks, is the undisturbed one."""
    with tempfile.TemporaryDirectory() as name:
        folder = _folder(name)
        for tiers in (("host:64MiB",), (f"file:{name}:64MiB",), ("host:128KiB", f"file:{name}:64MiB")):
            few = {"num_kv_blocks": 40, "max_model_len": 512, "enable_prefix_cache": False}
            engine = _engine(folder, kv_swap=tiers, **few, **_spread())
            try:
                _always_swap(engine)
                calm, interrupted = _take_out_twice(engine)
                stats = engine.stats()
                engine.check_integrity()
            finally:
                engine.close()
            print(tiers, calm, interrupted, stats)
            assert interrupted == calm
            assert (stats.num_swap_faults, stats.num_blocks_in_swap, stats.kv_usage) == (0, 0, 0.0)


def _take_out_twice(engine: NativeEngine) -> tuple[list[int], list[int]]:
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
    tokens: dict[str, list[int]] = {}
    for name in ("warm", "calm"):  # graphs, from the second on
        engine.add_request(name, PROMPTS[0], params)
        _drain(engine, tokens)
    engine.add_request("r", PROMPTS[0], params)
    for time_out in range(2):
        while len(tokens.get("r", [])) < 4 * (time_out + 1):
            _note(engine, tokens)
        assert engine.swap_out("r")
        for index, prompt in enumerate(PROMPTS[1:]):
            engine.add_request(f"{time_out}-{index}", prompt, params)
        _drain(engine, tokens)
        before = engine.stats()
        assert engine.swap_in("r")
    _drain(engine, tokens)
    after = engine.stats()
    assert after.num_blocks_swapped_in > before.num_blocks_swapped_in > 0
    assert after.num_prefill_tokens == before.num_prefill_tokens, "what was kept was computed again"
    return tokens["calm"], tokens["r"]


def test_two_ranks_swap_in_random_traffic_and_keep_clean_books() -> None:
    with tempfile.TemporaryDirectory() as name:
        tiers = ("host:2MiB", f"file:{name}:64MiB")
        few = {"num_kv_blocks": 60, "max_model_len": 128, "max_num_waiting": 64, "kv_swap": tiers}
        engine = _engine(_folder(name), **few, **_spread())
        try:
            _always_swap(engine)
            assert _random_traffic(engine, random.Random(8)) == NUM_RANDOM_REQUESTS
            engine.check_integrity()
            stats = engine.stats()
        finally:
            engine.close()
        print(stats)
        assert stats.num_swaps_chosen and stats.num_blocks_swapped_out and stats.num_blocks_swapped_in
        assert (stats.num_failed, stats.kv_usage) == (0, 0.0)


def _always_swap(engine: NativeEngine) -> None:
    """Takes the choice from the clock."""
    assert engine._offload is not None
    for name in ("is_swap_faster", "is_load_faster"):
        setattr(engine._offload.speeds, name, lambda *_: True)


def _note(engine: NativeEngine, tokens: dict[str, list[int]]) -> None:
    for output in engine.step():
        assert output.error is None and output.token_id is not None
        tokens.setdefault(output.request_id, []).append(output.token_id)


def _drain(engine: NativeEngine, tokens: dict[str, list[int]]) -> None:
    while engine.has_unfinished():
        _note(engine, tokens)


def _random_traffic(engine: NativeEngine, chosen: random.Random) -> int:
    num_added, num_ended, live = 0, 0, set()
    while num_added < NUM_RANDOM_REQUESTS or engine.has_unfinished():
        while num_added < NUM_RANDOM_REQUESTS and len(live) < 24:
            name = f"r{num_added}"
            params = SamplingParams(
                max_tokens=chosen.randrange(1, 30),
                temperature=chosen.choice([0.0, 0.0, 1.0]),
                top_p=0.9 if chosen.random() < 0.1 else 1.0,
                frequency_penalty=0.5 if chosen.random() < 0.02 else 0.0,
                seed=num_added,
            )
            prompt = [chosen.randrange(3, 9)] * chosen.randrange(1, 90)
            engine.add_request(name, prompt, params, priority=chosen.randrange(3))
            live.add(name)
            num_added += 1
        if chosen.random() < 0.2 and live:
            engine.abort(chosen.choice(sorted(live)))
        for output in engine.step():
            assert output.error is None
            if output.finish_reason is not None:
                live.discard(output.request_id)
                num_ended += 1
    return num_ended


def _run(test: Callable[[], None]) -> bool:
    """One test by itself, within TEST_TIMEOUT_S."""
    signal.alarm(TEST_TIMEOUT_S)
    faulthandler.dump_traceback_later(
        TEST_TIMEOUT_S + 10, exit=True
    )  # a wait outside of Python hears no alarm
    began_s = time.monotonic()
    try:
        test()
    except BaseException:
        traceback.print_exc()
        print(f"FAILED {test.__name__} after {time.monotonic() - began_s:.1f} s", flush=True)
        return False
    finally:
        signal.alarm(0)
        faulthandler.cancel_dump_traceback_later()
    print(f"passed {test.__name__} in {time.monotonic() - began_s:.1f} s", flush=True)
    return True


def _time_out(*_: Any) -> None:
    raise TimeoutError(f"took more than {TEST_TIMEOUT_S} s")


if __name__ == "__main__":
    signal.signal(signal.SIGALRM, _time_out)
    wanted = sys.argv[1:]
    tests = [test for name, test in list(globals().items()) if name.startswith("test_")]
    passed = [_run(test) for test in tests if not wanted or test.__name__ in wanted]
    gpus = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    print(f"{sum(passed)} of {len(passed)} passed on {gpus}, torch {torch.__version__}")
    sys.exit(0 if all(passed) else 1)
