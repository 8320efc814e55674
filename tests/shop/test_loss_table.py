"""The table of distillation losses: runs of the command itself, the task's data, rows as measured."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

from shop.loss_table import VARIANTS, Job, Results, chat_line, choose_rate, do, table, write_data
from shop.models import random_model


def test_one_run_is_trained_by_the_command_and_scored(tmp_path: Path) -> None:
    write_data(tmp_path / "train.jsonl", num_lines=16, max_tokens=200, size_power=2.0, num_processes=1)
    job = Job(
        VARIANTS[1], seed=0, rate=1e-3, teacher=random_model(tmp_path / "teacher", "tiny"), work=tmp_path,
        num_steps=2, rows=1, max_tokens=200, per_kind=1, device="cpu",
    )  # fmt: skip
    random_model(tmp_path / "starts" / "student-0", "tiny", seed=1)
    row = do(job)
    assert "error" not in row, row
    assert [point["step"] for point in row["curve"]] == [2]
    assert (row["variant"], row["exact"]) == ("hard + soft", 0.0)
    results = Results(tmp_path / "out", {})
    results.add(row)
    assert row["hard_loss"] > 1 and json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    broken = do(Job(**{name: getattr(job, name) for name in Job.__slots__} | {"teacher": tmp_path}))
    assert "ConfigError" in broken["error"]


def test_chats_are_of_training_sheets_and_fit() -> None:
    chat = json.loads(chat_line(Random(3), 384, 0.0))["messages"]
    roles = [message["role"] for message in chat]
    assert roles[0] == "system" and set(roles[1::2]) == {"user"} and set(roles[2::2]) == {"assistant"}
    assert len(chat_line(Random(3), 900, 0.0)) > len(chat_line(Random(3), 384, 0.0))


def test_the_table_has_means_over_seeds_and_the_probe_the_rate() -> None:
    kinds = dict.fromkeys(("price", "colour", "stock", "cheaper", "reverse", "list"), 0.5)
    rows = [
        {"variant": "hard", "seed": seed, "exact": exact, "kinds": kinds, "train_s": 10.0}
        for seed, exact in ((1, 0.5), (0, 0.25))
    ]
    probes = [
        {"variant": "hard", "exact": exact, "probe": True, "learning_rate": rate, "hard_loss": loss}
        for exact, rate, loss in ((0.25, 1e-3, 0.9), (0.25, 3e-3, 0.5))
    ]
    assert "| hard | 25.0%, 50.0% | 37.5% | 50%" in table([*rows, *probes, {"variant": "hard", "error": "x"}])
    assert choose_rate(probes) == 3e-3
