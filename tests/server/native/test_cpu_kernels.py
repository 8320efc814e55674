"""Compiled CPU steps: torch's numbers, rows that are equal bits in any company, and how they are made."""

from __future__ import annotations

import ctypes
import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from longshore_server.native import EngineConfig, NativeEngine, SamplingParams
from longshore_server.native.cpu import compiled, structs
from longshore_server.native.cpu.compiled import cache_folder, find_compiler, is_row_invariant, load_library
from longshore_server.native.cpu.packing import PackedMatrix
from longshore_server.native.cpu.runner import CpuRunner

pytestmark = pytest.mark.skipif(load_library() is None, reason="no C compiler")

PROMPTS = [[5, 6, 7], [11] * 40, list(range(20, 90))]


def logprobs(engine: NativeEngine, prompts: list[list[int]], max_tokens: int = 12) -> list[list[tuple]]:
    """For each prompt, the (token, logprob, top logprobs) of a greedy answer."""
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, num_logprobs=3)
    for index, prompt in enumerate(prompts):
        engine.add_request(str(index), prompt, params)
    answers: list[list[tuple]] = [[] for _ in prompts]
    while engine.has_unfinished():
        for output in engine.step():
            answers[int(output.request_id)].append((output.token_id, output.logprob, output.top_logprobs))
    return answers


def is_compiled(engine: NativeEngine) -> bool:
    return isinstance(engine._runner, CpuRunner)


# --- matrix products ---


@given(
    num_out=st.integers(1, 130),
    num_in=st.integers(1, 90),
    num_rows=st.integers(1, 110),
    has_bias=st.booleans(),
    is_bf16=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40)
@torch.inference_mode()
def test_products_are_right_and_a_row_has_the_same_bits_alone(
    num_out, num_in, num_rows, has_bias, is_bf16, seed
) -> None:
    torch.manual_seed(seed)
    weight, bias = torch.randn(num_out, num_in), torch.randn(num_out) if has_bias else None
    if is_bf16:
        weight = weight.bfloat16().float()
    matrix = PackedMatrix(load_library(), weight, bias)
    rows = torch.randn(num_rows, num_in)
    product = matrix.multiply(rows)
    exact = rows.double() @ weight.double().t() + (0.0 if bias is None else bias.double())
    assert bool(((product - exact).abs() <= 1e-5 * (1.0 + num_in**0.5)).all())
    row = seed % num_rows
    assert torch.equal(matrix.multiply(rows[row : row + 1])[0], product[row])


@torch.inference_mode()
def test_exact_weights_take_half_the_memory() -> None:
    weight = torch.randn(64, 50)
    wide, narrow = (
        PackedMatrix(load_library(), weight),
        PackedMatrix(load_library(), weight.bfloat16().float()),
    )
    assert narrow._panels.numel() * 2 == wide._panels.numel()


# --- whole steps ---


@pytest.mark.parametrize("block_size", [4, 16, 48])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3-mixed"])
def test_logprobs_are_those_of_torchs_path(family, block_size, make_engine) -> None:
    compiled = make_engine(family, block_size=block_size, max_num_batched_tokens=16)
    plain = make_engine(family, block_size=block_size, fuse_layers=False)
    assert is_compiled(compiled) and not is_compiled(plain)
    assert compiled.batch_invariant and plain.batch_invariant
    for ours, theirs in zip(logprobs(compiled, PROMPTS), logprobs(plain, PROMPTS), strict=True):
        assert [token for token, *_ in ours] == [token for token, *_ in theirs]
        assert [value for _, value, _ in ours] == pytest.approx([value for _, value, _ in theirs], abs=1e-4)


def test_bits_do_not_depend_on_threads_company_or_block_size(make_engine) -> None:
    alone = make_engine("qwen3-mixed", max_num_seqs=1, enable_prefix_cache=False)
    expected = [logprobs(alone, [prompt])[0] for prompt in PROMPTS]
    torch.set_num_threads(2)
    try:
        for block_size in (4, 32):
            engine = make_engine("qwen3-mixed", block_size=block_size, max_num_batched_tokens=11)
            assert logprobs(engine, PROMPTS) == expected
    finally:
        torch.set_num_threads(1)


@pytest.mark.skipif("avx2" not in compiled._processor(), reason="no processor with two widths")
def test_bits_do_not_depend_on_the_width_of_vectors(make_engine, monkeypatch, tmp_path) -> None:
    """So an answer can go on to the bit on a machine with another processor."""
    expected = logprobs(make_engine("qwen3"), PROMPTS)
    compiled.build(find_compiler(), tmp_path / "narrow.so", "haswell")
    library = ctypes.CDLL(str(tmp_path / "narrow.so"))
    structs.declare(library)
    assert is_row_invariant(library)
    monkeypatch.setattr("longshore_server.native.startup.load_library", lambda: library)
    assert logprobs(make_engine("qwen3"), PROMPTS) == expected


@pytest.mark.parametrize(
    ("changes", "is_bf16"),
    [
        ({"attention_bias": True, "mlp_bias": True}, False),
        ({"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 34}, True),  # groups beyond a tile
        ({"num_key_value_heads": 4, "head_dim": 112, "tie_word_embeddings": True}, True),
        ({"hidden_size": 60, "intermediate_size": 80, "head_dim": 16}, False),
    ],
    ids=["biases", "wide-groups", "large-heads", "odd-sizes"],
)
def test_other_shapes_answer_like_transformers(changes, is_bf16, model_folder, tmp_path, greedy) -> None:
    raw = json.loads((model_folder("llama") / "config.json").read_bytes()) | changes
    (tmp_path / "config.json").write_text(json.dumps(raw))
    (tmp_path / "tokenizer.json").write_text("{}")
    torch.manual_seed(3)
    plain = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path)).eval()
    for name, parameter in plain.named_parameters():
        if "bias" in name:
            torch.nn.init.uniform_(parameter, -0.5, 0.5)
    for parameter in plain.parameters() if is_bf16 else ():
        parameter.data = parameter.data.bfloat16().float()
    plain.save_pretrained(tmp_path)
    engine = NativeEngine(EngineConfig(model=str(tmp_path), num_kv_blocks=64))
    assert is_compiled(engine)
    answers = engine.generate(PROMPTS, greedy(12, ignore_eos=True))
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = torch.tensor([prompt])
        expected = plain.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert answer == expected[0, len(prompt) :].tolist()


def test_nan_in_one_requests_kv_reaches_no_other(make_engine, greedy) -> None:
    """Blocks are not cleared between owners, so what stands behind a context must not be read."""
    prompts = [[10 + index] * (3 + 5 * index) for index in range(5)]
    params = greedy(8, ignore_eos=True, logit_bias={99: -100.0})
    clean = make_engine("mistral").generate(prompts, params)
    engine = make_engine("mistral", num_kv_blocks=40, max_model_len=120)
    engine._runner.decoder._embedding[99] = float("nan")
    for _ in range(3):
        engine.add_request("bad", [99] * 50, params)
        for index, prompt in enumerate(prompts):
            engine.add_request(f"good-{index}", prompt, params)
        answers: dict[str, list] = {}
        while engine.has_unfinished():
            for output in engine.step():
                answers.setdefault(output.request_id, []).append(output)
        assert answers.pop("bad")[-1].finish_reason == "error"
        assert [[o.token_id for o in answers[f"good-{index}"]] for index in range(5)] == clean


@pytest.mark.parametrize(
    "settings", [{"dtype": "bfloat16"}, {"quantization": "fp8"}, {"attention_sparsity": "window=16"}], ids=str
)
def test_other_settings_take_torchs_path(settings, make_engine, greedy) -> None:
    engine = make_engine("llama", **settings)
    assert not is_compiled(engine)
    assert len(engine.generate(PROMPTS, greedy(4, ignore_eos=True))) == 3


# --- the library ---


@pytest.fixture
def fresh(monkeypatch, tmp_path: Path) -> Path:
    """An empty cache folder's parent, and a loader that remembers nothing and compiles in a hurry."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    flags = tuple(flag.replace("-O2", "-O0") for flag in compiled.FLAGS)
    monkeypatch.setattr(compiled, "FLAGS", flags)
    load_library.cache_clear()
    yield tmp_path
    load_library.cache_clear()


def test_it_is_compiled_once_for_a_machine(fresh, monkeypatch) -> None:
    assert load_library() is not None
    (built,) = (fresh / "longshore" / "cpu").iterdir()
    assert cache_folder() == built.parent and not built.parent.stat().st_mode & 0o077
    load_library.cache_clear()
    monkeypatch.setattr(compiled, "build", lambda *_: pytest.fail("compiled again"))
    assert load_library() is not None


def test_what_others_could_have_written_is_not_loaded(fresh) -> None:
    folder = cache_folder()
    folder.chmod(0o777)
    assert cache_folder() is None
    assert load_library() is not None and not list(folder.iterdir())  # in a folder of its own instead


def test_without_a_compiler_torch_serves(fresh, monkeypatch, caplog, make_engine, greedy) -> None:
    monkeypatch.setenv("PATH", str(fresh))
    monkeypatch.delenv("CC", raising=False)
    with caplog.at_level(logging.WARNING):
        engine = make_engine("llama")
    assert not is_compiled(engine) and "no C compiler" in caplog.text
    assert len(engine.generate(PROMPTS, greedy(4, ignore_eos=True))) == 3


def test_a_compiler_that_fails_is_survived(fresh, monkeypatch, caplog) -> None:
    monkeypatch.setenv("CC", shutil.which("false"))
    with caplog.at_level(logging.WARNING):
        assert load_library() is None
    assert "cannot be had" in caplog.text


def test_kernels_whose_rows_depend_on_others_are_refused(fresh, monkeypatch, tmp_path, caplog) -> None:
    """A product that rounds otherwise for one row: the check that guards the promise must see it."""
    source = compiled.SOURCE.read_text()
    wrong = source.replace(
        "panel_words), matrix->num_in, in,", "panel_words), matrix->num_in - (rows == 1), in,"
    )
    assert wrong != source
    (tmp_path / "wrong.c").write_text(wrong)
    monkeypatch.setattr(compiled, "SOURCE", tmp_path / "wrong.c")
    assert load_library() is None
    assert "not row-invariant" in caplog.text
