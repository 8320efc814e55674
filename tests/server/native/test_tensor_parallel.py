"""Several ranks answer as one does: logits, tokens, prefix cache, preemption, aborts, bad settings."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from core_processes import tiny_model_folder
from longshore_server.native import EngineConfig, NativeEngine, SamplingParams
from longshore_server.native.errors import ConfigError, ModelLoadError, UnsupportedModelError
from longshore_server.native.model.load import load_model
from longshore_server.native.model.tensor_parallel import TensorParallelPlan
from longshore_server.native.ranks.start import build_on_ranks
from longshore_server.native.scheduler import Chunk
from longshore_server.native.sequence import Sequence
from rank_threads import use_rank_threads

FAMILIES = ("llama", "qwen2", "qwen3")
SPREADS: dict[str, dict[str, Any]] = {
    "two ranks": {"tensor_parallel_size": 2},
    "four ranks": {"tensor_parallel_size": 4},  # of two KV heads each stands on two
    "attention and feed-forward": {"placement": "attention_feed_forward"},
}
PROMPT = [random.Random(3).randrange(3, 300) for _ in range(37)]
TOLERANCE = 2e-4


@pytest.fixture(autouse=True)
def _ranks_in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    use_rank_threads(monkeypatch)


@pytest.fixture
def spread_engine(make_engine: Callable[..., NativeEngine]) -> Iterator[Callable[..., NativeEngine]]:
    made: list[NativeEngine] = []

    def make(*arguments: Any, **settings: Any) -> NativeEngine:
        made.append(make_engine(*arguments, **settings))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


@torch.inference_mode()
def _logits(config: EngineConfig) -> torch.Tensor:
    """Logits [1, vocab] after a prompt that is computed in one pass, of transformers' class on one rank."""
    if config.may_be_compiled:
        config = dataclasses.replace(config, fuse_layers=False)
    built, group = build_on_ranks(config)
    sequence = Sequence("r", PROMPT, SamplingParams(max_tokens=1), max_model_len=256)
    sequence.block_table = list(range(10))
    chunks = [Chunk(sequence, len(PROMPT), True)]
    if group is not None:
        group.step(chunks)
    logits = built.runner._forward(chunks)
    assert logits is not None
    if group is not None:
        group.check_in_step()
        group.close()
    return logits


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_greedy_tokens_equal_those_of_one_rank(
    family: str, model_folder: Any, make_engine: Any, spread_engine: Any, greedy: Any
) -> None:
    settings: dict[str, Any] = {"model": str(model_folder(family)), "num_kv_blocks": 64, "block_size": 4}
    whole = _logits(EngineConfig(**settings))
    prompts = [PROMPT, PROMPT[:5], PROMPT[9:30]]
    answers = make_engine(family).generate(prompts, greedy())
    for name, spread in SPREADS.items():
        difference = (_logits(EngineConfig(**settings, **spread)) - whole).abs().max().item()
        assert difference < TOLERANCE, (name, difference)
    for spread in (SPREADS["two ranks"], SPREADS["attention and feed-forward"]):
        engine = spread_engine(family, **spread)
        assert engine.generate(prompts, greedy()) == answers
        engine.check_integrity()


def test_ranks_answer_the_same_in_every_batch(spread_engine: Any, greedy: Any, tmp_path: Any) -> None:
    """Sums of ranks are added in one order, so batch invariance holds across ranks too."""
    folder = tiny_model_folder(tmp_path / "tiny", intermediate_size=128)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    engine = spread_engine(model=str(folder), **SPREADS["four ranks"])
    assert engine.batch_invariant
    prompts = [PROMPT[i : i + 9 + i] for i in range(6)]
    params = greedy(12, num_logprobs=0)
    together = _logprobs(engine, prompts, params)
    assert [_logprobs(engine, [prompt], params)[0] for prompt in prompts] == together


def test_a_width_that_fills_no_vector_is_not_called_invariant(spread_engine: Any) -> None:
    """The tiny Llama's inner width of 96 leaves 24 to each of four ranks."""
    assert not spread_engine("llama", **SPREADS["four ranks"]).batch_invariant
    with pytest.raises(ConfigError, match="inner width of 24"):
        spread_engine("llama", batch_invariant=True, **SPREADS["four ranks"])


def _logprobs(engine: NativeEngine, prompts: list[list[int]], params: SamplingParams) -> list[list[Any]]:
    for index, prompt in enumerate(prompts):
        engine.add_request(str(index), prompt, params)
    found: list[list[Any]] = [[] for _ in prompts]
    while engine.has_unfinished():
        for output in engine.step():
            found[int(output.request_id)].append((output.token_id, output.logprob))
    return found


@pytest.mark.parametrize("spread", [SPREADS["two ranks"], SPREADS["attention and feed-forward"]])
def test_random_requests_with_aborts_and_too_few_blocks(
    spread: dict[str, Any], make_engine: Any, spread_engine: Any
) -> None:
    """Prefixes are shared, requests preempted and aborted; what finishes equals one rank's answer."""
    chance = random.Random(11)
    engine = spread_engine("llama", num_kv_blocks=32, max_num_batched_tokens=24, **spread)
    prefixes = [[chance.randrange(3, 300) for _ in range(24)] for _ in range(3)]
    jobs = {str(i): _random_job(chance, prefixes) for i in range(24)}
    waiting, answers, dropped = list(jobs), {name: [] for name in jobs}, set()
    while waiting or engine.has_unfinished():
        for _ in range(min(len(waiting), chance.randrange(3))):
            name = waiting.pop()
            engine.add_request(name, *jobs[name], priority=chance.randrange(3))
        if chance.random() < 0.15 and engine.abort(name := chance.choice(list(jobs))):
            dropped.add(name)
        for output in engine.step():
            assert output.error is None
            if output.token_id is not None:
                answers[output.request_id].append(output.token_id)
    stats = engine.stats()
    assert stats.preemptions and stats.prefix_cache_hits and dropped and stats.kv_usage == 0
    engine.check_integrity()
    single = make_engine("llama")
    kept = [name for name in jobs if name not in dropped]
    assert [answers[n] for n in kept] == [single.generate([jobs[n][0]], jobs[n][1])[0] for n in kept]


def _random_job(chance: random.Random, prefixes: list[list[int]]) -> tuple[list[int], SamplingParams]:
    tail = [chance.randrange(3, 300) for _ in range(chance.randrange(1, 20))]
    temperature = chance.choice([0.0, 0.8])
    params = SamplingParams(
        max_tokens=chance.randrange(1, 30),
        temperature=temperature,
        seed=chance.randrange(100),
        ignore_eos=True,
    )
    return chance.choice(prefixes) + tail, params


# --- each rank holds its share ---


def test_a_plan_cuts_each_weight_once(model_folder: Any) -> None:
    config = AutoConfig.from_pretrained(model_folder("llama"))
    model = load_model(EngineConfig(model=str(model_folder("llama")))).model
    for size in (2, 4):
        plans = [TensorParallelPlan(model, config, rank, size) for rank in range(size)]
        for name, whole in model.named_parameters():
            slices = [plan.slice_of(name, whole.shape) for plan in plans]
            if "norm" in name or "embed" in name:
                assert slices == [None] * size
            elif size == 4 and ("k_proj" in name or "v_proj" in name):
                assert [(part.start, part.stop) for part in slices] == [(0, 16)] * 2 + [(16, 32)] * 2
            else:
                dim = 1 if "o_proj" in name or "down_proj" in name else 0
                whole_again = torch.cat([part.of(whole) for part in slices], dim=dim)
                assert torch.equal(whole_again[: whole.shape[0]], whole), name


def test_a_vocabulary_that_does_not_divide_is_padded(tmp_path: Any, model_folder: Any) -> None:
    model = load_model(EngineConfig(model=str(model_folder("llama")))).model
    config = model.config
    parts = [
        TensorParallelPlan(model, config, rank, 2).slice_of("lm_head.weight", torch.Size((301, 64)))
        for rank in range(2)
    ]
    whole = torch.randn(301, 64)
    cut = [part.of(whole) for part in parts]
    assert [tuple(part.shape) for part in cut] == [(151, 64), (151, 64)]
    assert torch.equal(torch.cat(cut)[:301], whole) and not cut[1][-1].any()


# --- what cannot be had ---


def test_heads_that_do_not_divide_are_refused_before_a_rank_is_started(spread_engine: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"^tensor_parallel_size: 3 does not divide the model's 4 attention"
    ):
        spread_engine("llama", tensor_parallel_size=3)
    with pytest.raises(ConfigError, match="from 1 to 8"):
        spread_engine("llama", tensor_parallel_size=16)
    with pytest.raises(ConfigError, match="tensor_parallel_size must be 1"):
        spread_engine("llama", tensor_parallel_size=2, placement="attention_feed_forward")


@pytest.mark.skipif(torch.cuda.device_count() >= 2, reason="there are enough GPUs")
def test_too_few_gpus_are_refused(spread_engine: Any) -> None:
    with pytest.raises(ConfigError, match="2 ranks need as many GPUs, there are"):
        spread_engine("llama", tensor_parallel_size=2, device="cuda")


def test_a_plan_with_an_unknown_style_is_refused(model_folder: Any) -> None:
    model = load_model(EngineConfig(model=str(model_folder("llama")))).model
    model.config.base_model_tp_plan = {"layers.*.mlp.up_proj": "packed_colwise"}
    with pytest.raises(UnsupportedModelError, match="packed_colwise"):
        TensorParallelPlan(model, model.config, 0, 2)
    model.config.base_model_tp_plan = None
    with pytest.raises(UnsupportedModelError, match="no tensor-parallel plan"):
        TensorParallelPlan(model, model.config, 0, 2)


def test_a_folder_that_lacks_a_weight_is_told_by_whichever_rank_misses_it(
    spread_engine: Any, model_folder: Any, tmp_path: Any
) -> None:
    from safetensors.torch import load_file, save_file

    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((model_folder("llama") / name).read_bytes())
    weights = load_file(model_folder("llama") / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ModelLoadError, match=r"layers\.1\.mlp\.up_proj"):
        spread_engine(model=str(tmp_path), tensor_parallel_size=2)


# --- fused layers and FP8 ---


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_layers_on_ranks_give_the_logits_of_one(family: str, model_folder: Any) -> None:
    settings: dict[str, Any] = {"model": str(model_folder(family)), "num_kv_blocks": 64, "block_size": 4}
    whole = _logits(EngineConfig(**settings))
    for size in (2, 4):
        fused = _logits(EngineConfig(**settings, fuse_layers=True, tensor_parallel_size=size))
        assert (fused - whole).abs().max().item() < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_fp8_on_ranks_is_as_near_to_plain_weights_as_on_one(family: str, model_folder: Any) -> None:
    """Where rows are cut, each rank scales its own part; fused layers round as layers by themselves do."""
    settings: dict[str, Any] = {"model": str(model_folder(family)), "num_kv_blocks": 64, "block_size": 4}
    whole = _logits(EngineConfig(**settings))
    settings["quantization"] = "fp8"
    lost = (_logits(EngineConfig(**settings)) - whole).abs().mean().item()
    for size in (2, 4):
        fused, unfused = (
            _logits(EngineConfig(**settings, fuse_layers=fuse, tensor_parallel_size=size))
            for fuse in (True, False)
        )
        assert (fused - unfused).abs().max().item() < TOLERANCE
        assert 0 < (fused - whole).abs().mean().item() < 1.3 * lost


def test_fp8_with_attention_and_feed_forward_apart_is_that_of_one_rank(model_folder: Any) -> None:
    settings: dict[str, Any] = {"model": str(model_folder("llama")), "num_kv_blocks": 64, "block_size": 4}
    settings |= {"quantization": "fp8"}
    one = _logits(EngineConfig(**settings, fuse_layers=False))
    apart = _logits(EngineConfig(**settings, placement="attention_feed_forward"))
    assert (apart - one).abs().max().item() < TOLERANCE
    with pytest.raises(ConfigError, match="fuse_layers"):
        EngineConfig(**settings, fuse_layers=True, placement="attention_feed_forward")
