"""The engine on a GPU: tokens of transformers, mixed batches, graphs, sampling, and clean books."""

from __future__ import annotations

import json
import random
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from longshore_server.native import EngineConfig, NativeEngine, SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "initializer_range": 0.05,
    "torch_dtype": "bfloat16",
}


@pytest.fixture(scope="module")
def folder() -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    path = Path(tempfile.mkdtemp())
    (path / "config.json").write_text(json.dumps(CONFIG))
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=torch.bfloat16)
    model.save_pretrained(path)
    (path / "tokenizer.json").write_text("{}")
    return path


def _engine(folder: Path, **settings: Any) -> NativeEngine:
    defaults = {"device": "cuda", "max_num_seqs": 32, "num_kv_blocks": 4000, "max_model_len": 2048}
    return NativeEngine(EngineConfig(model=str(folder), **{**defaults, **settings}))


def _prompts(*lengths: int, draw: int = 5) -> list[list[int]]:
    chosen = random.Random(draw)
    return [[chosen.randrange(3, CONFIG["vocab_size"]) for _ in range(length)] for length in lengths]


GREEDY = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)


@pytest.mark.parametrize(
    "form", [{"fuse_layers": False}, {"fuse_layers": True}, {"batch_invariant": True}], ids=str
)
def test_greedy_tokens_are_those_of_transformers(folder, form) -> None:
    """Teacher-forced: each token is the likeliest in float32, or one that bf16 cannot tell from it.

    What bf16 can tell is measured on transformers' own bf16 model: a logit that may be off by so much lets a
    token win that is up to twice as much behind. And its likeliest is that of float32 about as often.
    """
    from transformers import AutoModelForCausalLM

    prompts = _prompts(1, 5, 17, 130, 700)
    engine = _engine(folder, **form)
    answers = engine.generate(prompts, GREEDY)
    oracle = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="eager"
    ).cuda()
    sequences = [torch.tensor([p + a], device="cuda") for p, a in zip(prompts, answers, strict=True)]
    with torch.no_grad():
        rounded = [oracle(ids).logits[0].float() for ids in sequences]
        exact = [oracle.float()(ids).logits[0] for ids in sequences]
    noise = max(float((x - y).abs().max()) for x, y in zip(rounded, exact, strict=True))
    num_exact = num_exact_of_oracle = 0
    for prompt, answer, bf16, fp32 in zip(prompts, answers, rounded, exact, strict=True):
        chosen = torch.tensor(answer, device="cuda")
        rows = slice(len(prompt) - 1, -1)
        likeliest = fp32[rows].argmax(-1)
        num_exact += int((chosen == likeliest).sum())
        num_exact_of_oracle += int((bf16[rows].argmax(-1) == likeliest).sum())
        gap = fp32[rows].max(-1).values - fp32[rows].gather(1, chosen[:, None])[:, 0]
        assert gap.max() <= 2 * noise, (float(gap.max()), noise)
    num_tokens = GREEDY.max_tokens * len(prompts)
    print(f"{num_exact} of {num_tokens} are exact, {num_exact_of_oracle} of transformers' in bf16")
    assert num_exact >= num_exact_of_oracle - 0.05 * num_tokens
    engine._runner.settle()  # type: ignore[attr-defined]
    assert engine._runner._graphs.captured_shapes  # type: ignore[attr-defined]


def test_batches_agree_with_single_answers(folder) -> None:
    """As far as bf16 goes: mixed steps, decodes of several rows and of one have kernels of their own.

    Of their first five tokens 77% were the same over eight draws; a row that is not its own would lose all.
    """
    engine = _engine(folder, enable_prefix_cache=False, max_num_batched_tokens=256)
    same, draws, lengths = 0, range(5, 9), (3, 40, 9, 600, 77, 16, 31, 250)
    for draw in draws:
        prompts = _prompts(*lengths, draw=draw)
        together = engine.generate(prompts, GREEDY)
        alone = [engine.generate([prompt], GREEDY)[0] for prompt in prompts]
        firsts = [a[0] == b[0] for a, b in zip(together, alone, strict=True)]
        assert sum(firsts) >= len(prompts) - 1
        same += sum(
            x == y for a, b in zip(together, alone, strict=True) for x, y in zip(a[:5], b[:5], strict=True)
        )
    engine._runner.settle()  # type: ignore[attr-defined]
    assert engine._runner._mixed_graphs.captured_shapes  # type: ignore[attr-defined]
    assert same >= 0.7 * 5 * len(lengths) * len(draws)


def test_captured_steps_answer_as_launched_ones(folder) -> None:
    """Shapes are captured while others go on; whichever way a step is run, its tokens are the same."""
    rounds = [_prompts(*(1 + (37 * n * k) % 200 for n in range(1, 3 + 5 * k))) for k in range(1, 5)]
    answers = []
    for is_eager in (False, True):
        engine = _engine(folder, enable_prefix_cache=False, max_num_batched_tokens=256)
        if is_eager:
            engine._runner.stay_eager()  # type: ignore[attr-defined]
        answers.append([engine.generate(prompts, GREEDY) for prompts in rounds * 2])
        shapes = engine._runner._graphs.captured_shapes, engine._runner._mixed_graphs.captured_shapes  # type: ignore[attr-defined]
        print(f"captured: {shapes}")
        assert all(shapes) is not is_eager
        engine.close()
    assert answers[0] == answers[1]


def test_sampling_follows_the_distribution(folder) -> None:
    from longshore.seeds import row_keys
    from longshore_server.native.gpu.triton_sampling import sample_rows

    num = 20000
    row = torch.tensor([0.0, 1.0, 2.0, -1.0] + [-30.0] * 5000, device="cuda")
    logits = row.repeat(num, 1).bfloat16()
    keys = torch.tensor([row_keys(seed, 0) for seed in range(num)], device="cuda")
    temperatures = torch.full((num,), 0.8, dtype=torch.float64, device="cuda")
    seats = torch.arange(num, device="cuda")
    last, sampled = torch.empty_like(seats), torch.empty_like(seats)
    sample_rows(logits, temperatures, keys, seats, last, sampled)
    shares = torch.bincount(sampled, minlength=4)[:4] / num
    assert torch.allclose(shares, (row[:4] / 0.8).softmax(0), atol=0.015)
    assert torch.equal(last, sampled)
    logits[7, 4000] = float("nan")
    sample_rows(logits, temperatures * 0, keys, seats, last, sampled)
    assert sampled[7] == -1 and last[7] == 0 and sampled[6] == 2


def test_filtered_draws_are_those_of_the_common_sampler() -> None:
    """Top-k, top-p and min-p of many kinds over a real vocabulary's size, ties and bf16 among them."""
    from longshore_server.native.gpu.triton_sampling import filter_numbers, sample_filtered_rows
    from longshore_server.native.sampler import sample
    from longshore_server.native.sequence import Sequence

    chosen = random.Random(3)
    torch.manual_seed(3)
    num, vocab_size = 192, 128256
    logits = 3 * torch.randn(num + 5, vocab_size, device="cuda")
    logits[10:20] = logits[10:20].round()
    sequences = [Sequence(str(n), [1], _filters(chosen, seed=n), max_model_len=99) for n in range(num)]
    for form in (logits, logits.bfloat16()):
        rows = list(range(3, num + 3))
        expected = [token.token_id for token in sample(form[rows], sequences)]
        last = torch.full((2 * num,), -7, device="cuda")
        sampled = torch.full((num + 5,), -5, device="cuda")
        numbers = filter_numbers(rows, [2 * n for n in range(num)], sequences, pinned=True).cuda()
        sample_filtered_rows(form, numbers, last, sampled)
        same = sum(a == b for a, b in zip(sampled[3:-2].tolist(), expected, strict=True))
        assert same >= num - 2, same  # sums of probability are taken in another order
        assert torch.equal(last[::2], sampled[3:-2])
        assert sampled[:3].tolist() == [-5] * 3 and sampled[-2:].tolist() == [-5] * 2


def _filters(chosen: random.Random, seed: int) -> SamplingParams:
    params = SamplingParams(
        temperature=chosen.choice([0.3, 0.8, 1.0, 1.7]),
        top_p=chosen.choice([1.0, 0.99, 0.9, 0.5, 0.05]),
        top_k=chosen.choice([0, 1, 3, 40, 700, 10**12]),
        min_p=chosen.choice([0.0, 0.0, 0.05, 1.0]),
        seed=seed,
    )
    return params if params.is_filtered else SamplingParams(top_p=0.8, seed=seed)


def test_random_requests_and_aborts_leave_clean_books(folder) -> None:
    chosen = random.Random(11)
    engine = _engine(
        folder, num_kv_blocks=300, max_model_len=128, max_num_batched_tokens=512, max_num_waiting=64
    )
    num_added, num_ended, live = 0, 0, set()
    while num_added < 10_000 or engine.has_unfinished():
        while num_added < 10_000 and len(live) < 90:
            params = SamplingParams(
                max_tokens=chosen.randrange(1, 9),
                temperature=chosen.choice([0.0, 0.0, 1.0]),
                top_p=0.9 if chosen.random() < 0.01 else 1.0,
                frequency_penalty=0.5 if chosen.random() < 0.005 else 0.0,
                seed=num_added,
            )
            prompt = [chosen.randrange(3, 9)] * chosen.randrange(1, 100)
            priority = chosen.randrange(3)
            engine.add_request(f"r{num_added}", prompt, params, tenant=chosen.choice("ab"), priority=priority)
            live.add(f"r{num_added}")
            num_added += 1
        if chosen.random() < 0.3:
            engine.abort(chosen.choice(sorted(live)[:40]))
        for output in engine.step():
            assert output.error is None
            if output.finish_reason is not None:
                live.discard(output.request_id)
                num_ended += 1
    engine.check_integrity()
    stats = engine.stats()
    assert num_ended == 10_000 and not live
    assert (stats.num_running, stats.num_waiting, stats.kv_usage) == (0, 0, 0.0)


def test_attention_is_compiled_before_a_step_needs_it(folder) -> None:
    from longshore_server.native.attention.gluon_decode import _product_decode_kernel
    from longshore_server.native.attention.triton_parts import _parts_kernel

    engine = _engine(folder, enable_prefix_cache=False)
    engine.generate(_prompts(20), SamplingParams(max_tokens=1, temperature=0.0))  # no decode
    engine.settle()
    device = torch.cuda.current_device()
    kernels = [kernel.device_caches[device][0] for kernel in (_product_decode_kernel, _parts_kernel)]
    before = [len(compiled) for compiled in kernels]
    assert all(before)
    for num_rows in (1, 3, 14, 32):
        engine.generate(_prompts(*range(20, 20 + num_rows)), GREEDY)
    assert [len(compiled) for compiled in kernels] == before


def test_a_new_model_answers_without_compiling(tmp_path) -> None:
    """Its first prompt and decode: their kernels were compiled while it was loaded."""
    from triton import knobs

    config = CONFIG | {
        "num_attention_heads": 12,
        "num_key_value_heads": 3,
        "hidden_size": 1536,
    }  # no test has
    (tmp_path / "config.json").write_text(json.dumps(config))
    compiled: list[str] = []

    def note(*_: Any, fn: Any, **__: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            compiled.append(fn.name)

    knobs.runtime.jit_post_compile_hook = note
    try:
        engine = _engine(tmp_path, load_format="random", enable_prefix_cache=False)
        (answer,) = engine.generate(_prompts(100), GREEDY)
    finally:
        knobs.runtime.jit_post_compile_hook = None
    assert len(answer) == GREEDY.max_tokens
    assert not compiled


def test_an_idle_engine_captures_every_shape(folder) -> None:
    """And its steps are those of one that captures nothing."""
    from longshore_server.native.gpu.graphs import buckets_up_to
    from longshore_server.native.gpu.mixed_steps import shapes_of

    engine = _engine(folder, enable_prefix_cache=False)
    deadline_s = time.monotonic() + 60
    while engine.prepare():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    runner: Any = engine._runner
    captured = [{*graphs.captured_shapes} for graphs in (runner._graphs, runner._mixed_graphs)]
    assert captured == [{*buckets_up_to(32)}, {*shapes_of(32, runner._tile_rows)}]
    eager = _engine(folder, enable_prefix_cache=False)
    eager._runner.stay_eager()  # type: ignore[attr-defined]
    assert not eager.prepare()
    prompts = _prompts(3, 90, 41, 250, 7)
    assert engine.generate(prompts, GREEDY) == eager.generate(prompts, GREEDY)
    assert captured == [{*graphs.captured_shapes} for graphs in (runner._graphs, runner._mixed_graphs)]
