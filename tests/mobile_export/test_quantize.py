"""Number formats: what rounding costs, what the graphs compute, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longshore.bundle import load_bundle
from longshore.errors import ExportError, ParityError
from longshore_export import variant
from longshore_export.bundle import export_student
from longshore_export.checkpoint import Checkpoint, load_checkpoint
from longshore_export.graph import build_graph, round_plainly
from longshore_export.quantize import BlockFormat, round_blocks, round_rows
from longshore_export.quantize_emulate import emulate
from longshore_export.quantize_recipe import RECIPES
from longshore_export.verify import check_rounded_parity
from tiny_models import config_of, write_model

QUANTIZED = ("int8", "int4-b256", "int4-b64-p8", "mixed-b64")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    folder = tmp_path_factory.mktemp("models")
    kinds = ("llama-tied", "llama-biased", "qwen3")
    return {kind: load_checkpoint(write_model(folder / kind, config_of(kind), seed=1)) for kind in kinds}


@given(st.integers(0, 1000), st.sampled_from([4, 8]), st.sampled_from([32, 64, 128]), st.integers(1, 200))
@settings(deadline=None, max_examples=40)
def test_no_weight_moves_more_than_its_step(seed: int, bits: int, block_size: int, num_inputs: int) -> None:
    matrix = np.random.default_rng(seed).standard_normal((3, num_inputs)).astype(np.float32)
    rounded = round_blocks(matrix, BlockFormat(bits, block_size))
    moved = np.abs(rounded.dequantized() - matrix)
    steps = np.abs(rounded.scales).repeat(block_size, axis=1)[:, :num_inputs]
    assert rounded.codes.max() < 1 << bits
    inside = np.abs(matrix) <= steps * ((1 << (bits - 1)) - 1)
    assert (moved <= steps * 0.5001)[inside].all()
    rms = np.sqrt((moved**2).mean() / (matrix**2).mean())
    assert rms < (0.2 if bits == 4 else 0.012)


def test_rows_stay_in_seven_bits_and_zeros_stay_zero() -> None:
    matrix = np.random.default_rng(1).standard_normal((5, 70)).astype(np.float32)
    matrix[2] = 0
    rounded = round_rows(matrix)
    assert np.abs(rounded.codes).max() == 63
    assert (rounded.dequantized()[2] == 0).all()
    assert (round_blocks(matrix, BlockFormat(4, 32)).dequantized()[2] == 0).all()


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("kind", ["llama-tied", "llama-biased", "qwen3"])
def test_the_graph_computes_what_its_emulation_does(
    models: dict[str, Checkpoint], tmp_path: Path, kind: str, name: str
) -> None:
    built = variant.build_variant(models[kind], name, tmp_path / "model.onnx")
    assert built.precision == RECIPES[name].precision
    assert built.parity.num_prompts == 5


@pytest.mark.parametrize("name", QUANTIZED)
def test_wrong_scales_fail_the_check(models: dict[str, Checkpoint], tmp_path: Path, name: str) -> None:
    checkpoint, recipe = models["llama-tied"], RECIPES[name]
    model = build_graph(
        checkpoint.shape, checkpoint.weights, checkpoint.cos, checkpoint.sin, recipe, round_plainly
    )
    scales = next(item for item in model.graph.initializer if item.name == "layer1.down.scales")
    values = onnx.numpy_helper.to_array(scales)
    scales.CopyFrom(onnx.numpy_helper.from_array(np.roll(values, 1, axis=0), scales.name))
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ParityError, match="emulation"):
        check_rounded_parity(
            tmp_path / "model.onnx", checkpoint, emulate(checkpoint.model, recipe, round_plainly)
        )


def test_a_variant_becomes_a_bundle(models: dict[str, Checkpoint], tmp_path: Path) -> None:
    export_student(models["qwen3"].folder, tmp_path / "bundle", variant="int8")
    written = load_bundle(tmp_path / "bundle").variants[0]
    assert (written.name, written.precision) == ("int8", "int8")
    assert "com.microsoft:DynamicQuantizeMatMul" in written.required_operators


def test_a_graph_for_prompts_brings_no_weights_of_its_own(
    models: dict[str, Checkpoint], tmp_path: Path
) -> None:
    exported = export_student(models["llama-biased"].folder, tmp_path / "bundle", variant="int4-b32-p8")
    written = exported.manifest.variants[0]
    assert written.prefill_file == "model.prefill.onnx"
    sizes = {file.path: file.size_bytes for file in exported.manifest.files}
    plain = export_student(models["llama-biased"].folder, tmp_path / "plain", variant="int4-b32")
    assert (tmp_path / "plain/model.onnx").read_bytes() == (tmp_path / "bundle/model.onnx").read_bytes()
    assert plain.manifest.variants[0].prefill_file is None
    session = onnx.load(tmp_path / "bundle/model.prefill.onnx", load_external_data=False)
    own = [item for item in session.graph.initializer if not item.external_data]
    assert max(len(item.raw_data) for item in own) <= 2048
    assert sizes["model.prefill.onnx"] < 60_000


def test_an_unknown_variant_is_named(models: dict[str, Checkpoint], tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="int3"):
        export_student(models["qwen3"].folder, tmp_path / "bundle", variant="int3")
