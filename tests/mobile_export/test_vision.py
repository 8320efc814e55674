"""The export of models that see: both graphs agree with transformers, and bundles say what they hold."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer

from longshore.bundle import load_bundle
from longshore.device.encoder import JobImage, PictureEncoder
from longshore.device.generate import GeneratedToken, Generator, Job
from longshore.device.sampling import SamplingSettings
from longshore.device.session import DecoderSession
from longshore.errors import ExportError, ParityError
from longshore.images import pixel_values
from longshore_export import gate
from longshore_export.bundle import Exported, export_student
from longshore_export.chat_table import read_chat_template
from longshore_export.checkpoint import Checkpoint, load_checkpoint
from longshore_export.gate import Candidate, greedy_answers, kv_geometry, pass_gate
from longshore_export.graph import build_graph, round_plainly
from longshore_export.quantize_gptq import measure_moments
from longshore_export.task import load_task
from longshore_export.verify import MAX_LOGIT_DIFFERENCE, check_parity
from longshore_export.vision.graph import build_encoder
from longshore_export.vision.task import embedded
from longshore_export.vision.variant import build_encoder_variant
from longshore_export.vision.verify import MAX_DIFFERENCE, check_encoder, torch_features
from shop.evaluate_pictures import heldout_photos
from shop.picture_models import VISION_MODEL, build_vision_model, save_vision_model
from shop.picture_questions import picture_prompt
from shop.pictures import draw_photo


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of random weights, so large that what a picture shows decides what is said of it."""
    model = build_vision_model(3, "tiny")
    with torch.no_grad():
        for name, weight in model.model.named_parameters():
            if weight.ndim == 2 and (".layers." in name or "connector" in name):
                weight *= 6
    return save_vision_model(model, tmp_path_factory.mktemp("model"), "tiny")


@pytest.fixture(scope="module")
def checkpoint(model_dir: Path) -> Checkpoint:
    return load_checkpoint(model_dir)


@pytest.fixture(scope="module")
def exported(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_student(model_dir, tmp_path_factory.mktemp("out") / "bundle")


@pytest.fixture(scope="module")
def encoder(exported: Exported) -> Any:
    return onnxruntime.InferenceSession(str(exported.path / "vision.onnx"))


def png(seed: int, width: int = 90, height: int = 120) -> bytes:
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 5, 3), np.uint8)
    Image.fromarray(pixels).resize((width, height)).save(out, "PNG")
    return out.getvalue()


# -- bundles -----------------------------------------------------------------------------------


def test_a_bundle_tells_how_pictures_enter_it(exported: Exported, model_dir: Path) -> None:
    manifest = load_bundle(exported.path)
    assert manifest == exported.manifest
    vision = manifest.vision
    assert vision is not None and vision.encoder_file == "vision.onnx"
    assert (vision.image_token_id, vision.unit_px, vision.hidden_size) == (1024, 16, 64)
    listed = json.loads((model_dir / "preprocessor_config.json").read_text())["buckets"]
    assert [[b.width_px, b.height_px, b.num_tokens] for b in manifest.vision_buckets] == listed
    assert manifest.capabilities["images"] is True and manifest.capabilities["encoder"] == "fp32"
    assert {"com.microsoft:MultiHeadAttention", "Conv"} <= set(manifest.variants[0].required_operators)


def test_parity_is_checked_at_eight_sizes_and_more(exported: Exported) -> None:
    assert exported.encoder_parity is not None
    sizes = exported.encoder_parity.sizes_px
    assert len(set(sizes)) >= 8 and sum(height != width for height, width in sizes) >= 4
    assert exported.encoder_parity.max_difference <= MAX_DIFFERENCE
    assert exported.parity.max_logit_difference <= MAX_LOGIT_DIFFERENCE


@pytest.mark.parametrize(("variant", "encoder"), [("int8", "fp32"), ("int4-b32-p8", "int8")])
def test_quantized_bundles_see_too(model_dir: Path, tmp_path: Path, variant: str, encoder: str) -> None:
    bundle = export_student(model_dir, tmp_path / "bundle", variant=variant, encoder=encoder)
    graphs = list(bundle.path.glob("model*.onnx"))
    assert len(graphs) == (2 if variant.endswith("-p8") else 1)
    for graph in graphs:
        names = {item.name for item in onnxruntime.InferenceSession(str(graph)).get_inputs()}
        assert "image_features" in names
    assert bundle.manifest.capabilities["encoder"] == encoder


def test_a_text_model_gets_no_encoder(tmp_path: Path) -> None:
    from tiny_models import config_of, write_model

    model = write_model(tmp_path / "model", config_of("llama-one-layer"), seed=1)
    bundle = export_student(model, tmp_path / "bundle", encoder="int8")
    assert bundle.manifest.vision is None and bundle.manifest.vision_buckets == ()
    assert bundle.manifest.capabilities["images"] is False
    assert not (bundle.path / "vision.onnx").exists()


# -- the encoder -------------------------------------------------------------------------------


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 99))
@settings(max_examples=25)
def test_the_encoder_does_what_transformers_does(
    encoder: Any, checkpoint: Checkpoint, height: int, width: int, seed: int
) -> None:
    """At every size: the same rows, or a refusal of both."""
    planes = np.random.default_rng(seed).uniform(-1, 1, (3, 16 * height, 16 * width)).astype(np.float32)
    vision = checkpoint.vision
    assert vision is not None
    try:
        expected = torch_features(vision.model, planes)
    except RuntimeError:
        with pytest.raises(Exception, match="Reshape"):
            encoder.run(None, {"pixel_values": planes[None]})
        return
    (got,) = encoder.run(None, {"pixel_values": planes[None]})
    assert got.shape == (height * width, 64)
    assert np.abs(got - expected).max() <= MAX_DIFFERENCE


def _other_position(model: onnx.ModelProto) -> None:
    table = next(item for item in model.graph.initializer if item.name == "places")
    places = np.frombuffer(table.raw_data, np.int64).copy().reshape(table.dims)
    places[8, 2] += 1
    table.raw_data = places.tobytes()


def _other_norm(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "epsilon":
                attribute.f = 1e-2


@pytest.mark.parametrize("spoil", [_other_position, _other_norm])
def test_a_wrong_encoder_fails_the_check(
    checkpoint: Checkpoint, tmp_path: Path, spoil: Callable[[onnx.ModelProto], None]
) -> None:
    vision = checkpoint.vision
    assert vision is not None
    model = build_encoder(vision.shape, vision.weights, vision.places)
    spoil(model)
    (tmp_path / "vision.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ParityError):
        check_encoder(tmp_path / "vision.onnx", vision)


def test_an_unknown_encoder_is_named(checkpoint: Checkpoint, tmp_path: Path) -> None:
    assert checkpoint.vision is not None
    with pytest.raises(ExportError, match="int3"):
        build_encoder_variant(checkpoint.vision, "int3", tmp_path / "vision.onnx")


# -- the decoder -------------------------------------------------------------------------------


def test_a_decoder_that_forgets_its_pictures_fails_the_check(checkpoint: Checkpoint, tmp_path: Path) -> None:
    model = build_graph(
        checkpoint.shape, checkpoint.weights, checkpoint.cos, checkpoint.sin, image_token_id=1024
    )
    for node in model.graph.node:
        if node.op_type == "Where":
            node.input[1] = node.input[2]
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ParityError, match="picture"):
        check_parity(tmp_path / "model.onnx", checkpoint)


def test_more_image_tokens_than_rows_stop_the_run(exported: Exported) -> None:
    manifest = exported.manifest
    session = DecoderSession(exported.path / "model.onnx", manifest.kv, 1, vision=manifest.vision)
    rows = np.zeros((2, 64), np.float32)
    session.forward([5, 1024, 1024, 6], 0, rows)
    with pytest.raises(Exception, match="Gather"):
        session.forward([5, 1024, 1024, 1024], 0, rows)
    session.forward([7], 4)


def test_an_image_token_that_the_model_said_is_one_like_all(
    exported: Exported, checkpoint: Checkpoint
) -> None:
    session = DecoderSession(
        exported.path / "model.onnx", exported.manifest.kv, 1, vision=exported.manifest.vision
    )
    session.forward([5, 6], 0)
    got = session.forward([1024], 2)
    with torch.no_grad():
        expected = checkpoint.model(torch.tensor([[5, 6, 1024]])).logits[0, -1].numpy()
    assert np.abs(got - expected).max() <= MAX_LOGIT_DIFFERENCE


# -- both together -----------------------------------------------------------------------------


class Runtime:
    """A model's graphs in the device runtime's loop, and transformers beside them."""

    def __init__(self, checkpoint: Checkpoint, decoder: Path, encoder: Path) -> None:
        assert checkpoint.vision is not None
        geometry = checkpoint.vision.shape.geometry
        self.model, self.eos = checkpoint.vision.model, checkpoint.eos_token_ids
        self.tokenizer = Tokenizer.from_file(str(checkpoint.folder / "tokenizer.json"))
        session = DecoderSession(decoder, kv_geometry(checkpoint), 1, vision=geometry)
        self._generator = Generator(session, 13, encoder=PictureEncoder(encoder, geometry, 1))

    def ours(self, prompt: str, files: list[bytes], size: int, num: int) -> list[int]:
        """Greedy tokens; the prompt is read in pieces of 13 tokens, so that pictures are cut."""
        told: list[GeneratedToken] = []
        images = tuple(JobImage(file, str(hash(file)), size, size, (size // 16) ** 2) for file in files)
        ids = self.tokenizer.encode(prompt, add_special_tokens=False).ids
        greedy = SamplingSettings(temperature=0.0)
        job = Job(
            prompt=tuple(ids), generated=(), max_tokens=num, stop_token_ids=self.eos, sampling=greedy,
            images=images,
        )  # fmt: skip
        self._generator.run(job, told.append, lambda: False)
        return [token.sampled.token_id for token in told]

    def theirs(self, prompt: str, files: list[bytes], size: int, num: int) -> list[int]:
        pixels = torch.from_numpy(np.stack([pixel_values(file, size, size) for file in files]))[None]
        ids = torch.tensor([self.tokenizer.encode(prompt, add_special_tokens=False).ids])
        out = self.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, do_sample=False,
            max_new_tokens=num,
        )  # fmt: skip
        return [int(token) for token in out[0, ids.shape[1] :]]


@pytest.fixture(scope="module")
def runtime(checkpoint: Checkpoint, exported: Exported) -> Runtime:
    return Runtime(checkpoint, exported.path / "model.onnx", exported.path / "vision.onnx")


@pytest.mark.parametrize("size", [64, 96, 128])
def test_greedy_tokens_are_transformers_own(runtime: Runtime, size: int) -> None:
    prompt = f"<|user|>{'<image>' * (size // 16) ** 2}What is it?<|end|><|assistant|>"
    ours = [runtime.ours(prompt, [png(seed)], size, 24) for seed in range(3)]
    assert ours == [runtime.theirs(prompt, [png(seed)], size, 24) for seed in range(3)]
    assert len({tuple(tokens) for tokens in ours}) > 1  # what is shown decides


def test_two_pictures_stand_in_their_order(runtime: Runtime) -> None:
    prompt = f"<|user|>Left:{'<image>' * 16} right:{'<image>' * 16}<|end|><|assistant|>"
    one, other = [png(1), png(2)], [png(2), png(1)]
    assert runtime.ours(prompt, one, 64, 16) == runtime.theirs(prompt, one, 64, 16)
    assert runtime.ours(prompt, other, 64, 16) == runtime.theirs(prompt, other, 64, 16)


def test_the_committed_model_answers_alike_in_both(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(VISION_MODEL)
    vision = checkpoint.vision
    assert vision is not None
    parts = (checkpoint.shape, checkpoint.weights, checkpoint.cos, checkpoint.sin)
    decoder = build_graph(*parts, image_token_id=vision.shape.image_token_id)
    encoder = build_encoder(vision.shape, vision.weights, vision.places)
    for name, graph in (("model.onnx", decoder), ("vision.onnx", encoder)):
        (tmp_path / name).write_bytes(graph.SerializeToString())
    runtime = Runtime(checkpoint, tmp_path / "model.onnx", tmp_path / "vision.onnx")
    for size, (photo, questions) in zip((192, 64, 128), heldout_photos(3, 41), strict=True):
        out = io.BytesIO()
        draw_photo(photo).save(out, "PNG")
        prompt = picture_prompt(questions["all"], (size // 16) ** 2)
        ours = runtime.ours(prompt, [out.getvalue()], size, 16)
        assert ours == runtime.theirs(prompt, [out.getvalue()], size, 16)
        if size == 192:
            assert questions["all"].is_correct(runtime.tokenizer.decode(ours, skip_special_tokens=True))


# -- the gate ----------------------------------------------------------------------------------


def _task(checkpoint: Checkpoint, path: Path, expected: list[str]) -> list[Any]:
    lines = []
    for seed, answer in enumerate(expected):
        url = f"data:image/png;base64,{base64.b64encode(png(seed)).decode()}"
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "<image>?"}]
        lines.append(json.dumps({"messages": [{"role": "user", "content": content}], "expected": answer}))
    path.write_text("\n".join(lines))
    tokenizer = Tokenizer.from_file(str(checkpoint.folder / "tokenizer.json"))
    assert checkpoint.vision is not None
    return load_task(path, tokenizer, read_chat_template(checkpoint.folder), checkpoint.vision.shape)


def test_the_gate_judges_by_pictures_and_takes_an_encoder(
    checkpoint: Checkpoint, exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "MAX_ANSWER_TOKENS", 6)
    monkeypatch.setattr(gate, "SPEED_BUDGET_S", 0.01)
    tokenizer = Tokenizer.from_file(str(checkpoint.folder / "tokenizer.json"))
    vision = exported.manifest.vision
    assert vision is not None
    session = DecoderSession(exported.path / "model.onnx", exported.manifest.kv, 1, vision=vision)
    seeing = PictureEncoder(exported.path / "vision.onnx", vision, 1)
    blank = _task(checkpoint, tmp_path / "task.jsonl", [""] * 6)
    assert [example.prompt.count(1024) for example in blank] == [64] * 6  # 128 x 128 holds them whole
    answers = list(greedy_answers(session, tokenizer, blank, checkpoint.eos_token_ids, seeing))
    task = _task(checkpoint, tmp_path / "task.jsonl", answers)
    candidates = [Candidate("fp32", "rtn", round_plainly)]
    lax = pass_gate(checkpoint, tokenizer, task, candidates, 100.0, tmp_path)
    assert lax.rows[0].exact_match == 1.0 and lax.encoder == "int8"
    assert lax.encoder_rows[1].size_bytes < lax.encoder_rows[0].size_bytes
    assert lax.capabilities()["gate_points_lost"] == round(lax.encoder_rows[1].points_lost, 3)
    assert [line.split()[:2] for line in lax.table().splitlines()[-2:]] == [
        ["encoder", "fp32"], ["encoder", "int8"],
    ]  # fmt: skip
    assert checkpoint.vision is not None
    texts = [embedded(checkpoint.vision, list(task[0].prompt), task[0].pictures)]
    assert texts[0].shape == (len(task[0].prompt), 64)
    with torch.no_grad():
        assert measure_moments(checkpoint.model, texts)["layer0.qkv"].shape == (64, 64)


def test_pictures_in_a_task_for_a_text_model_are_named(checkpoint: Checkpoint, tmp_path: Path) -> None:
    _task(checkpoint, tmp_path / "task.jsonl", [""])
    tokenizer = Tokenizer.from_file(str(checkpoint.folder / "tokenizer.json"))
    with pytest.raises(ExportError, match=r"line 1.*pictures"):
        load_task(tmp_path / "task.jsonl", tokenizer, read_chat_template(checkpoint.folder))


# -- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "change", "word"),
    [
        ("preprocessor_config.json", {"buckets": []}, "no buckets"),
        ("preprocessor_config.json", {"buckets": [[64, 64]]}, "bucket"),
        ("preprocessor_config.json", {"buckets": [[64, 64, "x"]]}, "bucket"),
        ("preprocessor_config.json", {"buckets": [[60, 64, 12]]}, "16 pixels"),
        ("preprocessor_config.json", {"buckets": [[64, 64, 15]]}, "16 pixels"),
        ("preprocessor_config.json", {"buckets": [[64, 96, 24]]}, "square numbers"),
        ("preprocessor_config.json", {"image_mean": [0.4, 0.5, 0.5]}, "0.5"),
        ("config.json", {"vision_config": {"hidden_act": "relu"}}, "relu"),
        ("config.json", {"text_config": {"hidden_act": "gelu"}}, "silu"),
    ],
)
def test_what_the_encoder_would_not_carry_out_is_refused(
    model_dir: Path, tmp_path: Path, file: str, change: dict[str, Any], word: str
) -> None:
    for path in model_dir.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    value = json.loads((tmp_path / file).read_text())
    for key, item in change.items():
        value[key] = {**value[key], **item} if isinstance(item, dict) else item
    (tmp_path / file).write_text(json.dumps(value))
    with pytest.raises(ExportError, match=word):
        export_student(tmp_path, tmp_path / "bundle")
