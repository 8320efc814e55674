"""The student on real ONNX Runtime: torch's tokens, exact marks, limits, and an end to every wait."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from longshore.device import Student
from longshore.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    LongshoreError,
    OutOfRangeError,
    PromptTooLongError,
    QueueFullError,
    ResumeUnavailableError,
    UnsupportedParameterError,
)
from longshore.wire import (
    AnswerEvent,
    AnyRequest,
    FinishEvent,
    TokenEvent,
    decode_chat_request,
    decode_completion_request,
)

WAIT_S = 20.0
PROMPT = [7, 300, 41, 555]
LONG: dict[str, Any] = {"prompt": [PROMPT] * 16, "n": 16, "max_tokens": 250, "ignore_eos": True}
SOON_S = 5.0  # LONG's 64,000 tokens take far longer


def chat(content: Any = "What is on the sheet?", **fields: Any) -> AnyRequest:
    return decode_chat_request({"model": "s", "messages": [{"role": "user", "content": content}], **fields})


def complete(prompt: Any = PROMPT, **fields: Any) -> AnyRequest:
    return decode_completion_request({"model": "s", "prompt": prompt, **fields})


def tokens(events: list[AnswerEvent], index: int = 0) -> list[TokenEvent]:
    return [event for event in events if isinstance(event, TokenEvent) and event.index == index]


def ids(events: list[AnswerEvent], index: int = 0) -> list[int]:
    return [event.mark.token_id for event in tokens(events, index)]


def text(events: list[AnswerEvent], index: int = 0) -> str:
    return "".join(event.text for event in events if event.index == index)


def finish(events: list[AnswerEvent]) -> FinishEvent:
    assert isinstance(events[-1], FinishEvent)
    return events[-1]


def until(condition: Callable[[], object]) -> None:
    end_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.002)


@pytest.fixture(scope="module")
def decode(model_dir: Path) -> Callable[[list[int]], str]:
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    return lambda token_ids: tokenizer.decode(token_ids, skip_special_tokens=True)


# -- the answer --------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [[5], PROMPT, list(range(20, 120))])
def test_greedy_tokens_are_torchs(student: Student, model_dir: Path, prompt: list[int]) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    expected = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=64,
        do_sample=False,
        eos_token_id=-1,
        pad_token_id=0,
    )[0, len(prompt) :].tolist()
    events = list(student.stream(complete(prompt, temperature=0, max_tokens=64, ignore_eos=True)))
    assert ids(events) == expected
    assert finish(events).finish_reason == "length"


def test_events_tell_where_each_token_stands(student: Student, decode: Callable[[list[int]], str]) -> None:
    events = list(student.stream(chat(max_tokens=40, seed=5, ignore_eos=True)))
    marks = [event.mark for event in tokens(events)]
    assert [mark.offset for mark in marks] == list(range(40))
    assert {(mark.segment, mark.model_digest) for mark in marks} == {(0, student.manifest.model_digest)}
    num_bytes = 0
    for event in tokens(events):
        assert event.mark.byte_offset == num_bytes
        num_bytes += len(event.text.encode())
    assert text(events) == decode(ids(events))
    usage, report = finish(events).usage, finish(events).report
    assert usage is not None and report is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (
        student.count_prompt_tokens(chat()),
        40,
    )
    assert report.served_by == "device" and report.model_digest == student.manifest.model_digest
    assert report.segments[0].offset == 0 and not report.resumed
    (hop,) = report.hops
    assert hop.ttft_ms is not None and hop.total_ms is not None and 0 < hop.ttft_ms <= hop.total_ms


def force(token_ids: list[int]) -> dict[str, float]:
    """A bias that leaves the model only these tokens to draw."""
    return {str(token_id): 100.0 for token_id in token_ids}


def test_characters_of_several_tokens_come_whole(student: Student, model_dir: Path) -> None:
    """The prompt's byte tokens are drawn in random order, so halves of characters and odd bytes do come."""
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    some = tokenizer.encode("茶🍵é", add_special_tokens=False).ids
    assert len(some) >= 7, "the tokenizer knows these as bytes alone"
    for seed in range(5):
        request = complete(max_tokens=60, seed=seed, logit_bias=force(some), ignore_eos=True, temperature=2)
        events = list(student.stream(request))
        assert set(ids(events)) <= set(some)
        assert text(events) == tokenizer.decode(ids(events))
        num_bytes = 0
        for event in tokens(events):
            assert event.mark.byte_offset == num_bytes
            num_bytes += len(event.text.encode())


def test_an_end_token_ends_the_answer_and_is_no_text(student: Student) -> None:
    (eos,) = student.manifest.eos_token_ids
    events = list(student.stream(complete(logit_bias={str(eos): 100}, min_tokens=3, max_tokens=9, seed=1)))
    assert eos not in ids(events) and len(ids(events)) == 3
    assert finish(events).finish_reason == "stop"
    usage = finish(events).usage
    assert usage is not None and usage.completion_tokens == 3


def test_a_stop_string_cuts_the_answer(student: Student) -> None:
    plain = text(list(student.stream(complete(max_tokens=60, seed=2, ignore_eos=True))))
    stop = plain[20:24]
    events = list(student.stream(complete(max_tokens=60, seed=2, ignore_eos=True, stop=stop)))
    assert text(events) == plain[: plain.index(stop)]
    assert finish(events).finish_reason == "stop"
    usage = finish(events).usage
    assert usage is not None and usage.completion_tokens == len(tokens(events)) < 60


def test_logprobs_are_told_with_bytes(student: Student) -> None:
    request = chat(max_tokens=5, seed=1, logprobs=True, top_logprobs=3, ignore_eos=True)
    for event in tokens(list(student.stream(request))):
        assert event.logprob is not None and event.logprob.logprob <= 0
        assert len(event.logprob.top_logprobs) == 3
        values = [top.logprob for top in event.logprob.top_logprobs]
        assert values == sorted(values, reverse=True)
        assert event.logprob.token == bytes(event.logprob.bytes or ()).decode("utf-8", "replace")


def test_n_choices_differ_and_the_first_is_the_seeds(student: Student) -> None:
    alone = list(student.stream(complete(max_tokens=12, seed=3, ignore_eos=True)))
    events = list(student.stream(complete(max_tokens=12, seed=3, n=3, ignore_eos=True)))
    answers = [ids(events, index) for index in range(3)]
    assert answers[0] == ids(alone) and len({tuple(answer) for answer in answers}) == 3
    ends = [event for event in events if isinstance(event, FinishEvent)]
    assert [end.index for end in ends] == [0, 1, 2] and [end.usage is None for end in ends] == [
        True,
        True,
        False,
    ]


def test_several_prompts_are_answered_in_order(student: Student) -> None:
    both = list(student.stream(complete([PROMPT, [9, 8]], max_tokens=6, temperature=0, ignore_eos=True)))
    for index, prompt in enumerate((PROMPT, [9, 8])):
        alone = list(student.stream(complete(prompt, max_tokens=6, temperature=0, ignore_eos=True)))
        assert ids(both, index) == ids(alone)


def test_a_known_prefix_is_not_computed_again_and_changes_nothing(own_student: Student) -> None:
    prompt = list(range(30, 90))
    cold = list(own_student.stream(complete(prompt, max_tokens=8, temperature=0, ignore_eos=True)))
    warm = list(own_student.stream(complete(prompt, max_tokens=8, temperature=0, ignore_eos=True)))
    assert ids(cold) == ids(warm)
    details = [finish(events).usage.prompt_tokens_details for events in (cold, warm)]  # type: ignore[union-attr]
    assert details[0] is None and details[1] is not None and details[1].cached_tokens == len(prompt) - 1
    other = [*prompt[:20], 3, *prompt[21:]]
    mixed = list(own_student.stream(complete(other, max_tokens=8, temperature=0, ignore_eos=True)))
    own_student.close()
    fresh = Student(own_student._bundle_dir)
    try:
        assert ids(mixed) == ids(
            list(fresh.stream(complete(other, max_tokens=8, temperature=0, ignore_eos=True)))
        )
    finally:
        fresh.close()


# -- going on with an answer -------------------------------------------------------------------


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None
)
@given(
    cut=st.integers(0, 30),
    seed=st.integers(0, 2**63 - 1),
    fields=st.sampled_from(
        [
            {"temperature": 0},
            {"temperature": 1.5, "top_p": 0.9},
            {"frequency_penalty": 1.5, "repetition_penalty": 1.3},
            {"stop": ["e", "##"], "temperature": 2},
            {"min_tokens": 10, "logit_bias": {"1": 8}},
        ]
    ),
)
def test_a_resumed_answer_is_the_undisturbed_one(
    student: Student, cut: int, seed: int, fields: dict[str, Any]
) -> None:
    whole = list(student.stream(complete(max_tokens=30, seed=seed, **fields)))
    told = tokens(whole)[:cut]
    continuation = {
        "token_ids": [event.mark.token_id for event in told],
        "segment": 1,
        "model_digest": student.manifest.model_digest,
    }
    rest = list(
        student.stream(
            complete(max_tokens=30, seed=seed, longshore={"continue_from": continuation}, **fields)
        )
    )
    assert ids(rest) == ids(whole)[cut:]
    assert "".join(event.text for event in told) + text(rest) == text(whole)
    assert [event.mark.byte_offset for event in tokens(rest)] == [
        event.mark.byte_offset for event in tokens(whole)[cut:]
    ]
    assert [event.mark.offset for event in tokens(rest)] == list(range(cut, len(tokens(whole))))
    assert finish(rest).finish_reason == finish(whole).finish_reason
    assert all(event.mark.segment == 1 for event in tokens(rest))


def test_another_models_answer_goes_on_from_its_text(student: Student) -> None:
    begun = "The lamp costs é"
    continuation = {"token_ids": [1, 2, 3], "text": begun, "segment": 2, "model_digest": "f" * 32}
    events = list(
        student.stream(
            chat(
                "Hi", max_tokens=10, temperature=0, ignore_eos=True, longshore={"continue_from": continuation}
            )
        )
    )
    assert [event.mark.offset for event in tokens(events)] == list(range(3, 10))
    assert tokens(events)[0].mark.byte_offset == len(begun.encode())
    whole = complete("<|user|>Hi<|end|><|assistant|>" + begun, max_tokens=7, temperature=0, ignore_eos=True)
    assert ids(events) == ids(list(student.stream(whole)))
    report = finish(events).report
    assert report is not None and report.resumed and report.segments[0].offset == 3
    with pytest.raises(ResumeUnavailableError):
        student.stream(chat("Hi", longshore={"continue_from": continuation | {"text": ""}}))


# -- refusals ----------------------------------------------------------------------------------


def test_what_this_model_can_not_do_is_refused(student: Student) -> None:
    image = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]
    with pytest.raises(UnsupportedParameterError) as caught:
        student.stream(chat(image))
    assert caught.value.param == "messages[0].content"
    with pytest.raises(PromptTooLongError):
        student.stream(complete(list(range(256))))
    with pytest.raises(OutOfRangeError):
        student.stream(complete([5, 1024]))
    with pytest.raises(OutOfRangeError):
        student.stream(complete(logit_bias={"1024": 1}))
    with pytest.raises(InvalidRequestError):
        student.stream(complete(min_tokens=5, max_tokens=4))
    with pytest.raises(InvalidRequestError):
        student.stream(complete(""))
    assert len(ids(list(student.stream(complete(max_tokens=3, ignore_eos=True))))) == 3


def test_the_context_ends_an_answer(student: Student) -> None:
    events = list(student.stream(complete(list(range(200)), max_tokens=10_000, ignore_eos=True)))
    assert len(ids(events)) == 56 and finish(events).finish_reason == "length"


def test_a_passed_deadline_is_a_typed_error(student: Student) -> None:
    with pytest.raises(DeadlineExceededError) as caught:
        list(student.stream(complete(), deadline_s=time.monotonic()))
    assert caught.value.tokens_delivered == 0
    assert ids(list(student.stream(complete(max_tokens=2, ignore_eos=True))))


def test_a_deadline_ends_an_answer_midway(student: Student) -> None:
    events = student.stream(complete(max_tokens=250, ignore_eos=True), deadline_s=time.monotonic() + 0.3)
    next(events)
    time.sleep(0.35)
    with pytest.raises(DeadlineExceededError) as caught:
        list(events)
    assert caught.value.tokens_delivered == 1
    assert not student.is_busy


# -- one at a time -----------------------------------------------------------------------------


def busy(student: Student) -> Iterator[AnswerEvent]:
    """Several answers, so that the session stays taken while they are not read."""
    events = student.stream(complete(max_tokens=4, n=2, ignore_eos=True))
    next(events)
    assert student.is_busy
    return events


def test_the_line_is_bounded(own_student: Student) -> None:
    first = busy(own_student)
    answers: list[list[AnswerEvent]] = []
    threads = [
        threading.Thread(target=lambda: answers.append(list(own_student.stream(complete(max_tokens=3)))))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    until(lambda: own_student.num_waiting == 2)
    with pytest.raises(QueueFullError):
        list(own_student.stream(complete()))
    list(first)
    for thread in threads:
        thread.join(WAIT_S)
    assert len(answers) == 2 and own_student.num_waiting == 0 and not own_student.is_busy


def test_closing_the_iterator_frees_the_session(student: Student) -> None:
    first = student.stream(complete(**LONG))
    next(first)
    begin_s = time.monotonic()
    first.close()
    assert not student.is_busy
    assert len(ids(list(student.stream(complete(max_tokens=2, ignore_eos=True))))) == 2
    assert time.monotonic() - begin_s < SOON_S


def test_an_answer_that_is_not_read_holds_nobody_up(student: Student) -> None:
    unread = student.stream(complete(max_tokens=5, ignore_eos=True))
    next(unread)
    until(lambda: not student.is_busy)
    other = list(student.stream(complete(max_tokens=5, ignore_eos=True)))
    assert len(ids(other)) == 5
    assert len(tokens(list(unread))) == 4, "and it can still be read to its end"


async def test_async_answers_are_the_same(student: Student) -> None:
    request = complete(max_tokens=20, seed=4, ignore_eos=True)
    events = [event async for event in student.astream(request)]
    assert ids(events) == ids(list(student.stream(request)))
    with pytest.raises(PromptTooLongError):
        async for _ in student.astream(complete(list(range(256)))):
            pass


async def test_cancelling_a_task_frees_the_session(own_student: Student) -> None:
    async def read() -> None:
        async for _ in own_student.astream(complete(**LONG)):
            started.set()

    started = asyncio.Event()
    first, second = asyncio.create_task(read()), None
    await asyncio.wait_for(started.wait(), WAIT_S)
    second = asyncio.create_task(read())
    await asyncio.to_thread(until, lambda: own_student.num_waiting == 1)
    begin_s = time.monotonic()
    second.cancel()
    await asyncio.to_thread(until, lambda: own_student.num_waiting == 0)
    first.cancel()
    await asyncio.to_thread(until, lambda: not own_student.is_busy)
    assert time.monotonic() - begin_s < SOON_S
    await asyncio.gather(first, second, return_exceptions=True)


async def test_many_at_once_each_get_their_own_answer(student: Student) -> None:
    requests = [
        complete([20 + number, 300], max_tokens=10, temperature=0, ignore_eos=True) for number in range(8)
    ]

    async def ask(request: AnyRequest) -> list[int]:
        return ids([event async for event in student.astream(request)])

    answers = await asyncio.gather(*map(ask, requests))
    for request, answer in zip(requests, answers, strict=True):
        assert answer == ids(list(student.stream(request)))


SOME_FIELDS = {
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0.01, 1),
    "top_k": st.integers(0, 2000),
    "min_p": st.floats(0, 1),
    "max_tokens": st.integers(1, 20),
    "min_tokens": st.integers(0, 20),
    "n": st.integers(1, 2),
    "stop": st.lists(st.text(min_size=1, max_size=3), max_size=3),
    "repetition_penalty": st.floats(0.01, 2),
    "presence_penalty": st.floats(-2, 2),
    "logit_bias": st.dictionaries(st.integers(0, 1100).map(str), st.floats(-100, 100), max_size=3),
    "logprobs": st.integers(0, 20),
    "seed": st.integers(-(2**63), 2**63 - 1),
}


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None
)
@given(prompt=st.text(min_size=1, max_size=20), fields=st.fixed_dictionaries({}, optional=SOME_FIELDS))
def test_any_request_is_answered_or_refused(student: Student, prompt: str, fields: dict[str, Any]) -> None:
    try:
        events = list(student.stream(complete(prompt, **fields)))
    except LongshoreError as error:
        assert isinstance(error, InvalidRequestError)
        return
    ends = [event for event in events if isinstance(event, FinishEvent)]
    assert len(ends) == fields.get("n", 1) and ends[-1].usage is not None
    for index in range(len(ends)):
        assert len(tokens(events, index)) <= fields.get("max_tokens", 16)
        assert not any(stop in text(events, index) for stop in fields.get("stop", ()))
    assert all(a.index <= b.index for a, b in itertools.pairwise(events))
