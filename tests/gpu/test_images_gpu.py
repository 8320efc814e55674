"""A model that sees, on a GPU: likeliest tokens of transformers, images in every kind of step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from longshore_server.native import EngineConfig, NativeEngine, SamplingParams
from longshore_server.native.images import ImageInput
from seeing_models import UNIT_PX, picture_rgb, pixel_values, write_seeing_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

IMAGE = 1024
MAX_TOKENS = 24
WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "initializer_range": 0.05}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_seeing_model(tmp_path_factory.mktemp("seeing"), **WIDE)


def _engine(folder: Path, **settings: Any) -> NativeEngine:
    defaults = {"device": "cuda", "dtype": "bfloat16", "max_num_seqs": 16, "num_kv_blocks": 1000}
    return NativeEngine(EngineConfig(model=str(folder), **defaults | settings))


def _asked() -> list[tuple[list[int], list[ImageInput]]]:
    """Images at the start, in the middle and at the very end, where the last row shows one; and none."""
    asked = []
    for seed, (before, side_px, after) in enumerate(
        [(3, 64, 9), (0, 32, 5), (40, 64, 0), (7, 48, 1), (20, 0, 0), (3, 64, 9)]
    ):
        image = ImageInput(side_px, side_px, picture_rgb(seed, side_px, side_px).tobytes())
        shown = [IMAGE] * (image.num_pixels // UNIT_PX**2)
        prompt = [*range(100, 100 + before), *shown, *range(200, 200 + after)]
        asked.append((prompt, [image] if side_px else []))
    return asked


def _run(engine: NativeEngine, asked) -> list[list[int]]:
    params = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, ignore_eos=True)
    answers: dict[str, list[int]] = {}
    for number, (prompt, images) in enumerate(asked):
        answers[str(number)] = []
        engine.add_request(str(number), prompt, params, images=images)
    while engine.has_unfinished():
        for output in engine.step():
            assert output.error is None
            answers[output.request_id].append(output.token_id)
    engine.check_integrity()
    return list(answers.values())


def _logits(model: Any, prompt: list[int], images: list[ImageInput], answer: list[int]) -> torch.Tensor:
    """Float32 [answer, vocab] of transformers, which reads the answer as it was given."""
    ids = torch.tensor([prompt + answer], device="cuda")
    shown: dict[str, torch.Tensor] = {}
    if images:
        (image,) = images
        rgb = torch.frombuffer(bytearray(image.rgb), dtype=torch.uint8).view(image.height_px, -1, 3)
        shown["pixel_values"] = pixel_values(rgb.numpy()).cuda()
    logits: torch.Tensor = model(input_ids=ids, **shown).logits[0, len(prompt) - 1 : -1]
    return logits.float()


@pytest.mark.parametrize(
    "settings",
    [{"fuse_layers": False}, {"fuse_layers": True}, {"max_num_batched_tokens": 17, "block_size": 16}],
    ids=["plain", "fused", "chunked"],
)
@torch.inference_mode()
def test_tokens_are_the_likeliest_of_transformers(folder, settings) -> None:
    """Or such that bf16 cannot tell from it, as far as transformers' own bf16 model is off."""
    from transformers import AutoModelForImageTextToText

    asked = _asked()
    answers = _run(_engine(folder, **settings), asked)
    oracle = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="eager"
    ).cuda()
    pairs = [(*each, answer) for each, answer in zip(asked, answers, strict=True)]
    rounded = [_logits(oracle, *each) for each in pairs]
    oracle.float()
    exact = [_logits(oracle, *each) for each in pairs]
    noise = max(float((x - y).abs().max()) for x, y in zip(rounded, exact, strict=True))
    for answer, fp32 in zip(answers, exact, strict=True):
        chosen = torch.tensor(answer, device="cuda")
        gap = fp32.max(-1).values - fp32.gather(1, chosen[:, None])[:, 0]
        assert gap.max() <= 2 * noise, (float(gap.max()), noise)
    assert answers[0] != answers[5], "two pictures must make a difference for this test to mean anything"


def test_an_image_alone_and_in_company_is_the_same(folder) -> None:
    asked = _asked()
    engine = _engine(folder)
    together = _run(engine, asked * 2)
    assert [answer[0] for answer in together[:6]] == [answer[0] for answer in together[6:]]
    alone = [_run(_engine(folder, max_num_seqs=1), [each])[0] for each in asked]
    assert sum(a[0] == b[0] for a, b in zip(together, alone, strict=False)) >= len(asked) - 1
