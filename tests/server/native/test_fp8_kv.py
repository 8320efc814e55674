"""A KV cache in FP8: what is attended, its scales and their file, answers beside those of a plain cache."""

from __future__ import annotations

import json
import random

import pytest
import torch

from longshore_server.native import kv_scales_cli
from longshore_server.native.attention.fp8_reference import Fp8Context
from longshore_server.native.attention.kv_cache import (
    FP8_MAX,
    KVScales,
    LayerGeometry,
    PagedKVCache,
    from_fp8,
    to_fp8,
)
from longshore_server.native.attention.kv_scales import (
    FILE_NAME,
    MARGIN,
    load_scales,
    measure_scales,
    save_scales,
)
from longshore_server.native.attention.layout import BatchLayout, Span
from longshore_server.native.attention.reference import plan_passes
from longshore_server.native.config import EngineConfig
from longshore_server.native.errors import ConfigError, ModelLoadError
from longshore_server.native.model.load import load_model
from rank_threads import use_rank_threads

CPU = torch.device("cpu")
PROMPTS = [[random.Random(k).randrange(3, 300) for _ in range(9 + 20 * k)] for k in range(4)]


@pytest.mark.parametrize("window", [None, 7])
def test_attends_what_the_pages_hold_rounded(window) -> None:
    """Decodes and a later chunk of a prompt, against attention over the rounded keys and values."""
    torch.manual_seed(4)
    heads, kv_heads, dim, size = 4, 2, 16, 4
    cache = PagedKVCache([LayerGeometry(kv_heads, dim, dim)], 12, size, torch.float8_e4m3fn, CPU)
    cache.scales[0] = KVScales(torch.tensor([0.01, 0.003]), torch.tensor([0.02, 0.05]))
    key, value = torch.randn(40, kv_heads, dim), 3 * torch.randn(40, kv_heads, dim)
    tables = {0: [7, 2, 9], 1: [4, 0, 11, 5]}
    lens = {0: 9, 1: 15}
    first = {0: 0, 1: 20}  # where each sequence's keys begin in `key`
    done = {0: 8, 1: 9}  # written by an earlier step
    for which, count in done.items():
        layout = BatchLayout([], [Span(0, count, count, tables[which])], size)
        rows = slice(first[which], first[which] + count)
        context = Fp8Context(cache, layout, plan_passes)
        context.attend(0, torch.randn(count, heads, dim), key[rows], value[rows], 0.2, window)
    layout = BatchLayout([Span(0, 1, 9, tables[0])], [Span(1, 6, 15, tables[1])], size)
    rows = torch.tensor([8, *range(29, 35)])
    query = torch.randn(7, heads, dim)
    output = Fp8Context(cache, layout, plan_passes).attend(0, query, key[rows], value[rows], 0.2, window)
    scales = cache.scales[0]
    keys = from_fp8(to_fp8(key, scales.key), scales.key, torch.float32)
    values = from_fp8(to_fp8(value, scales.value), scales.value, torch.float32)
    assert (keys - key).abs().max() > 0.01
    for row, (which, position) in enumerate([(0, 8), *((1, 9 + i) for i in range(6))]):
        low = 0 if window is None else max(0, position - window + 1)
        seen = slice(first[which] + low, first[which] + position + 1)
        for head in range(heads):
            weights = (0.2 * keys[seen, head // 2] @ query[row, head]).softmax(0)
            torch.testing.assert_close(output[row, head], weights @ values[seen, head // 2])
    assert lens[1] == 15


def test_numbers_beyond_the_scale_are_cut_off_not_lost() -> None:
    scale = torch.tensor([0.5])
    rows = torch.tensor([[[1e9, -1e9, 0.0]]])
    assert from_fp8(to_fp8(rows, scale), scale, torch.float32).tolist() == [[[224.0, -224.0, 0.0]]]


@pytest.mark.parametrize("family", ["llama", "qwen3-mixed"])
def test_answers_stay_near_those_of_a_plain_cache(family, make_engine, greedy) -> None:
    """The likeliest first tokens after a chunked prompt, and clean books through preemption."""
    params = greedy(8, ignore_eos=True, num_logprobs=0)
    settings = {"max_num_batched_tokens": 16, "num_kv_blocks": 40, "max_model_len": 100}
    found = []
    for kind in ("auto", "fp8"):
        engine = make_engine(family, kv_cache_dtype=kind, fuse_layers=False, **settings)
        for index, prompt in enumerate(PROMPTS):
            engine.add_request(str(index), prompt, params)
        outputs = []
        while engine.has_unfinished():
            outputs += engine.step()
        engine.check_integrity()
        assert all(output.error is None for output in outputs)
        found.append({o.request_id: (o.token_id, o.logprob) for o in outputs if o.offset == 0})
    assert not engine.batch_invariant
    plain, rounded = found
    assert sum(plain[name][0] == rounded[name][0] for name in plain) >= 3
    same = [name for name in plain if plain[name][0] == rounded[name][0]]
    assert all(abs(plain[name][1] - rounded[name][1]) < 0.5 for name in same)


def test_scales_are_a_margin_over_what_the_prompts_showed(model_folder, make_engine, greedy) -> None:
    engine = make_engine("llama", fuse_layers=False)
    engine.generate(PROMPTS[3:], greedy(1))
    model = load_model(EngineConfig(model=str(model_folder("llama")))).model
    measured = measure_scales(model, CPU, PROMPTS[3:])
    for layer, scales in enumerate(measured):
        for pages, scale in (
            (engine._runner.cache.keys[layer], scales.key),
            (engine._runner.cache.values[layer], scales.value),
        ):
            amax = pages.abs().amax(dim=(0, 1, 3))
            torch.testing.assert_close(scale, MARGIN / FP8_MAX * amax, rtol=1e-4, atol=0)
    more = measure_scales(model, CPU, PROMPTS)
    assert all((a.key >= b.key).all() for a, b in zip(more, measured, strict=True))


def test_a_file_beside_the_model_is_what_counts_and_ranks_take_their_heads(
    model_folder, make_engine, greedy, tmp_path, monkeypatch
) -> None:
    for path in model_folder("llama").iterdir():
        (tmp_path / path.name).symlink_to(path)
    assert load_scales(tmp_path, [2] * 3, CPU) is None
    written = [KVScales(torch.tensor([k + 1.0, k + 2.0]), torch.tensor([0.25, 0.5])) for k in range(3)]
    assert save_scales(tmp_path, written).name == FILE_NAME
    engine = make_engine(model=str(tmp_path), kv_cache_dtype="fp8")
    for layer, scales in enumerate(written):
        assert torch.equal(engine._runner.cache.scales[layer].key, scales.key)
        assert torch.equal(engine._runner.cache.scales[layer].value, scales.value)
    halves = [load_scales(tmp_path, [1] * 3, CPU, rank=rank, num_ranks=2) for rank in range(2)]
    assert [half[1].key.tolist() for half in halves] == [[2.0], [3.0]]
    quarters = [load_scales(tmp_path, [1] * 3, CPU, rank=rank, num_ranks=4) for rank in range(4)]
    assert [quarter[0].value.tolist() for quarter in quarters] == [[0.25], [0.25], [0.5], [0.5]]
    use_rank_threads(monkeypatch)
    ranks = make_engine(model=str(tmp_path), kv_cache_dtype="fp8", tensor_parallel_size=2)
    assert ranks._runner.cache.scales[2].key.tolist() == [3.0]
    ranks.close()


@pytest.mark.parametrize(
    "content",
    [
        "", "[]", "{}", '{"format": 2, "layers": []}', '{"format": 1, "layers": [{}, {}, {}]}',
        json.dumps({"format": 1, "layers": [{"key": [1.0, 0.0], "value": [1.0, 1.0]}] * 3}),
        json.dumps({"format": 1, "layers": [{"key": [1.0], "value": [1.0, 1.0]}] * 3}),
        json.dumps({"format": 1, "layers": [{"key": [1.0, "x"], "value": [1.0, 1.0]}] * 3}),
        json.dumps({"format": 1, "layers": [{"key": [1.0, float("nan")], "value": [1.0, 1.0]}] * 3}),
    ],
)  # fmt: skip
def test_a_file_that_is_none_stops_the_start(content, tmp_path) -> None:
    (tmp_path / FILE_NAME).write_text(content)
    with pytest.raises(ModelLoadError, match=FILE_NAME):
        load_scales(tmp_path, [2] * 3, CPU)


def test_what_it_excludes_is_named() -> None:
    with pytest.raises(ConfigError, match="kv_cache_dtype"):
        EngineConfig(model="m", kv_cache_dtype="fp8", placement="attention_feed_forward")
    with pytest.raises(ConfigError, match="batch_invariant"):
        EngineConfig(model="m", kv_cache_dtype="fp8", batch_invariant=True)


def test_the_command_writes_what_an_engine_takes(model_folder, make_engine, tmp_path, capsys) -> None:
    for path in model_folder("llama").iterdir():
        (tmp_path / path.name).symlink_to(path)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f"{json.dumps(prompt)}\n" for prompt in PROMPTS))
    assert kv_scales_cli.main(["--model", str(tmp_path), "--prompts", str(prompts)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / FILE_NAME)
    expected = measure_scales(load_model(EngineConfig(model=str(tmp_path))).model, CPU, PROMPTS)
    engine = make_engine(model=str(tmp_path), kv_cache_dtype="fp8")
    torch.testing.assert_close(engine._runner.cache.scales[1].value, expected[1].value)
    for line in ("[]", "[300]", "[true]", "x", ""):
        prompts.write_text(line)
        assert kv_scales_cli.main(["--model", str(tmp_path), "--prompts", str(prompts)]) == 2
        assert "prompts: " in capsys.readouterr().err
