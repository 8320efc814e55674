"""Tables of measured matrix products: what they hold, when they count, and what a damaged one says."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, Qwen2Config

from longshore_server.native import EngineConfig
from longshore_server.native.attention import interface
from longshore_server.native.errors import ModelLoadError
from longshore_server.native.gemm.cublaslt import CublasLt, CublasLtError
from longshore_server.native.gemm.multiply import GpuGemm, gemm_for, multiply_by_torch, multiply_invariant
from longshore_server.native.gemm.plans import (
    DTYPES,
    FILE_NAME,
    TUNED_FOLDER,
    Algorithm,
    Plan,
    Plans,
    Product,
    find_plans,
    packaged_file,
    read_plans,
)
from longshore_server.native.gemm_plans_cli import main
from longshore_server.native.model.build import planned_products
from longshore_server.native.model.fp8 import quantize_rows

CHIP, VERSION = "Chip 9", 130100
PRODUCT = Product("bfloat16", 64, 32)

numbers = st.integers(0, 600)
algorithms = st.builds(Algorithm, *[numbers] * len(Algorithm._fields))


@st.composite
def plan_lists(draw: st.DrawFn) -> list[Plan]:
    """In order, some of them with rows between that have no plan."""
    ends = sorted(draw(st.sets(st.integers(1, 9000), max_size=8)))
    plans, before = [], 0
    for last_row in ends:
        first_row = draw(st.integers(before + 1, last_row))
        plans.append(Plan(first_row, last_row, draw(algorithms)))
        before = last_row
    return plans


@given(plan_lists(), st.integers(1, 9500))
def test_a_plan_is_found_exactly_for_its_rows(plans, num_rows) -> None:
    table = Plans(CHIP, VERSION, {PRODUCT: plans})
    inside = [plan.algorithm for plan in plans if plan.first_row <= num_rows <= plan.last_row]
    assert table.find(PRODUCT, num_rows) == (inside[0] if inside else None)
    assert table.find(PRODUCT._replace(width=48), num_rows) is None


@given(st.dictionaries(st.builds(Product, st.sampled_from(DTYPES), numbers, numbers), plan_lists()))
def test_a_table_is_read_as_it_was_written(tmp_path_factory, products) -> None:
    path = tmp_path_factory.mktemp("plans") / "table.json"
    table = Plans(CHIP, VERSION, products)
    table.write(path)
    assert read_plans(path) == Plans(CHIP, VERSION, {product: p for product, p in products.items() if p})


def test_the_models_own_table_comes_first_and_others_do_not_count(tmp_path) -> None:
    def table(name: str, version: int) -> Plans:
        plans = Plans(name, version, {PRODUCT: [Plan(1, 8, Algorithm(*range(9)))]})
        plans.write(tmp_path / FILE_NAME)
        return plans

    assert find_plans(CHIP, VERSION, tmp_path) == []
    assert find_plans(CHIP, VERSION, tmp_path / "no such folder") == []
    assert [table(CHIP, VERSION)] == find_plans(CHIP, VERSION, tmp_path)
    table(CHIP, VERSION + 1)
    assert find_plans(CHIP, VERSION, tmp_path) == []
    table("Chip 8", VERSION)
    assert find_plans(CHIP, VERSION, tmp_path) == []


@pytest.mark.parametrize("path", sorted(TUNED_FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_tables_that_come_along_are_sound(path) -> None:
    table = read_plans(path)
    assert path == packaged_file(table.device_name)
    assert table.products and all(table.products.values())


ENTRY = {"dtype": "bfloat16", "num_outputs": 64, "width": 32, "rows": [1, 8], "algorithm": [66, *range(8)]}
HEAD = {"format": 1, "device_name": CHIP, "cublaslt_version": VERSION, "plans": [ENTRY]}


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "null",
        json.dumps(HEAD | {"format": 2}),
        json.dumps(HEAD | {"cublaslt_version": "13"}),
        json.dumps(HEAD | {"plans": {"a": 1}}),
        json.dumps(HEAD | {"plans": [ENTRY | {"dtype": "float32"}]}),
        json.dumps(HEAD | {"plans": [ENTRY, ENTRY]}),  # the same rows twice
        json.dumps(HEAD | {"plans": [ENTRY | {"rows": [8, 1]}]}),
        json.dumps(HEAD | {"plans": [ENTRY | {"rows": [0, 1]}]}),
        json.dumps(HEAD | {"plans": [ENTRY | {"algorithm": [66, 1]}]}),
        json.dumps(HEAD | {"plans": [ENTRY | {"algorithm": [66, *range(7), -1]}]}),
        json.dumps(HEAD | {"plans": [ENTRY | {"algorithm": [66, *range(7), True]}]}),
        json.dumps(HEAD | {"plans": [{name: ENTRY[name] for name in ENTRY if name != "width"}]}),
    ],
)
def test_a_damaged_table_is_named_in_one_line(tmp_path, content) -> None:
    path = tmp_path / FILE_NAME
    path.write_text(content)
    with pytest.raises(ModelLoadError, match="table") as caught:
        find_plans(CHIP, VERSION, tmp_path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_an_engine_gets_the_gemm_that_its_settings_ask_for() -> None:
    assert gemm_for(EngineConfig(model="m")) is multiply_by_torch
    assert gemm_for(EngineConfig(model="m", device="cuda", batch_invariant=True)) is multiply_invariant
    if not torch.cuda.is_available():
        assert gemm_for(EngineConfig(model="m", device="cuda")) is multiply_by_torch


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch brings the library along")
def test_a_library_that_is_not_there_is_told_with_an_error_of_its_own() -> None:
    with pytest.raises(CublasLtError, match="libcublasLt"):
        CublasLt(torch.device("cuda", 0))


def test_without_the_library_products_are_torchs() -> None:
    torch.manual_seed(0)
    rows, weight, bias = torch.randn(3, 32), torch.randn(64, 32), torch.randn(64)
    gemm = GpuGemm(None, [Plans(CHIP, VERSION, {PRODUCT: [Plan(1, 8, Algorithm(*range(9)))]})])
    torch.testing.assert_close(gemm(rows, weight, bias, torch.float32), rows @ weight.t() + bias)
    left, right = quantize_rows(rows), quantize_rows(weight)
    output = gemm(left.values, right.values, None, torch.float32)
    torch.testing.assert_close(output, left.values.float() @ right.values.float().t())


@pytest.fixture(autouse=True, scope="module")
def _attention_is_known() -> None:
    interface.register()


SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 96,
}  # fmt: skip


@pytest.mark.parametrize("quantization", ["none", "fp8"])
def test_products_are_found_in_a_models_shapes(quantization) -> None:
    config = EngineConfig(model="m", device="cuda", quantization=quantization)
    inner = "bfloat16" if quantization == "none" else "float8_e4m3fn"
    found = planned_products(LlamaConfig(**SIZES), torch.bfloat16, config)
    shapes = ((128, 64), (64, 64), (256, 64), (64, 128))
    assert {*found} >= {Product(inner, *shape) for shape in shapes}
    assert {each for each in found if each.dtype == inner and each.num_outputs != 96} == {
        Product(inner, *shape) for shape in shapes
    }


def test_a_product_with_a_bias_has_no_plan() -> None:
    config = EngineConfig(model="m", device="cuda")
    found = planned_products(Qwen2Config(**SIZES), torch.bfloat16, config)
    assert Product("bfloat16", 128, 64) not in found and Product("bfloat16", 64, 64) in found


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "model: give a model or a product"),
        (["--product", "bfloat16:64x32"], "out: must name a file"),
        (["--model", "llama-8b"], "out: must name a file"),
        (["--product", "int8:64x32"], "product: 'int8:64x32'"),
        (["--product", "bfloat16:64x33"], "product: "),
        (["--product", "bfloat16:64"], "product: "),
        (["--model", "no/such/folder"], "no/such/folder is not a folder"),
        (["--product", "bfloat16:64x32", "--device", "cpu", "--out", "t.json"], "device: cpu is no GPU"),
    ],
)
def test_wrong_arguments_are_told_in_one_line(arguments, words, capsys) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
