"""The picture task: photos, their words and digits, what is learnt from them, and the committed model."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from random import Random
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

from longshore.images import image_bytes, image_size
from shop.evaluate_pictures import PictureEvaluation, evaluate_folder, image_features, normalised
from shop.measure_pictures import SizeRow, draw, table
from shop.picture_batches import PhotoPool, draw_shard, resizer
from shop.picture_models import (
    IMAGE,
    POSITIONS_PER_SIDE,
    SIZES_PX,
    VISION_MODEL,
    build_vision_model,
    num_image_tokens,
    random_vision_model,
    vision_config,
    vision_tokenizer,
)
from shop.picture_questions import PICTURE_KINDS, ask, chat_text, picture_messages, picture_prompt
from shop.picture_shapes import COLOUR_RGB, PRODUCTS
from shop.picture_task import picture_task_lines
from shop.pictures import Photo, draw_photo, draw_with_digits, make_photo
from shop.sheet import COLOURS, NAMES
from shop.train_pictures import PictureRun, PictureTrainer, digit_labels, spread_image_tokens

photos = st.builds(
    Photo,
    st.sampled_from(list(PRODUCTS)),
    st.sampled_from(list(COLOUR_RGB)),
    st.integers(2, 60),
    st.integers(0, 2**48),
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return vision_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


# -- photos ------------------------------------------------------------------------------------


def test_products_and_colours_are_words_of_the_shop() -> None:
    assert set(PRODUCTS) <= set(NAMES) and set(COLOUR_RGB) <= set(COLOURS)


@given(photos)
def test_a_photo_is_the_same_picture_again_and_its_digits_spell_the_price(photo: Photo) -> None:
    image, digits = draw_with_digits(photo)
    assert draw_photo(photo).tobytes() == image.tobytes()
    assert max(image.size) in range(400, 521) and image.mode == "RGB"
    assert sum(digit.value * 10**digit.place for digit in digits) == photo.price
    for digit in digits:
        assert 0 < digit.x < 1 and 0 < digit.y < 1 and 0 < digit.width < 0.2


def test_digits_stand_where_they_are_said_to() -> None:
    """Beyond the digits' boxes, and the dollar sign's and the tag's, two prices give the same picture."""
    one, other = (draw_with_digits(Photo("lamp", "red", price, 11)) for price in (28, 47))
    differs = np.abs(np.asarray(one[0], int) - np.asarray(other[0], int)).max(2) > 40
    width, height = one[0].size
    rows, columns = np.nonzero(differs)
    assert len(rows) > 10
    for digit in one[1]:
        left, right = (digit.x + side * digit.width / 2 for side in (-1, 1))
        top, bottom = (digit.y + side * digit.height / 2 for side in (-1, 1))
        inside = (columns > left * width) & (columns < right * width)
        assert (inside & (rows > top * height) & (rows < bottom * height)).any()


def test_held_out_words_are_never_trained_on(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rng = Random(1)
    held_out = [make_photo(rng, "heldout") for _ in range(40)]
    trained = [make_photo(rng, "train") for _ in range(200)]
    words = {(photo.colour, photo.name, photo.price) for photo in held_out}
    assert not words & {(photo.colour, photo.name, photo.price) for photo in trained}
    assert all(photo.split == "heldout" and not photo.is_easy for photo in held_out)


# -- questions ---------------------------------------------------------------------------------


@given(photos, st.sampled_from(PICTURE_KINDS), st.integers(0, 99))
def test_answers_are_checked_by_their_facts(photo: Photo, kind: str, seed: int) -> None:
    question = ask(Random(seed), photo, kind)  # type: ignore[arg-type]
    assert question.is_correct(question.answer) and question.is_correct(f"Well: {question.answer}")
    assert not question.is_correct("I can not see it.")
    price = 61 if photo.price == 60 else photo.price + 1
    other = Photo("mug" if photo.name != "mug" else "hat", photo.colour, price, photo.seed)
    assert not question.is_correct(ask(Random(seed), other, kind).answer)  # type: ignore[arg-type]


def test_the_prompt_is_what_the_template_makes_of_the_messages() -> None:
    auto = AutoTokenizer.from_pretrained(VISION_MODEL)
    question = ask(Random(1), make_photo(Random(2), "train"), "all")
    rendered = auto.apply_chat_template(
        picture_messages(question), tokenize=False, add_generation_prompt=True
    )
    assert rendered == picture_prompt(question)
    text = auto.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert text == "<|user|>Hi<|end|>"


@given(photos, st.booleans(), st.integers(0, 99))
def test_a_chat_holds_its_picture_once(photo: Photo, is_text_first: bool, seed: int) -> None:
    rng = Random(seed)
    chat = chat_text([ask(rng, photo, kind) for kind in PICTURE_KINDS[:3]], is_text_first)
    assert chat.count(IMAGE) == 1 and chat.index(IMAGE) < chat.index("<|assistant|>")
    assert chat.count("<|assistant|>") == 3


def test_a_task_file_holds_photos_and_answers() -> None:
    lines = [json.loads(line) for line in picture_task_lines("heldout", 4, 3)]
    assert [line["expected"].split()[0] for line in lines] == ["The"] * 4
    for line in lines:
        image_part, text_part = line["messages"][0]["content"]
        assert max(image_size(image_bytes(image_part["image_url"]["url"]))) >= 400
        assert text_part["text"] and re.findall(line["pattern"], line["expected"])


def test_the_curves_are_drawn_and_told() -> None:
    correct = dict.fromkeys(PICTURE_KINDS, 3)
    rows = [SizeRow(size, size, 16, 4, correct, size / 10, size / 5) for size in (64, 128)]
    assert table(rows).splitlines()[2].startswith("| 64 x 64 | 16 | 75.0% |")
    picture = ElementTree.fromstring(draw(rows))
    assert len(picture.findall("{*}polyline")) == 5 and len(picture.findall("{*}circle")) == 10


# -- batches -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size_px", [64, 224])
def test_the_pool_scales_as_pillow_does(size_px: int) -> None:
    image = draw_photo(Photo("tent", "teal", 34, 5)).resize((320, 320), Image.Resampling.BICUBIC)
    wanted = np.asarray(image.resize((size_px, size_px), Image.Resampling.BICUBIC), int)
    matrix, planes = resizer(320, size_px), np.asarray(image, np.float32).transpose(2, 0, 1)
    got = (matrix @ planes @ matrix.T).transpose(1, 2, 0).round().clip(0, 255)
    assert np.abs(got - wanted).max() <= 2 and np.abs(got - wanted).mean() < 0.2


@given(st.integers(0, 9), st.sampled_from([1, 4, 16]), st.lists(st.integers(1, 9), min_size=10, max_size=10))
def test_image_tokens_are_spread_in_their_place(place: int, num: int, row: list[int]) -> None:
    row[place] = 77
    spread = spread_image_tokens(torch.tensor([row]), 77, num)[0].tolist()
    assert spread == [*row[:place], *[77] * num, *row[place + 1 :]]


def test_digit_labels_lie_under_the_digits(tokenizer: Tokenizer, tmp_path: Path) -> None:
    digits = torch.tensor([[[13.0, 0.26, 0.5, 0.1, 0.2], [4.0, 0.9, 0.5, 0.001, 0.001]]])
    labels = digit_labels(digits, 8).view(8, 8)
    assert labels[3:5, 1:3].eq(14).any() and labels[:, 5:].max() == 5  # a dot is one patch at least
    assert labels[0].sum() == 0
    nothing = torch.full((1, 2, 5), -1.0)
    assert digit_labels(nothing, 8).sum() == 0


def test_a_shard_is_the_same_again_and_whole(tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = tmp_path / "tokenizer.json"
    tokenizer.save(str(file))
    one, again = (draw_shard(3, 2, 96, file, 0, 0) for _ in range(2))
    assert all(np.array_equal(getattr(one, name), getattr(again, name)) for name in one.__slots__)
    image_token = tokenizer.token_to_id(IMAGE)
    assert ((one.tokens == image_token).sum(2) == 1).all()
    assert (one.tokens[:, :, -1] == 0).all()  # no chat was cut


# -- the model ---------------------------------------------------------------------------------


def test_no_patch_lies_between_two_positions() -> None:
    """Else fp32 rounding decides where it is, and two machines may differ."""
    for size in SIZES_PX:
        side = size // 8
        places = [index * POSITIONS_PER_SIDE / side for index in range(1, side)]
        assert min(abs(place - round(place)) for place in places) > 0.02
        assert len({int(place) for place in places}) == side - 1


def test_features_are_the_model_s_own() -> None:
    model = build_vision_model(0, "tiny")
    pixels = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        ours = image_features(model, pixels)[1].flatten(0, 1)
        theirs = torch.cat(model.get_image_features(pixels[:, None]).pooler_output)
    assert torch.equal(ours, theirs)


def test_a_toy_run_learns_its_photos_and_goes_on_from_its_weights(tmp_path: Path) -> None:
    run = PictureRun(
        tmp_path, which="tiny", num_steps=130, patches=512, max_rows=8, pool_photos=4, shard_photos=4,
        num_shards=1, easy_shards=1, processes=1, eval_every=130, eval_photos=1, warmup_steps=10,
    )  # fmt: skip
    trainer = PictureTrainer(run, "cpu")
    trainer.sizes_px = (64,)
    assert trainer.train()["loss"]["answers"] < 0.2
    batch = trainer.pool.batch(8, 64, torch.Generator().manual_seed(1))
    start = {"start": tmp_path / "weights.safetensors", "out": tmp_path / "later"}
    later = PictureTrainer(replace(run, **start), "cpu")  # type: ignore[arg-type]
    later.pool.close()
    with torch.no_grad():
        seen, blind = (
            float(later.losses(replace(batch, pixels=pixels))["answers"])
            for pixels in (batch.pixels, torch.zeros_like(batch.pixels))
        )
    assert seen < 0.2 < blind  # by what the photos show, not by heart


def test_workers_failures_are_told(tmp_path: Path) -> None:
    pool = PhotoPool(
        4, 4, 64, tmp_path / "missing.json", num_processes=1, num_easy=0, num_shards=1, seed=0, device="cpu"
    )
    with pytest.raises(RuntimeError, match="workers"):
        pool.wait_for(4)
    pool.close()


def test_teacher_forcing_and_greedy_decoding_agree(tmp_path: Path) -> None:
    """On the committed model, at a size where it is right in part."""
    tokenizer = Tokenizer.from_file(str(VISION_MODEL / "tokenizer.json"))
    model = AutoModelForImageTextToText.from_pretrained(VISION_MODEL, dtype=torch.float32).eval()
    forced = PictureEvaluation(tokenizer, [64], 8, "cpu", seed=21)(model)["64"]
    greedy = evaluate_folder(VISION_MODEL, 8, 21, [64])["64"]
    assert {kind: round(8 * forced[kind]) for kind in PICTURE_KINDS} == greedy["correct"]


def test_the_committed_model_reads_large_pictures_and_not_small_ones() -> None:
    scores = evaluate_folder(VISION_MODEL, 8, 31, [64, 160])
    assert scores["160"]["overall"] >= 0.9, scores
    assert scores["64"]["correct"]["price"] <= 5, scores
    assert scores["64"]["correct"]["colour"] >= 7, scores


def test_random_weights_read_nothing(tmp_path: Path) -> None:
    assert evaluate_folder(random_vision_model(tmp_path), 2, 31, [64])["64"]["overall"] == 0.0


def test_the_committed_model_is_of_the_stated_shape() -> None:
    config, wanted = AutoConfig.from_pretrained(VISION_MODEL), vision_config()
    for name in ("vision_config", "text_config"):
        ours, theirs = getattr(config, name).to_dict(), getattr(wanted, name).to_dict()
        assert {key: value for key, value in ours.items() if key != "dtype"} == {
            key: value for key, value in theirs.items() if key != "dtype"
        }
    assert (config.image_token_id, config.scale_factor) == (wanted.image_token_id, wanted.scale_factor)
    assert num_image_tokens(320, 320) == 400
    assert (VISION_MODEL / "model.safetensors").stat().st_size < 8e6
    assert normalised(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1.0, 1.0]
