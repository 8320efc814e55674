"""Models that see: greedy tokens equal those of transformers, in any company, and pictures share no KV."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from longshore_server.native import EngineConfig, NativeEngine
from longshore_server.native.cpu.compiled import load_library
from longshore_server.native.cpu.runner import CpuRunner
from longshore_server.native.errors import InvalidRequestError, ModelLoadError, UnsupportedModelError
from longshore_server.native.images import (
    MAX_IMAGES,
    ImageGeometry,
    ImageInput,
    PlacedImage,
    fit_pixels,
)
from longshore_server.native.model.fuse import FusedDecoder
from longshore_server.native.runner import ModelRunner
from longshore_server.native.sampling_params import SamplingParams
from longshore_server.native.sequence import Sequence
from seeing_models import UNIT_PX, picture_rgb, pixel_values, write_seeing_model

MAX_TOKENS = 12
IMAGE = 1024  # the token after Shop's own


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_seeing_model(tmp_path_factory.mktemp("seeing"))


@pytest.fixture(scope="module")
def oracle(folder: Path):
    return AutoModelForImageTextToText.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    ).eval()


def _engine(folder: Path, **settings) -> NativeEngine:
    values = {"max_num_seqs": 8, "num_kv_blocks": 256, "block_size": 4} | settings
    return NativeEngine(EngineConfig(model=str(folder), **values))


def _image(seed: int, side_px: int) -> ImageInput:
    return ImageInput(side_px, side_px, picture_rgb(seed, side_px, side_px).tobytes())


def _num_tokens(image: ImageInput) -> int:
    return image.num_pixels // UNIT_PX**2


def _prompt(*parts: list[int] | ImageInput) -> list[int]:
    pieces = ([IMAGE] * _num_tokens(part) if isinstance(part, ImageInput) else part for part in parts)
    return list(itertools.chain.from_iterable(pieces))


def _asked() -> list[tuple[list[int], list[ImageInput]]]:
    """Prompts with none, one and two images, at the start, in the middle and at the very end."""
    small, large, other = _image(1, 32), _image(2, 64), _image(3, 64)
    return [
        (_prompt([7, 8, 9], large, [20, 21]), [large]),
        (_prompt([7, 8, 9], other, [20, 21]), [other]),
        ([30 + index for index in range(25)], []),
        (_prompt(small, [40]), [small]),
        (_prompt([50], large, small, [51, 52]), [large, small]),
        (_prompt([60, 61], small), [small]),
        ([7, 8, 9], []),
    ]


def _expected(oracle, prompt: list[int], images: list[ImageInput], max_tokens: int = MAX_TOKENS) -> list[int]:
    """One image at a time goes through the tower: their sizes differ."""
    ids = torch.tensor([prompt])
    embeds = oracle.get_input_embeddings()(ids)
    if images:
        features = [
            oracle.get_image_features(_pixels(image)).pooler_output[0].reshape(-1, embeds.shape[-1])
            for image in images
        ]
        embeds[0, ids[0] == IMAGE] = torch.cat(features)
    answer = oracle.generate(
        inputs_embeds=embeds,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return answer[0].tolist()


def _pixels(image: ImageInput) -> torch.Tensor:
    rgb = torch.frombuffer(bytearray(image.rgb), dtype=torch.uint8)
    return pixel_values(rgb.view(image.height_px, image.width_px, 3).numpy())


def _run(engine: NativeEngine, asked, **settings) -> list[list[int]]:
    params = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, ignore_eos=True)
    answers: dict[str, list[int]] = {}
    for number, (prompt, images) in enumerate(asked):
        answers[str(number)] = []
        engine.add_request(str(number), prompt, params, images=images, **settings)
    while engine.has_unfinished():
        for output in engine.step():
            assert output.error is None
            answers[output.request_id].append(output.token_id)
    engine.check_integrity()
    return list(answers.values())


def test_answers_equal_transformers_generate(folder, oracle) -> None:
    asked = _asked()
    with torch.inference_mode():
        expected = [_expected(oracle, *each) for each in asked]
        prompt, (image,) = asked[0]  # the class's own way from pixels to tokens, where it has one
        whole = oracle.generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            pixel_values=_pixels(image),
            max_new_tokens=MAX_TOKENS,
            do_sample=False,
            eos_token_id=None,
        )
    assert whole[0, len(prompt) :].tolist() == expected[0]
    assert expected[0] != expected[1], (
        "the two pictures must make a difference for this test to mean anything"
    )

    together = _engine(folder)
    assert together.capabilities >= {"images"} and together.batch_invariant
    assert _run(together, asked) == expected
    plain = _engine(folder, fuse_layers=False)
    assert type(together._runner) is (ModelRunner if load_library() is None else CpuRunner)
    assert type(plain._runner) is ModelRunner
    assert _run(plain, asked) == expected
    chunked = _engine(folder, max_num_batched_tokens=11, max_num_seqs=4)
    assert _run(chunked, asked) == expected
    assert chunked.stats().num_steps > 15
    starved = _engine(folder, num_kv_blocks=24, max_model_len=96, enable_prefix_cache=False)
    assert _run(starved, asked) == expected
    assert starved.stats().preemptions > 0
    swapped = _engine(folder, num_kv_blocks=24, max_model_len=96, kv_swap=("host:1MiB",))
    assert _run(swapped, asked) == expected
    fused = _engine(folder, fuse_layers=True)
    assert isinstance(fused._runner.model.model, FusedDecoder)
    assert _run(fused, asked) == expected


def test_an_answer_goes_on_from_its_tokens(folder, oracle) -> None:
    prompt, images = _asked()[4]
    with torch.inference_mode():
        expected = _expected(oracle, prompt, images)
    engine = _engine(folder)
    assert _run(engine, [(prompt, images)], continue_from=expected[:5]) == [expected[5:]]


def test_an_image_token_that_the_model_says_itself_shows_nothing(folder) -> None:
    """It is a word like any other, also when it is computed again."""
    prompt, images = _asked()[0]
    for settings in ({}, {"fuse_layers": False}):
        engine = _engine(folder, **settings)
        said = SamplingParams(max_tokens=3, temperature=0.0, logit_bias={IMAGE: 100.0})
        engine.add_request("said", prompt, said, images=images)
        tokens = []
        while engine.has_unfinished():
            tokens += [output.token_id for output in engine.step()]
        assert tokens == [IMAGE] * 3
        rest = _run(engine, [(prompt, images)], continue_from=tokens)[0]
        assert _run(_engine(folder), [(prompt, images)], continue_from=tokens)[0] == rest


def test_a_step_over_its_pixels_encodes_one_image_and_goes_on_with_the_next(folder) -> None:
    asked = [(_prompt([7], image, [8]), [image]) for image in (_image(seed, 64) for seed in range(4))]
    expected = _run(_engine(folder), asked)
    engine = _engine(folder)
    engine._scheduler.max_step_pixels = 64 * 64
    kept = engine._runner._features._kept
    steps: list[int] = []

    def step():
        outputs = type(engine).step(engine)
        steps.append(len(kept))
        return outputs

    engine.step = step
    assert _run(engine, asked) == expected
    assert steps[:4] == [1, 2, 3, 4]


def test_pictures_never_share_kv(folder) -> None:
    engine = _engine(folder)
    params = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)

    def cached(image: ImageInput, tenant: str = "a") -> int:
        engine.add_request("r", _prompt([7] * 6, image, [9] * 5), params, images=[image], tenant=tenant)
        outputs = []
        while engine.has_unfinished():
            outputs += engine.step()
        return outputs[0].num_cached_tokens

    assert cached(_image(1, 64)) == 0
    assert cached(_image(1, 64)) == 24  # all full blocks of 27 tokens
    assert cached(_image(2, 64)) == 4  # the block before the picture's first
    assert cached(_image(1, 64), tenant="b") == 0


@given(st.data())
def test_digests_tell_where_images_are(data) -> None:
    """The same tokens with other images, or images cut otherwise, have other digests from there on."""
    size = 4
    sizes = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    other = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    seeds = data.draw(st.lists(st.integers(0, 1), min_size=8, max_size=8))
    first, second = _row_of_images(sizes, seeds[:4]), _row_of_images(other, seeds[4:])
    tokens = [IMAGE] * max(first[-1].stop, second[-1].stop)
    one, two = (
        Sequence("r", tokens, SamplingParams(), max_model_len=99, images=images) for images in (first, second)
    )
    for index in range(len(tokens) // size):
        shown = [
            [(each.start, each.image.digest) for each in images if each.start < (index + 1) * size]
            for images in (first, second)
        ]
        same = one.digest_blocks(index + 1, size)[index] == two.digest_blocks(index + 1, size)[index]
        assert same == (shown[0] == shown[1])


def _row_of_images(sizes: list[int], seeds: list[int]) -> tuple[PlacedImage, ...]:
    placed, start = [], 0
    for num_tokens, seed in zip(sizes, seeds, strict=False):
        image = ImageInput(1, num_tokens, bytes([seed]) * 3 * num_tokens)
        placed.append(PlacedImage(image, start, start + num_tokens))
        start += num_tokens
    return tuple(placed)


@given(st.lists(st.integers(1, 9), max_size=6), st.integers(1, 60), st.integers(1, 30))
def test_a_step_encodes_a_bounded_number_of_pixels(sizes, num_tokens, budget) -> None:
    """Every image is passed at last, and but for its first image no step takes more than its bound."""
    side_px, max_pixels = 100, 1200
    placed, start = [], 2
    for count in sizes:
        image = ImageInput(1, count * side_px, b"")
        placed.append(PlacedImage(image, start, start + count))
        start += count + 1
    computed = 0
    while computed < num_tokens:
        wanted = min(budget, num_tokens - computed)
        count, num_pixels = fit_pixels(placed, computed, wanted, max_pixels, is_first=True)
        shown = [each for each in placed if each.overlaps(computed, computed + count)]
        assert count > 0
        assert num_pixels == sum(each.image.num_pixels for each in shown)
        assert num_pixels <= max_pixels or len(shown) == 1
        later, more = fit_pixels(placed, computed, wanted, side_px, is_first=False)
        assert more <= side_px and later <= count
        computed += count


@pytest.mark.parametrize(
    ("prompt", "images", "words"),
    [
        ([5, 6], [_image(1, 32)], "does not have 4 tokens in a row"),
        ([IMAGE] * 3, [_image(1, 32)], "does not have 4 tokens in a row"),
        ([IMAGE, IMAGE, 5, IMAGE, IMAGE], [_image(1, 32)], "does not have 4 tokens in a row"),
        ([IMAGE] * 5, [_image(1, 32)], "1 image tokens stand for no image"),
        ([5, IMAGE], [], "1 image tokens stand for no image"),
        ([IMAGE] * 4, [ImageInput(16, 64, bytes(16 * 64 * 3))], "must be square"),
        ([IMAGE] * 4, [ImageInput(40, 40, bytes(40 * 40 * 3))], "multiples of 16 pixels"),
        ([IMAGE] * 4, [ImageInput(0, 0, b"")], "multiples of 16 pixels"),
        ([IMAGE] * 4, [ImageInput(32, 32, bytes(32))], "3 bytes for each pixel"),
        ([IMAGE] * 4, [_image(1, 32)] * (MAX_IMAGES + 1), "over the bound of 64"),
        ([IMAGE] * 9216, [ImageInput(1536, 1536, bytes(1536 * 1536 * 3))], "pixels"),
    ],
)
def test_images_that_do_not_fit_their_tokens_are_refused(prompt, images, words) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        ImageGeometry(IMAGE, UNIT_PX).place(prompt, images)


def test_a_model_without_eyes_refuses_images(make_engine, greedy) -> None:
    engine = make_engine("llama")
    assert "images" not in engine.capabilities
    with pytest.raises(InvalidRequestError, match="takes none"):
        engine.add_request("r", [5, 6], greedy(2), images=[_image(1, 32)])


def test_several_ranks_refuse_a_model_that_sees(folder) -> None:
    with pytest.raises(UnsupportedModelError, match="one rank"):
        _engine(folder, tensor_parallel_size=2)


def test_layers_in_fp8_see(folder) -> None:
    """The tower keeps its own numbers, so that features stay what they are."""
    engine, plain = _engine(folder, quantization="fp8"), _engine(folder)
    with torch.inference_mode():
        ours, theirs = (each._runner._features._tower.encode(_image(1, 64)) for each in (engine, plain))
    assert torch.equal(ours, theirs)
    answers = _run(engine, _asked()[:2])
    assert answers[0] != answers[1]


def test_random_weights_see(folder) -> None:
    asked = _asked()[:2]
    answers = _run(_engine(folder, load_format="random", seed=3), asked)
    assert answers == _run(_engine(folder, load_format="random", seed=3), asked)
    assert [len(answer) for answer in answers] == [MAX_TOKENS] * 2


def test_a_folder_that_lacks_part_of_its_tower_is_refused(folder, tmp_path) -> None:
    lame = tmp_path / "lame"
    shutil.copytree(folder, lame)
    weights = load_file(lame / "model.safetensors")
    del weights["model.connector.modality_projection.proj.weight"]
    save_file(weights, lame / "model.safetensors")
    with pytest.raises(ModelLoadError, match=r"lacks 1 weights, among them model\.connector"):
        _engine(lame)
