"""The quality gate: the smallest variant that loses little enough, and what calibration is worth."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from longshore.bundle import load_bundle
from longshore.device.session import DecoderSession
from longshore.errors import ConfigError, ExportError
from longshore_export import gate, quantize_recipe
from longshore_export.chat_table import read_chat_template
from longshore_export.checkpoint import Checkpoint, load_checkpoint
from longshore_export.cli import register
from longshore_export.gate import Candidate, greedy_answers, kv_geometry, pass_gate
from longshore_export.graph import round_plainly
from longshore_export.quantize import BlockFormat, round_blocks
from longshore_export.quantize_emulate import emulate
from longshore_export.quantize_gptq import GptqRounding, measure_moments, round_by_moments
from longshore_export.quantize_mixed import divergence, mixed_by_layer, piece_divergences, piece_sizes
from longshore_export.quantize_recipe import RECIPES
from longshore_export.task import load_task
from longshore_export.variant import build_variant
from tiny_models import config_of, write_model


def run(*words: str | Path) -> int:
    parser = argparse.ArgumentParser()
    register(parser.add_subparsers(required=True))
    args = parser.parse_args(["export", "student", *map(str, words)])
    code: int = args.run(args)
    return code


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return load_checkpoint(write_model(tmp_path_factory.mktemp("model"), config_of("llama"), seed=1))


@pytest.fixture
def task_file(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the model in fp32 says to a few prompts, as a task that it gets right."""
    monkeypatch.setattr(gate, "MAX_ANSWER_TOKENS", 12)
    monkeypatch.setattr(gate, "SPEED_BUDGET_S", 0.01)
    path = tmp_path / "task.jsonl"
    prompts = [{"messages": [{"role": "user", "content": f"item {number}?"}]} for number in range(6)]
    path.write_text("\n".join(json.dumps(prompt | {"expected": ""}) for prompt in prompts))
    tokenizer = Tokenizer.from_file(str(checkpoint.folder / "tokenizer.json"))
    task = load_task(path, tokenizer, read_chat_template(checkpoint.folder))
    with tempfile.TemporaryDirectory() as work:
        file = build_variant(checkpoint, "fp32", Path(work) / "model.onnx").file
        session = DecoderSession(file, kv_geometry(checkpoint), 1)
    answers = greedy_answers(session, tokenizer, task, checkpoint.eos_token_ids)
    lines = [
        json.dumps(prompt | {"expected": answer}) for prompt, answer in zip(prompts, answers, strict=True)
    ]
    path.write_text("\n".join(lines))
    return path


def test_the_smallest_that_passes_is_chosen(checkpoint: Checkpoint, task_file: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(checkpoint.folder / "tokenizer.json"))
    task = load_task(task_file, tokenizer, read_chat_template(checkpoint.folder))
    candidates = [Candidate(name, "rtn", round_plainly) for name in ("fp32", "int8", "int4-b32")]
    lax = pass_gate(checkpoint, tokenizer, task, candidates, 100.0, tmp_path)
    assert lax.rows[0].exact_match == 1.0
    assert lax.chosen.candidate.variant == "int4-b32"
    assert lax.chosen.points_lost > 0  # 4 bits do change a random model's answers
    strict = pass_gate(checkpoint, tokenizer, task, candidates, lax.chosen.points_lost - 0.1, tmp_path)
    assert strict.chosen.size_bytes > lax.chosen.size_bytes
    assert strict.chosen.points_lost < lax.chosen.points_lost
    assert "<-" in strict.table().splitlines()[1 + strict.rows.index(strict.chosen)]


def test_the_command_records_the_verdict(
    checkpoint: Checkpoint,
    task_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    few = {name: RECIPES[name] for name in ("fp32", "int8", "int4-b32", "int4-b256-p8")}  # all take long
    monkeypatch.setattr(quantize_recipe, "RECIPES", few)
    options = ["--gate", "100", "--task", task_file, "--calibrate", task_file]
    assert run("--model", checkpoint.folder, "--out", tmp_path / "out", *options) == 0
    manifest = load_bundle(tmp_path / "out")
    assert manifest.variants[0].precision == "int4"
    assert manifest.capabilities["gate_num_examples"] == 6
    assert manifest.capabilities["gate_max_points_lost"] == 100.0
    printed = capsys.readouterr().out
    assert f"{manifest.variants[0].name} {manifest.capabilities['rounding']}" in printed
    assert "layers-b64 gptq" in printed


def test_calibrated_rounding_is_nearer_on_what_it_saw(checkpoint: Checkpoint) -> None:
    rng = np.random.default_rng(3)
    prompts = [rng.integers(0, checkpoint.shape.vocab_size, 60).tolist() for _ in range(4)]
    moments = measure_moments(checkpoint.model, prompts)
    matrix = checkpoint.weights["model.layers.1.mlp.down_proj.weight"]
    form, seen = BlockFormat(4, 32), moments["layer1.down"]
    errors = [
        rounded.dequantized() - matrix
        for rounded in (round_blocks(matrix, form), round_by_moments(matrix, form, seen))
    ]
    plain, calibrated = (float(np.einsum("oi,ij,oj->", error, seen, error)) for error in errors)
    assert calibrated < 0.8 * plain
    assert GptqRounding({})("layer0.o", matrix, form).dequantized().shape == matrix.shape


def test_what_moves_answers_most_for_its_size_keeps_eight_bits(tmp_path: Path) -> None:
    model = load_checkpoint(write_model(tmp_path / "model", config_of("llama"), seed=1)).model
    with torch.no_grad():  # layer 1 matters little, whatever its rounding
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            model.get_submodule(f"model.layers.1.{name}").weight.mul_(1e-3)
    rng = np.random.default_rng(4)
    texts = [rng.integers(0, model.config.vocab_size, 24).tolist() for _ in range(3)]
    sizes, moved = piece_sizes(model), piece_divergences(model, texts, round_plainly)
    assert sum(sizes.values()) == sum(p.numel() for n, p in model.named_parameters() if "norm" not in n)
    assert moved["layer0"] > 3 * moved["layer1"] > 0
    recipe = mixed_by_layer(model, texts, round_plainly)
    assert {part.partition(".")[0] for part in recipe.exceptions} == {"layer0"}
    assert recipe.head is not None and recipe.head.bits == 4  # half of the weights, over the share
    plain = [model(torch.tensor([text])).logits[0].log_softmax(-1).detach() for text in texts]
    mixed, four = (
        divergence(plain, emulate(model, one, round_plainly), texts) for one in (recipe, RECIPES["int4-b64"])
    )
    assert mixed < four


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no examples"),
        ("not json", "line 1"),
        ('{"prompt": "a"}', "expected"),
        ('{"messages": [{"role": "wizard", "content": ""}], "expected": ""}', "wizard"),
        ('{"prompt": "a", "expected": "b", "pattern": "("}', "line 1"),
    ],
)
def test_a_bad_task_is_refused_by_line(checkpoint: Checkpoint, tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "task.jsonl").write_text(text)
    tokenizer = Tokenizer.from_file(str(checkpoint.folder / "tokenizer.json"))
    with pytest.raises(ExportError, match=words):
        load_task(tmp_path / "task.jsonl", tokenizer, read_chat_template(checkpoint.folder))


def test_a_gate_needs_a_task_that_says_something(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--task"):
        run("--model", checkpoint.folder, "--out", tmp_path / "out", "--gate", "1")
    (tmp_path / "task.jsonl").write_text('{"prompt": "a", "expected": "nothing says this"}')
    with pytest.raises(ExportError, match="fp32"):
        run(
            *("--model", checkpoint.folder, "--out", tmp_path / "out"),
            *("--gate", "1", "--task", tmp_path / "task.jsonl"),
        )
