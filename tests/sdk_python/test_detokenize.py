"""Incremental text: any cut of the bytes into tokens gives the same text, and no stop string leaks."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from longshore.detokenize import IncrementalText
from wire_strategies import cuts

pytestmark = pytest.mark.fuzz

TEXTS = st.text(
    st.sampled_from("ab \n\N{GRINNING FACE}é日\N{COMBINING ACUTE ACCENT}\N{REPLACEMENT CHARACTER}"),
    max_size=30,
)
STOPS = st.lists(st.text("ab \N{GRINNING FACE}é", min_size=1, max_size=4), max_size=3)
BYTES = TEXTS.map(str.encode) | st.binary(max_size=60) | st.integers(0, 120).map(lambda n: b"\x80" * n)


class Vocabulary:
    """Token ids for pieces of bytes, decoded as byte-level tokenizers do."""

    def __init__(self, pieces: list[bytes]) -> None:
        self.pieces = pieces
        self.longest_call = 0

    def decode(self, token_ids: list[int]) -> str:
        self.longest_call = max(self.longest_call, len(token_ids))
        return b"".join(self.pieces[token_id] for token_id in token_ids).decode(errors="replace")


def run(pieces: list[bytes], stops: list[str]) -> tuple[str, bool, Vocabulary]:
    """All text of pushes and flush, with every piece's place checked on the way."""
    vocabulary = Vocabulary(pieces)
    text = IncrementalText(vocabulary.decode, stops)
    answer = ""
    for token_id in range(len(pieces)):
        piece = text.push(token_id)
        assert piece.byte_offset == len(answer.encode())
        answer += piece.text
        assert text.num_bytes == len(answer.encode())
        assert piece.stopped == text.stopped
    tail = text.flush()
    assert tail.byte_offset == len(answer.encode())
    assert text.flush().text == ""
    return answer + tail.text, text.stopped, vocabulary


def cut_at_stop(whole: str, stops: list[str]) -> tuple[str, bool]:
    """Letter by letter: the answer ends where a stop string is complete for the first time."""
    for end in range(1, len(whole) + 1):
        begins = [end - len(stop) for stop in stops if whole[:end].endswith(stop)]
        if begins:
            return whole[: min(begins)], True
    return whole, False


@given(st.data(), BYTES, STOPS)
@example(None, b"abc", ["abc", "b"])
@example(None, "a\N{GRINNING FACE}b".encode(), ["\N{GRINNING FACE}b"])
def test_any_cut_gives_the_same_text(data: st.DataObject | None, whole: bytes, stops: list[str]) -> None:
    expected = cut_at_stop(whole.decode(errors="replace"), stops)
    ways = [[whole], [whole[i : i + 1] for i in range(len(whole))]]
    if data is not None:
        ways.append(data.draw(cuts(whole)))
    for pieces in ways:
        answer, stopped, _ = run(pieces, stops)
        assert (answer, stopped) == expected
        assert not any(stop in answer for stop in stops)


@given(BYTES)
def test_the_window_stays_small(whole: bytes) -> None:
    pieces = [whole[i : i + 1] for i in range(len(whole))] * 3
    assert run(pieces, [])[2].longest_call <= 40


def test_text_comes_as_soon_as_it_is_sure() -> None:
    text = IncrementalText(
        Vocabulary(["é".encode()[:1], "é".encode()[1:], b"ST", b"OP", b"STO", b"x"]).decode, ["STOP"]
    )
    assert [text.push(token_id) for token_id in (0, 1, 2, 5, 4, 5)] == [
        ("", 0, False),
        ("é", 0, False),
        ("", 2, False),
        ("STx", 2, False),
        ("", 5, False),
        ("STOx", 5, False),
    ]


def test_nothing_comes_after_a_stop() -> None:
    text = IncrementalText(Vocabulary([b"a STOP b", b"c"]).decode, ["STOP"])
    assert text.push(0) == ("a ", 0, True)
    assert text.push(1) == ("", 2, True)
    assert text.flush() == ("", 2, True)


@given(st.data(), BYTES, STOPS)
def test_an_answer_goes_on_where_another_reader_stopped(
    data: st.DataObject, whole: bytes, stops: list[str]
) -> None:
    pieces = data.draw(cuts(whole))
    at = data.draw(st.integers(0, len(pieces)))
    vocabulary = Vocabulary(pieces)
    text = IncrementalText(vocabulary.decode, stops)
    answer = text.prime(range(at))
    for token_id in range(at, len(pieces)):
        answer += text.push(token_id).text
    assert answer + text.flush().text == run(pieces, stops)[0]
