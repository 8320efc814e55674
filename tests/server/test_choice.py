"""One choice: tokens of the engine in, events out, for any text, any stop string and any cut."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from longshore.wire import FinishEvent, TokenEvent
from longshore_server.choice import Choice, Seam
from longshore_server.engines.base import EngineToken, FinishReason
from longshore_server.text import ModelText
from shop.tokenizer import FOLDER

TEXT = ModelText.load(FOLDER)
END_ID = 1
DIGEST = "ab" * 32


def _tokens(ids: list[int], reason: FinishReason, begin: int = 0) -> list[EngineToken]:
    tokens = [EngineToken(token_id, begin + index) for index, token_id in enumerate(ids)]
    if reason == "stop":
        return [*tokens, EngineToken(END_ID, begin + len(ids), finish_reason="stop")]
    return [*tokens[:-1], EngineToken(tokens[-1].token_id, tokens[-1].offset, finish_reason="length")]


def _events(choice: Choice, tokens: list[EngineToken]) -> list[TokenEvent | FinishEvent]:
    events: list[TokenEvent | FinishEvent] = []
    for token in tokens:
        if choice.finish_reason is None and (event := choice.take(token)) is not None:
            events.append(event)
    return [*events, choice.finish()]


def _text(events: list[TokenEvent | FinishEvent]) -> str:
    return "".join(event.text for event in events)


ids = st.lists(st.integers(20, 1000), min_size=1, max_size=30)


@given(ids, st.sampled_from(["stop", "length"]))
def test_the_text_of_the_events_is_the_decoded_answer(token_ids: list[int], reason: FinishReason) -> None:
    choice = Choice(2, TEXT, model_digest=DIGEST)
    events = _events(choice, _tokens(token_ids, reason))
    assert _text(events) == TEXT.decode(token_ids)
    assert choice.num_tokens == len(token_ids), "a stop token is no token of the answer"
    assert isinstance(events[-1], FinishEvent)
    assert events[-1].finish_reason == reason
    num_bytes = 0
    for offset, event in enumerate(events[:-1]):
        assert isinstance(event, TokenEvent)
        assert (event.index, event.mark.offset, event.mark.byte_offset) == (2, offset, num_bytes)
        num_bytes += len(event.text.encode())


@given(ids, st.data())
def test_a_choice_continued_at_any_cut_gives_the_rest(token_ids: list[int], data: st.DataObject) -> None:
    answer = TEXT.decode(token_ids)
    begin = data.draw(st.integers(0, max(len(answer) - 1, 0)))
    stop = data.draw(st.sampled_from([answer[begin : begin + 3] or "x", "never"]))
    cut = data.draw(st.integers(0, len(token_ids)))
    whole = _events(Choice(0, TEXT, model_digest=DIGEST, stop_strings=(stop,)), _tokens(token_ids, "stop"))
    before = [event for event in whole[:-1][:cut] if isinstance(event, TokenEvent)]
    cut = len(before)
    seam = Seam(1, tuple(event.mark.token_id for event in before))
    rest = _events(
        Choice(0, TEXT, model_digest=DIGEST, stop_strings=(stop,), seam=seam),
        _tokens(token_ids[cut:], "stop", cut),
    )
    assert [event.text for event in [*before, *rest]] == [event.text for event in whole]
    assert isinstance(rest[-1], FinishEvent)
    assert isinstance(whole[-1], FinishEvent)
    assert rest[-1].finish_reason == whole[-1].finish_reason
    assert _text(whole) == (answer.split(stop)[0])
