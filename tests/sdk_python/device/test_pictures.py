"""Pictures on the device: torch's tokens, counted, reused by what they show, refused without harm to any."""

from __future__ import annotations

import base64
import io
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer

from longshore.device import DeviceSettings, Student
from longshore.device.call import Call
from longshore.device.encoder import JobImage, measure_encoder, position_keys
from longshore.errors import (
    BodyTooLargeError,
    BundleDamagedError,
    BundleIncompatibleError,
    DeviceError,
    InvalidImageError,
    InvalidRequestError,
    LongshoreError,
    PromptTooLongError,
)
from longshore.images import data_url, pixel_values
from longshore.wire import (
    AnswerEvent,
    AnyRequest,
    FinishEvent,
    ImageUse,
    Report,
    TokenEvent,
    Usage,
    decode_chat_request,
    decode_completion_request,
)
from vision_bundle import IMAGE, TorchSight, image_token_id, make_vision_bundle

SETTINGS: dict[str, Any] = {"calibration_s": 0.0, "image_budget_ms": 60_000.0}


@pytest.fixture(scope="module")
def seeing(vision_dir: Path) -> Iterator[Student]:
    """Cuts prompts into pieces of 7 tokens, so that pictures are cut as well."""
    with Student(vision_dir, settings=DeviceSettings(prefill_chunk_tokens=7, **SETTINGS)) as running:
        yield running


@pytest.fixture(scope="module")
def oracle(model_dir: Path) -> TorchSight:
    return TorchSight(model_dir, image_token_id(model_dir))


def picture(seed: int, size: int = 300) -> bytes:
    rng = np.random.default_rng(seed)
    out = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).resize((size, size)).save(out, "PNG")
    return out.getvalue()


def shown(data: bytes, detail: str = "auto") -> dict[str, Any]:
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    return {"type": "image_url", "image_url": {"url": url, "detail": detail}}


def said(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def ask(*parts: dict[str, Any], **fields: Any) -> AnyRequest:
    fields = {"temperature": 0, "max_tokens": 12, "ignore_eos": True, **fields}
    return decode_chat_request(
        {"model": "s", "messages": [{"role": "user", "content": list(parts)}], **fields}
    )


def ids(events: list[AnswerEvent]) -> list[int]:
    return [event.mark.token_id for event in events if isinstance(event, TokenEvent)]


def certainties(student: Student, *parts: dict[str, Any]) -> list[float]:
    """The log-probabilities of a greedy answer: what differs where tokens happen to agree."""
    events = list(student.stream(ask(*parts, logprobs=True)))
    return [event.logprob.logprob for event in events if isinstance(event, TokenEvent) and event.logprob]


def ending(events: list[AnswerEvent]) -> tuple[Usage, Report]:
    end = events[-1]
    assert isinstance(end, FinishEvent) and end.usage is not None and end.report is not None
    return end.usage, end.report


def images_of(events: list[AnswerEvent]) -> tuple[ImageUse, ...]:
    return ending(events)[1].images


def sizes(events: list[AnswerEvent]) -> list[tuple[int, str]]:
    return [(use.width_px, use.why) for use in images_of(events)]


def cached(events: list[AnswerEvent]) -> int:
    details = ending(events)[0].prompt_tokens_details
    return details.cached_tokens if details is not None else 0


# -- the answer --------------------------------------------------------------------------------


def prompt_of(folder: Path, *parts: str | int) -> list[int]:
    """The prompt of a chat by hand: texts, and in place of each picture its number of tokens."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    found: list[int] = tokenizer.encode("<|user|>", add_special_tokens=False).ids
    for part in parts:
        if isinstance(part, int):
            found += [image_token_id(folder)] * part
        else:
            found += tokenizer.encode(part, add_special_tokens=False).ids
    return found + list(tokenizer.encode("<|end|><|assistant|>", add_special_tokens=False).ids)


@pytest.mark.parametrize("detail", ["low", "high"])
def test_greedy_tokens_are_torchs(seeing: Student, model_dir: Path, oracle: TorchSight, detail: str) -> None:
    size = {"low": 32, "high": 96}[detail]
    one, two = picture(1), picture(2)
    request = ask(said("What is"), shown(one, detail), said("beside"), shown(two, detail), said("here?"))
    rows = (size // 16) ** 2
    prompt = prompt_of(model_dir, "What is", rows, "beside", rows, "here?")
    expected = oracle.greedy(prompt, [pixel_values(data, size, size) for data in (one, two)], 12)
    events = list(seeing.stream(request))
    assert ids(events) == expected
    usage, report = ending(events)
    assert usage.prompt_tokens == len(prompt) == seeing.count_prompt_tokens(request)
    assert [(use.width_px, use.num_tokens) for use in report.images] == [(size, rows)] * 2
    parts = [said("What is"), shown(one, detail), said("beside"), shown(two, detail), said("here?")]
    swapped = [parts[0], parts[3], parts[2], parts[1], parts[4]]
    assert not np.allclose(certainties(seeing, *swapped), certainties(seeing, *parts), atol=1e-2)


@pytest.mark.parametrize("before", range(8))
def test_a_picture_may_be_cut_anywhere(
    seeing: Student, model_dir: Path, oracle: TorchSight, before: int
) -> None:
    """Pieces of 7 tokens over 4 image tokens, at every offset; at one, the last piece is an image token."""
    text = "#" * before
    events = list(seeing.stream(ask(said(text), shown(picture(3), "low"))))
    prompt = prompt_of(model_dir, text, 4)
    assert ids(events) == oracle.greedy(prompt, [pixel_values(picture(3), 32, 32)], 12)


async def test_async_answers_are_the_same(seeing: Student) -> None:
    request = ask(shown(picture(4)), said("What?"))
    assert ids([event async for event in seeing.astream(request)]) == ids(list(seeing.stream(request)))


def test_the_spelling_of_the_token_is_no_picture(seeing: Student) -> None:
    written = ask(said(f"a {IMAGE} b"))
    plain = ending(list(seeing.stream(written)))
    assert plain[1].images == () and plain[0].prompt_tokens > 8
    across = ask(said("a <|ima"), said("ge|> b"))
    assert ids(list(seeing.stream(across))) == ids(list(seeing.stream(written)))
    with_picture = list(seeing.stream(ask(said(f"a {IMAGE} b"), shown(picture(1), "low"))))
    assert ending(with_picture)[0].prompt_tokens == plain[0].prompt_tokens + 4


def test_the_token_is_never_drawn_nor_guessed(seeing: Student, model_dir: Path) -> None:
    token_id = image_token_id(model_dir)
    request = ask(
        said("Tell"), shown(picture(5), "low"), logit_bias={str(token_id): 100}, temperature=2, seed=1
    )
    assert token_id not in ids(list(seeing.stream(request)))
    # Prompt lookup finds "one two" again, and behind its first place a picture.
    twice = ask(said("one two"), shown(picture(5), "low"), said("one two"), max_tokens=40)
    assert len(ids(list(seeing.stream(twice)))) == 40


@pytest.mark.parametrize("prompt", [IMAGE, f"a{IMAGE}b", "ids"])
def test_a_raw_prompt_has_no_pictures(seeing: Student, model_dir: Path, prompt: str) -> None:
    raw: Any = [5, image_token_id(model_dir)] if prompt == "ids" else prompt
    with pytest.raises(InvalidRequestError) as caught:
        seeing.stream(decode_completion_request({"model": "s", "prompt": raw}))
    assert caught.value.param == "prompt"


# -- reuse -------------------------------------------------------------------------------------


def test_a_later_turn_computes_neither_picture_nor_words_again(seeing: Student) -> None:
    first = ask(said("Look:"), shown(picture(6)), said("What colour?"))
    events = list(seeing.stream(first))
    usage, _ = ending(events)
    again = list(seeing.stream(first))
    assert ids(again) == ids(events) and cached(again) == usage.prompt_tokens - 1
    other = list(seeing.stream(ask(said("Look:"), shown(picture(7)), said("What colour?"))))
    assert 0 < cached(other) < 10  # the words before the picture alone
    assert ids(list(seeing.stream(first))) == ids(events)
    smaller = list(seeing.stream(ask(said("Look:"), shown(picture(6), "low"), said("What colour?"))))
    assert cached(smaller) == cached(other)  # the same picture at another size shows something else


def test_keys_tell_pictures_and_sizes_apart() -> None:
    def image(digest: str, size: int) -> JobImage:
        return JobImage(b"", digest, size, size, (size // 16) ** 2)

    tokens = [5, 9, 9, 9, 9, 6, 9]
    keys = position_keys(tokens, [image("a", 32), image("b", 16)], 9)
    assert keys[:1] + keys[5:6] == [5, 6] and len(set(keys[1:5])) == 1 and keys[6] != keys[1]
    assert min(keys) < 0 and keys == position_keys(tokens, [image("a", 32), image("b", 16)], 9)
    assert keys[1] != position_keys(tokens[:5], [image("c", 32)], 9)[1]
    assert position_keys([9, 5], [image("a", 16)], 9)[0] != keys[1]
    assert position_keys(tokens, [], None) == tokens


def test_a_resumed_answer_is_the_undisturbed_one(seeing: Student) -> None:
    parts = (shown(picture(8)), said("Describe it."))
    whole = list(seeing.stream(ask(*parts, temperature=1, seed=3)))
    list(seeing.stream(ask(said("Something else."))))
    for cut in (1, 7):
        continuation = {
            "token_ids": ids(whole)[:cut],
            "segment": 1,
            "model_digest": seeing.manifest.model_digest,
        }
        fields = {"temperature": 1, "seed": 3, "longshore": {"continue_from": continuation}}
        rest = list(seeing.stream(ask(*parts, **fields)))
        assert ids(rest) == ids(whole)[cut:]
        assert ending(rest)[1].resumed and sizes(rest) == sizes(whole)
    with pytest.raises(InvalidRequestError) as caught:
        bad = continuation | {"token_ids": [seeing.manifest.vision.image_token_id]}  # type: ignore[union-attr]
        seeing.stream(ask(*parts, longshore={"continue_from": bad}))
    assert caught.value.param == "longshore.continue_from.token_ids"


# -- sizes -------------------------------------------------------------------------------------


def test_the_report_says_which_size_and_why(vision_dir: Path) -> None:
    with Student(vision_dir, settings=DeviceSettings(**SETTINGS | {"image_budget_ms": 0.0})) as hasty:
        small = images_of(list(hasty.stream(ask(shown(picture(1)), said("?")))))[0]
        assert (small.width_px, small.why) == (32, "quickest") and (small.predicted_ms or 0) > 0
        asked = images_of(list(hasty.stream(ask(shown(picture(1), "high"), said("?")))))[0]
        assert (asked.width_px, asked.why) == (96, "full")
        tiny = images_of(list(hasty.stream(ask(shown(picture(1, size=20), "high"), said("?")))))[0]
        assert (tiny.width_px, tiny.why) == (32, "full")


def test_a_deadline_makes_pictures_smaller(seeing: Student) -> None:
    request = ask(shown(picture(12)), said("?"), longshore={"deadline_ms": 3_600_000})
    assert sizes(list(seeing.stream(request))) == [(96, "full")]
    plan = seeing._plan(ask(shown(picture(13)), said("?")), Call(time.monotonic()))
    assert plan.images[0].use.why == "quickest"


def test_many_pictures_share_the_context(seeing: Student) -> None:
    """The context holds 256 tokens: two pictures of 36, nine of 16, no 63 of 4."""
    few = ask(*[shown(picture(n)) for n in range(2)], said("?"))
    assert set(sizes(list(seeing.stream(few)))) == {(96, "full")}
    many = ask(*[shown(picture(n + 20)) for n in range(9)], said("?"))
    assert set(sizes(list(seeing.stream(many)))) == {(64, "context")}
    with pytest.raises(PromptTooLongError):
        seeing.stream(ask(*[shown(picture(1))] * 63, said("?")))


def test_a_picture_once_read_large_stays_so(vision_dir: Path) -> None:
    with Student(vision_dir, settings=DeviceSettings(**SETTINGS)) as student:
        request = ask(shown(picture(1)), said("?"))
        first = images_of(list(student.stream(request)))[0]
        assert first.why == "full"
        # Encoding has become dear: a new picture is read smaller, the known one needs no encoding.
        student._learn(student._plan(request, Call(None)), [(0, 1.0, 1e9)] * 40)
        kept = images_of(list(student.stream(ask(shown(picture(1)), said("And now?")))))[0]
        assert (kept.width_px, kept.why) == (96, "kept")
        other = images_of(list(student.stream(ask(shown(picture(2)), said("And now?")))))[0]
        assert other.why in ("budget", "quickest") and other.width_px < 96


def test_every_picture_refines_the_measurement(seeing: Student) -> None:
    before = seeing.vision_calibration
    list(seeing.stream(ask(shown(picture(40)), said("?"))))
    after = seeing.vision_calibration
    assert after != before and after.prefill_tokens_per_s == before.prefill_tokens_per_s
    list(seeing.stream(ask(shown(picture(40)), said("?"))))
    assert seeing.vision_calibration == after  # which was not encoded again


def test_what_is_expected_counts_pictures(seeing: Student) -> None:
    words, calibration = ask(said("What is this?")), seeing.calibration
    assert calibration is not None
    plain_s = seeing.expected_ttft_s(words)
    assert plain_s == calibration.expected_ttft_s(seeing.count_prompt_tokens(words))
    small, large = (ask(shown(picture(50), detail), said("What is this?")) for detail in ("low", "high"))
    of_tokens_s = calibration.expected_ttft_s(seeing.count_prompt_tokens(large))
    assert plain_s < seeing.expected_ttft_s(small) < seeing.expected_ttft_s(large)
    assert seeing.expected_ttft_s(large) > of_tokens_s
    fresh = Student(seeing._bundle_dir)
    with pytest.raises(DeviceError):
        fresh.expected_ttft_s(words)


def test_calibration_takes_the_two_sizes_that_the_budget_has() -> None:
    asked: list[tuple[int, int]] = []

    def run(width: int, height: int) -> None:
        asked.append((width, height))
        end_s = time.perf_counter() + width * height * 1e-6
        while time.perf_counter() < end_s:
            pass

    sizes = [(64, 64), (16, 16), (32, 32), (256, 256)]
    small_pixels, small_ms, large_pixels, large_ms = measure_encoder(run, sizes, 0.02)
    assert small_pixels == 256 and large_pixels in (1024, 4096) and 0 < small_ms < large_ms
    assert (256, 256) not in asked  # 65 ms, and two and a half budgets are 50
    assert measure_encoder(run, sizes, 1.0)[2] == 256 * 256
    assert measure_encoder(run, sizes, 0.0)[2] == 1024
    assert measure_encoder(run, [(16, 16)], 0.01)[2] == 256


def test_a_disturbed_measurement_does_not_make_larger_pictures_cheaper() -> None:
    def run(width: int, height: int) -> None:
        end_s = time.perf_counter() + (2e-3 if width == 16 else 0.0)
        while time.perf_counter() < end_s:
            pass

    _, small_ms, large_pixels, large_ms = measure_encoder(run, [(16, 16), (64, 64)], 0.02)
    assert large_pixels == 64 * 64 and large_ms == small_ms


# -- refusals ----------------------------------------------------------------------------------


def test_a_broken_picture_harms_nobody_else(seeing: Student) -> None:
    good = ask(shown(picture(1)), said("?"))
    list(seeing.stream(good))
    process_id = seeing.process_id
    for data in (b"", b"GIF89a", picture(1)[:30], picture(1)[:24] + b"\xff" * 40):
        with pytest.raises(InvalidImageError) as early:
            seeing.stream(ask(said("a"), shown(data)))
        assert early.value.param == "messages[0].content[1].image_url"
    whole = picture(1)
    for data in (whole[: len(whole) // 2], whole.replace(b"IEND", b"IENX")[:-200]):
        with pytest.raises(InvalidImageError) as late:
            list(seeing.stream(ask(shown(whole, "low"), said("?"), shown(data))))
        assert late.value.param == "messages[0].content[2].image_url"
        assert late.value.message.startswith("messages[0].content[2].image_url: the picture")
    assert seeing.process_id == process_id and not seeing.is_busy
    assert ids(list(seeing.stream(good)))


def test_too_many_bytes_are_refused(seeing: Student) -> None:
    heavy = picture(1) + bytes(5 * 2**20)  # what lies behind the end is not looked at
    with pytest.raises(BodyTooLargeError):
        seeing.stream(ask(*[shown(heavy)] * 4))


def test_a_url_that_is_no_base64_is_named(seeing: Student) -> None:
    part = {"type": "image_url", "image_url": {"url": "data:image/png;charset=x,AAAA"}}
    with pytest.raises(InvalidImageError, match=r"messages\[0\]\.content\[0\]\.image_url"):
        seeing.count_prompt_tokens(ask(part))


def test_a_text_student_counts_no_pictures(student: Student) -> None:
    with pytest.raises(LongshoreError, match="takes no images"):
        student.count_prompt_tokens(ask(shown(picture(1))))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"image_token_id": 900_000}, BundleDamagedError),
        ({"hidden_size": 32}, BundleIncompatibleError),
        ({"encoder_file": "model.onnx"}, BundleIncompatibleError),
        ({"encoder_file": "tokenizer.json"}, LongshoreError),
    ],
)
def test_a_bundle_that_contradicts_itself_is_refused(
    bundle_dir: Path, tmp_path: Path, change: dict[str, Any], error: type[LongshoreError]
) -> None:
    make_vision_bundle(bundle_dir, tmp_path / "bundle", **change)
    student = Student(tmp_path / "bundle", settings=DeviceSettings(**SETTINGS))
    try:
        with pytest.raises(error):
            student.start()
    finally:
        student.close()


def test_what_the_sdk_sends_is_what_the_device_takes(seeing: Student) -> None:
    url = data_url(picture(9))
    part = {"type": "image_url", "image_url": {"url": url}}
    assert ids(list(seeing.stream(ask(part, said("?"))))) == ids(
        list(seeing.stream(ask(shown(picture(9)), said("?"))))
    )


_PIECES = st.sampled_from(["Look", " at ", "this", IMAGE, "<|end|>", "", *range(3)])


@pytest.mark.fuzz
@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None
)
@given(talks=st.lists(st.lists(_PIECES, min_size=1, max_size=6), min_size=2, max_size=4))
def test_what_is_reused_never_changes_what_is_seen(seeing: Student, talks: list[list[str | int]]) -> None:
    """Each request is asked after the ones before it, and again after one that shares nothing with it."""
    for pieces in talks:
        parts = [said(piece) if isinstance(piece, str) else shown(picture(piece), "low") for piece in pieces]
        after_others = certainties(seeing, *parts)[0]
        list(seeing.stream(decode_completion_request({"model": "s", "prompt": [1000], "max_tokens": 1})))
        assert math.isclose(certainties(seeing, *parts)[0], after_others, abs_tol=1e-4)
