"""Whole distillations at toy size: the command and its files, resumption, processes, and what it refuses."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from longshore.cli import main
from longshore.errors import ConfigError, UnsupportedModelError
from longshore_export.distill import hidden_states
from longshore_export.distill.examples import Ahead, Examples
from longshore_export.distill.on_policy import generalized_jsd, write_rows
from longshore_export.distill.pair import drop_layers
from longshore_export.distill.relations import RelationLoss
from longshore_export.distill.settings import DistillSettings
from longshore_export.distill.trainer import Trainer
from longshore_export.distill.vocabulary import vocabulary_map
from shop.models import MODELS, build_model, random_model
from shop.tokenizer import FOLDER


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model(tmp_path_factory.mktemp("teacher"), "tiny", seed=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    lines: list[dict[str, Any]] = [
        {"text": "The lamp is red. The cup is blue."},
        {"prompt": "What colour is the lamp?", "answer": "The lamp is red."},
        {
            "messages": [
                {"role": "user", "content": "And the cup?"},
                {"role": "assistant", "content": "Blue."},
            ]
        },
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines * 4))
    return path


@pytest.fixture
def student(teacher: Path, tmp_path: Path) -> Path:
    """A configuration of half the teacher's depth and other widths."""
    values = json.loads((teacher / "config.json").read_text())
    values |= {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    path = tmp_path / "student" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(values | {"num_key_value_heads": 1}))
    return path


def run_of(teacher: Path, student: Path, data: Path, out: Path, **fields: Any) -> DistillSettings:
    values = {"num_steps": 6, "num_rows": 2, "max_tokens": 32, "warmup_steps": 1, "log_every": 1}
    return DistillSettings(teacher=teacher, student=student, data=data, out=out, **(values | fields))


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder).state_dict())


def test_the_command_writes_a_student_that_knows_its_teacher(
    student: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, trained = tmp_path / "out", MODELS / "shop-teacher"
    arguments = ["--teacher", str(trained), "--student", str(student), "--data", str(data), "--out", str(out)]
    more = [
        "num_steps=30",
        "num_rows=2",
        "learning_rate=0.01",
        "warmup_steps=2",
        "attention_weight=1",
        "hidden_until=1",
        "log_every=1",
    ]
    flags = [word for item in more for word in ("--set", item)]
    assert main(["export", "distill", *arguments, "--cpu", *flags]) == 0
    assert str(out / "model") in capsys.readouterr().out
    points = [json.loads(line) for line in (out / "curve.jsonl").read_text().splitlines()]
    assert [point["step"] for point in points] == list(range(1, 31))
    assert set(points[0]["loss"]) == {"hard", "soft", "hidden", "attention", "total"}
    for name in ("hard", "soft", "hidden", "attention"):
        assert points[-1]["loss"][name] < points[0]["loss"][name], name
    assert (out / "curve.svg").read_text().startswith("<?xml")
    assert "The lamp" in AutoTokenizer.from_pretrained(out / "model").decode(
        AutoModelForCausalLM.from_pretrained(out / "model").generate(
            torch.tensor([AutoTokenizer.from_pretrained(out / "model").encode("The lamp")]), max_new_tokens=2
        )[0]
    )


@pytest.mark.parametrize("on_policy_from", [1.0, 0.0])
def test_a_resumed_run_is_the_undisturbed_one(
    teacher: Path, student: Path, data: Path, tmp_path: Path, on_policy_from: float
) -> None:
    whole = run_of(
        teacher, student, data, tmp_path / "whole", on_policy_from=on_policy_from, on_policy_tokens=4
    )
    Trainer(whole, cpu=True).train()
    cut = replace(whole, out=tmp_path / "cut", checkpoint_every=3)

    class Cut(Exception):
        pass

    def stop(step: int, _: dict[str, float]) -> None:
        if step == 5:  # after the checkpoint of step 3, so two steps are done again
            raise Cut

    with pytest.raises(Cut):
        Trainer(cut, cpu=True).train(stop)
    Trainer(cut, cpu=True).train()
    ours, theirs = weights_of(cut.out / "model"), weights_of(whole.out / "model")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert (cut.out / "curve.jsonl").read_text() == (whole.out / "curve.jsonl").read_text()
    kinds = {
        name
        for line in (cut.out / "curve.jsonl").read_text().splitlines()
        for name in json.loads(line)["loss"]
    }
    assert ("on_policy" in kinds) == (on_policy_from == 0.0)


def test_a_checkpoint_of_other_settings_is_refused(
    teacher: Path, student: Path, data: Path, tmp_path: Path
) -> None:
    settings = run_of(teacher, student, data, tmp_path / "out", num_steps=1)
    Trainer(settings, cpu=True).train()
    with pytest.raises(ConfigError, match="other settings"):
        Trainer(replace(settings, seed=5), cpu=True).train()


@pytest.mark.slow
def test_two_processes_train_one_student(teacher: Path, student: Path, data: Path, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1",
        "--nproc-per-node", "2", "-m", "longshore.cli", "export", "distill", "--cpu",
        "--teacher", str(teacher), "--student", str(student), "--data", str(data),
        "--out", str(tmp_path / "out"), "--set", "num_steps=4", "--set", "num_rows=2",
        "--set", "hidden_until=0.5", "--set", "warmup_steps=1",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, start_new_session=True, **pipes) as launched:
        try:
            printed, errors = launched.communicate(timeout=90)
        finally:
            with contextlib.suppress(ProcessLookupError):  # its ranks too, however it ended
                os.killpg(launched.pid, signal.SIGKILL)
    assert launched.returncode == 0, errors[-3000:]
    assert printed.count("the student is in") == 1
    alone = run_of(
        teacher, student, data, tmp_path / "alone", num_steps=4, num_rows=4, hidden_until=0.5, max_tokens=512
    )
    Trainer(alone, cpu=True).train()
    # the same rows a step; only the mean over tokens is taken per process
    for name, tensor in weights_of(alone.out / "model").items():
        torch.testing.assert_close(weights_of(tmp_path / "out" / "model")[name], tensor, atol=2e-2, rtol=0)


def test_layer_drop_takes_the_teachers_layers(teacher: Path) -> None:
    theirs = build_model("tiny", seed=1)
    config = LlamaConfig(**(theirs.config.to_dict() | {"num_hidden_layers": 1}))
    student = LlamaForCausalLM(config)
    drop_layers(student, theirs)
    assert torch.equal(student.model.embed_tokens.weight, theirs.model.embed_tokens.weight)
    assert torch.equal(student.model.layers[0].mlp.up_proj.weight, theirs.model.layers[1].mlp.up_proj.weight)
    wide = LlamaForCausalLM(LlamaConfig(**(config.to_dict() | {"intermediate_size": 96})))
    with pytest.raises(ConfigError, match="intermediate_size"):
        drop_layers(wide, theirs)


def test_relations_are_equal_for_equal_models_and_for_any_sizes() -> None:
    one, other = build_model("tiny", seed=0), build_model("student", seed=1)
    ids = torch.arange(12)[None]
    states, others = hidden_states(one, ids), hidden_states(other, ids)
    same, between = RelationLoss(one.config, one.config), RelationLoss(other.config, one.config)
    assert abs(float(same(one, states, one, states).detach())) < 1e-6
    loss = between(other, others, one, states)
    assert torch.isfinite(loss) and float(loss.detach()) > 1e-4
    loss.backward()
    assert torch.isfinite(other.model.layers[-1].self_attn.v_proj.weight.grad).all()


@given(st.floats(0.05, 0.95), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_jsd_is_nothing_for_equals_and_bounded(beta: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ours, theirs = torch.randn(2, 3, 9, generator=generator) * 5
    assert abs(float(generalized_jsd(ours, ours, beta))) < 1e-5
    loss = float(generalized_jsd(ours, theirs, beta))
    p, q = theirs.double().softmax(-1), ours.double().softmax(-1)
    m = beta * p + (1 - beta) * q
    expected = (beta * p * (p / m).log() + (1 - beta) * q * (q / m).log()).sum(-1).mean()
    assert loss == pytest.approx(float(expected), abs=1e-4)
    assert 0 < loss < 0.7  # at most ln 2


def test_written_rows_are_graded_from_the_prompt_to_the_end() -> None:
    model = build_model("tiny", seed=3)
    rows = write_rows(model, [[5, 6, 7], [8]], 12, pad_id=0, end_id=1, seed=4)
    again = write_rows(model, [[5, 6, 7], [8]], 12, pad_id=0, end_id=1, seed=4)
    assert torch.equal(rows.input_ids, again.input_ids)
    assert rows.input_ids[1, :3].tolist() == [0, 0, 8] and rows.attention_mask[1, :3].tolist() == [0, 0, 1]
    for ids, mask, labels in zip(rows.input_ids, rows.attention_mask, rows.labels, strict=True):
        graded = labels.ge(0).nonzero().squeeze(-1)
        assert graded[0] == 2 and torch.equal(labels[graded], ids[graded + 1])
        written = ids[3:].tolist()
        length = written.index(1) + 1 if 1 in written else len(written)
        assert len(graded) == length == int(mask[3:].sum())


def test_a_part_of_the_vocabulary_is_mapped_and_another_refused() -> None:
    theirs = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    assert vocabulary_map(theirs, theirs, 1024) is None
    raw = json.loads(theirs.to_str())
    raw["model"]["merges"] = raw["model"]["merges"][:100]
    kept = {token for token in raw["model"]["vocab"] if len(token) == 1 or token.startswith("<|")}
    kept |= {
        "".join(merge) if isinstance(merge, list) else merge.replace(" ", "")
        for merge in raw["model"]["merges"]
    }
    order = sorted(kept)
    raw["model"]["vocab"] = {token: index for index, token in enumerate(order)}
    for token in raw["added_tokens"]:
        token["id"] = order.index(token["content"])
    raw["post_processor"] = None
    ours = Tokenizer.from_str(json.dumps(raw))
    mapped = vocabulary_map(ours, theirs, len(order) + 2)
    assert mapped is not None
    ids = ours.encode("The lamp costs $7.", add_special_tokens=False).ids
    assert theirs.decode(mapped[ids].tolist()) == "The lamp costs $7."
    with pytest.raises(ConfigError, match="lacks"):
        vocabulary_map(theirs, ours, 1024)


def test_every_line_comes_once_a_pass_on_one_of_the_processes(data: Path) -> None:
    examples = Examples(data, AutoTokenizer.from_pretrained(FOLDER), 32)
    seen: list[int] = []
    examples._place = lambda position, seed, place=examples._place: (
        seen.append(place(position, seed)) or seen[-1]
    )  # type: ignore[method-assign]
    for step in range(3):
        for rank in range(2):
            examples.batch(step, rank, 2, 2, seed=9)
    assert sorted(seen) == list(range(12))


def test_the_loss_is_on_answers_alone(data: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    example = Examples(data, tokenizer, 64)[1]
    learnt = example.token_ids[example.num_prompt_tokens :]
    assert tokenizer.decode(learnt) == "The lamp is red." + tokenizer.eos_token


@given(
    st.lists(st.sampled_from(["The lamp is red.", "", "7", " <|end|> \x02"]), min_size=1, max_size=5),
    st.integers(24, 90),
)
@settings(max_examples=30, deadline=None)
def test_every_answer_of_a_chat_is_learnt(tmp_path_factory: Any, answers: list[str], max_tokens: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    chat = [
        {"role": role, "content": text}
        for number, answer in enumerate(answers)
        for role, text in (("user", f"Question {number}?"), ("assistant", answer))
    ]
    path = tmp_path_factory.mktemp("chat") / "chat.jsonl"
    path.write_text(json.dumps({"messages": chat}))
    batch = Examples(path, tokenizer, max_tokens).batch(0, 0, 1, 1, seed=0)
    ids, labels = batch.input_ids[0], batch.labels[0]
    whole = tokenizer.encode(tokenizer.apply_chat_template(chat, tokenize=False))
    assert ids.tolist() == whole[:max_tokens]
    learnt = labels.ge(0)
    assert torch.equal(labels[learnt], ids[1:][learnt[:-1]])
    told = tokenizer.decode(labels[learnt].tolist())
    assert "".join(answer + tokenizer.eos_token for answer in answers).startswith(told) and told
    assert len(ids) < len(whole) or told.count(tokenizer.eos_token) == len(answers) + sum(
        answer.count(tokenizer.eos_token) for answer in answers
    )


def test_a_template_that_leaves_earlier_answers_out_teaches_the_last(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    tokenizer.chat_template = "{{ messages[-1]['content'] }}<|assistant|>"
    chat = [{"role": role, "content": role + "!"} for role in ("user", "assistant", "user", "assistant")]
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": chat}))
    example = Examples(path, tokenizer, 64)[0]
    assert tokenizer.decode(list(example.token_ids)) == "user!<|assistant|>assistant!<|end|>"
    assert len(example.learnt) == 1


def test_batches_made_ahead_are_the_same_and_raise_where_they_are_wanted(data: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    examples = Examples(data, tokenizer, 32)
    ahead = Ahead(examples, 0, 1, 2, 9)
    for step in (0, 1, 2, 7, 8):  # a resumed run begins anywhere
        assert torch.equal(ahead.batch(step).input_ids, examples.batch(step, 0, 1, 2, 9).input_ids)
    ahead.close()
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps({"text": "fine"}) + "\n{\n")
    bad = Ahead(Examples(path, tokenizer, 32), 0, 1, 1, 0)
    with pytest.raises(ConfigError, match="line 2"):
        for step in range(2):
            bad.batch(step)
    bad.close()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 1"),
        ('{"prompt": "a"}', "'answer' is missing"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "assistant"),
        ('{"prompt": "%s", "answer": "b"}' % ("word " * 60), "within 32 tokens"),
        ("", "empty"),
    ],
)
def test_bad_training_text_is_one_line(tmp_path: Path, line: str, words: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(line)
    with pytest.raises(ConfigError, match=words) as caught:
        _ = Examples(path, AutoTokenizer.from_pretrained(FOLDER), 32)[0]
    assert "\n" not in caught.value.message


def test_bad_settings_and_folders_are_one_line(
    teacher: Path, student: Path, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="temperature"):
        run_of(teacher, student, data, tmp_path, temperature=0.0)
    with pytest.raises(ConfigError, match="weight 0"):
        run_of(teacher, student, data, tmp_path, hard_weight=0, soft_weight=0, hidden_weight=0)
    for broken in (
        run_of(tmp_path / "none", student, data, tmp_path / "o"),
        run_of(teacher, tmp_path / "none.json", data, tmp_path / "o"),
        run_of(teacher, student, tmp_path / "none.jsonl", tmp_path / "o"),
        run_of(teacher, student, data, tmp_path / "o", start="layer-drop"),
    ):
        with pytest.raises(ConfigError) as caught:
            Trainer(broken, cpu=True)
        assert "\n" not in caught.value.message
    shutil.copy(FOLDER / "tokenizer.json", student.parent)
    student.write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(UnsupportedModelError, match="gpt2"):
        Trainer(run_of(teacher, student, data, tmp_path / "o"), cpu=True)


def test_unknown_settings_of_the_command_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--teacher", "a", "--student", "b", "--data", "c", "--out", "d"]
    assert main(["export", "distill", *arguments, "--set", "speed=9"]) != 0
    assert "speed=9" in capsys.readouterr().err
