"""Events to chunks and back: a reader gets the events that were rendered, and never a false end."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longshore import wire
from longshore.errors import AnswerInterruptedError, ProtocolError
from longshore.wire import (
    AnswerCollector,
    ChatRenderer,
    ChunkReader,
    CompletionRenderer,
    FinishEvent,
    TokenEvent,
)
from wire_strategies import TEXT, any_json, instances

pytestmark = pytest.mark.fuzz

FRAME = {"request_id": "0" * 32, "model": "m", "created": 1}
MARK = wire.TokenMark(segment=0, offset=0, token_id=5, byte_offset=0, model_digest="0" * 16)
REPORT = wire.Report("0" * 32, "core", "node", "0" * 16)


@st.composite
def answers(draw: st.DrawFn) -> tuple[int, list[wire.AnswerEvent]]:
    """The events of an answer of one to three choices, interleaved as a server would."""
    num_choices = draw(st.integers(1, 3))
    queues: list[list[wire.AnswerEvent]] = []
    for index in range(num_choices):
        tokens = draw(st.lists(instances(TokenEvent), max_size=4))
        queue: list[wire.AnswerEvent] = [dataclasses.replace(token, index=index) for token in tokens]
        queues.append([*queue, FinishEvent(draw(st.sampled_from(["stop", "length"])), index, draw(TEXT))])
    events: list[wire.AnswerEvent] = []
    while any(queues):
        queue = draw(st.sampled_from([queue for queue in queues if queue]))
        events.append(queue.pop(0))
    last = events.pop()
    assert isinstance(last, FinishEvent)
    usage, report = draw(instances(wire.Usage)), draw(instances(wire.Report))
    return num_choices, [*events, dataclasses.replace(last, usage=usage, report=report)]


def rendered(renderer: Any, events: list[wire.AnswerEvent]) -> list[dict[str, Any]]:
    chunks = [chunk for event in events for chunk in renderer.chunks(event)]
    return [wire.load_json(wire.dump_json(chunk)) for chunk in chunks]


@given(answers(), st.booleans())
def test_chat_chunks_are_read_back_as_the_same_events(answer: Any, include_usage: bool) -> None:
    num_choices, events = answer
    chunks = rendered(ChatRenderer(**FRAME, num_choices=num_choices, include_usage=include_usage), events)
    reader = ChunkReader(num_choices)
    assert [event for chunk in chunks for event in reader.read(chunk)] == events
    reader.finish()
    for chunk in chunks:
        wire.decode_chat_chunk(chunk)
    if include_usage:
        assert chunks[-1]["choices"] == []
        assert wire.decode(wire.Usage, chunks[-1]["usage"]) == events[-1].usage  # type: ignore[union-attr]
    roles = [choice["index"] for chunk in chunks for choice in chunk["choices"] if "role" in choice["delta"]]
    assert sorted(roles) == list(range(num_choices))


@given(answers())
def test_completion_chunks_keep_all_but_the_bytes_of_log_probabilities(answer: Any) -> None:
    num_choices, events = answer
    reader = ChunkReader(num_choices)
    chunks = rendered(CompletionRenderer(**FRAME, num_choices=num_choices), events)
    read = [event for chunk in chunks for event in reader.read(chunk)]
    reader.finish()
    assert [plain(event) for event in read] == [plain(event) for event in events]
    for before, after in zip(events, read, strict=True):
        if isinstance(before, TokenEvent) and before.logprob is not None:
            assert isinstance(after, TokenEvent)
            assert after.logprob is not None
            assert (after.logprob.token, after.logprob.logprob) == (
                before.logprob.token,
                before.logprob.logprob,
            )


def plain(event: wire.AnswerEvent) -> wire.AnswerEvent:
    return dataclasses.replace(event, logprob=None) if isinstance(event, TokenEvent) else event


@given(answers(), st.data())
def test_a_stream_that_stops_anywhere_before_the_end_is_interrupted(answer: Any, data: st.DataObject) -> None:
    num_choices, events = answer
    chunks = rendered(ChatRenderer(**FRAME, num_choices=num_choices), events)
    at = data.draw(st.integers(0, len(chunks) - 1))
    reader = ChunkReader(num_choices)
    num_tokens = sum(isinstance(event, TokenEvent) for chunk in chunks[:at] for event in reader.read(chunk))
    with pytest.raises(AnswerInterruptedError) as caught:
        reader.finish()
    assert caught.value.tokens_delivered == num_tokens == reader.num_tokens


@given(answers())
def test_a_whole_answer_is_its_events_put_together(answer: Any) -> None:
    num_choices, events = answer
    collector = AnswerCollector(num_choices)
    for event in events[:-1]:
        collector.add(event)
    with pytest.raises(AnswerInterruptedError):
        collector.chat_completion(**FRAME)
    collector.add(events[-1])
    whole = collector.chat_completion(**FRAME)
    assert [choice.message.content for choice in whole.choices] == [
        "".join(event.text for event in events if event.index == index) for index in range(num_choices)
    ]
    assert whole.longshore == events[-1].report  # type: ignore[union-attr]
    assert wire.decode_chat_completion(wire.load_json(wire.dump_json(wire.encode(whole)))) == whole
    completion = collector.completion(**FRAME)
    assert [choice.text for choice in completion.choices] == [
        choice.message.content for choice in whole.choices
    ]


@pytest.mark.parametrize("index", [0, 1, 7])
def test_events_that_were_not_expected(index: int) -> None:
    collector = AnswerCollector(1)
    collector.add(FinishEvent("stop"))
    with pytest.raises(ProtocolError):
        collector.add(TokenEvent(MARK, "x", index))


@pytest.mark.parametrize(
    "choice",
    [
        {"index": 0, "delta": {"content": 5}},
        {"index": True, "delta": {"content": "x"}},
        {"index": 1, "delta": {"content": "x"}},
        {"index": [], "delta": {}},
        {"index": 0, "delta": None},
        {"index": 0, "delta": {}, "finish_reason": "because"},
        {"index": 0, "text": "x", "logprobs": {"tokens": ["x"]}},
        {"index": 0, "text": "x", "logprobs": {"tokens": ["x"], "token_logprobs": [0.0], "top_logprobs": 5}},
        {"index": 0, "delta": {"content": "x"}, "logprobs": {"content": 5}},
        {"index": 0, "delta": {"content": "x"}, "logprobs": 5},
        {},
        None,
    ],
)
def test_chunks_that_break_the_rules(choice: Any) -> None:
    chunk = {"choices": [choice], "longshore": {"mark": wire.encode(MARK)}}
    with pytest.raises(ProtocolError):
        ChunkReader(2 if choice and choice.get("index") is True else 1).read(chunk)


def test_text_without_a_mark_is_refused_and_nothing_after_the_end_is_taken() -> None:
    reader = ChunkReader()
    with pytest.raises(ProtocolError, match="mark"):
        reader.read({"choices": [{"index": 0, "delta": {"content": "x"}}]})
    reader.read({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    assert reader.is_finished
    with pytest.raises(ProtocolError):
        reader.read({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})


@given(any_json(), any_json())
def test_any_chunk(choices: Any, extension: Any) -> None:
    for chunk in (
        choices,
        {"choices": choices},
        {"choices": [{"index": 0, "delta": choices}], "longshore": extension},
    ):
        try:
            events = ChunkReader().read(chunk)
        except ProtocolError:
            continue
        assert all(isinstance(event.text, str) for event in events)
