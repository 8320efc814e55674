"""The recipe at toy size: labels, schedule, resume, the optimiser, and the curves' picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from shop.batches import IGNORED, Markers, answer_labels, gapped_positions
from shop.data import Curriculum, write_shards
from shop.models import build_model, shop_config
from shop.optim import Muon, lr_factor, orthogonalise
from shop.plot import draw, read_curves
from shop.tokenizer import FOLDER
from shop.train import Run, Trainer, compare

SYSTEM, USER, ASSISTANT, END = 2, 3, 4, 1
MARKERS = Markers(END, ASSISTANT, (SYSTEM, USER))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, 2, 16, 128, Curriculum(1, 1), FOLDER / "tokenizer.json", 1)
    return folder


def _run(data: Path, out: Path, **changes: object) -> Run:
    sizes = {"num_steps": 6, "num_shards": 2, "rows": 4, "eval_per_kind": 1, "checkpoint_every": 1}
    return Run(which="tiny", data=data, out=out, **(sizes | changes))  # type: ignore[arg-type]


def test_labels_cover_answers_and_their_end_only() -> None:
    row = torch.tensor([[SYSTEM, 50, END, USER, 51, END, ASSISTANT, 60, 61, END, USER, 52]])
    expected = [IGNORED] * 6 + [60, 61, END] + [IGNORED] * 3
    assert answer_labels(row, MARKERS).tolist() == [expected]


def test_positions_jump_once_after_the_sheet_and_stay_in_range() -> None:
    rows = torch.tensor([[SYSTEM, 50, 50, END, USER, *[51] * 27]]).repeat(64, 1)
    positions = gapped_positions(rows, USER, 100, torch.Generator().manual_seed(0))
    jumps = (positions.diff(dim=1) != 1).sum(dim=1)
    assert jumps.max() == 1 and 0 < jumps.sum() < 64
    assert (positions[:, :5] == torch.arange(5)).all() and positions.max() < 100


def test_schedule_warms_up_holds_and_decays() -> None:
    factors = [lr_factor(step, step / 100, 10, 0.4) for step in range(100)]
    assert factors[0] == 0.1 and factors[9] == factors[50] == 1.0 and factors[99] == pytest.approx(0.025)


def test_orthogonalised_matrices_have_near_unit_singular_values() -> None:
    values = torch.linalg.svdvals(orthogonalise(torch.randn(2, 24, 48)).float())
    assert values.min() > 0.3 and values.max() < 1.6


def test_muon_lowers_a_loss() -> None:
    weight = torch.nn.Parameter(torch.randn(8, 8))
    optimiser, first = Muon([weight], lr=0.05), float(weight.detach().square().sum())
    for _ in range(40):
        weight.grad = 2 * weight.detach()
        optimiser.step()
    assert float(weight.detach().square().sum()) < first / 2


def test_first_layer_starts_by_looking_back() -> None:
    model = build_model("student", 0)
    model.set_attn_implementation("eager")
    ids = torch.randint(20, 1000, (1, 40), generator=torch.Generator().manual_seed(0))
    weights = model(ids, output_attentions=True).attentions[0][0]
    for head, distance in enumerate((1, 2, 3)):
        assert weights[head, 10:].diagonal(10 - distance).mean() > 0.5


def test_a_resumed_run_ends_with_the_same_weights(data: Path, tmp_path: Path) -> None:
    whole = Trainer(_run(data, tmp_path / "whole"), "cpu")
    whole.train()
    cut = Trainer(_run(data, tmp_path / "cut"), "cpu")
    for _ in range(3):
        cut.train_step()
    cut.checkpoint()
    resumed = Trainer(_run(data, tmp_path / "cut"), "cpu")
    resumed.train()
    assert resumed.step == 6
    for name, tensor in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], tensor, msg=name)


def test_compare_trains_three_students_and_their_curves_can_be_drawn(data: Path, tmp_path: Path) -> None:
    Trainer(_run(data, tmp_path / "teacher"), "cpu").train()
    compare(_run(data, tmp_path / "c", teacher=tmp_path / "teacher" / "model"), [0], "cpu")
    lines = [path.read_text(encoding="utf-8") for path in sorted((tmp_path / "c").glob("*/curve.jsonl"))]
    (tmp_path / "all.jsonl").write_text("".join(lines), encoding="utf-8")
    assert {json.loads(line)["run"] for line in "".join(lines).splitlines()} == {
        "distilled-0", "scratch-steps-0", "scratch-time-0",
    }  # fmt: skip
    assert draw(read_curves(tmp_path / "all.jsonl")).count("<polyline") == 6


def test_unknown_model_names_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown Shop model"):
        shop_config("giant")
