"""Token ids to text, one at a time: never half a character, never part of a stop string.

A leaf that the core's workers and the device share; the tokenizer's `decode` is passed in, and
nothing here knows one. The text of all pushes and the flush together is `decode(all ids)`, cut
where the first stop string begins; the first is the one that is complete first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

__all__ = ["IncrementalText", "Piece"]

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_MAX_WINDOW = 16  # tokens; a UTF-8 character spans at most four


class Piece(NamedTuple):
    """What a token made readable: `text` begins at `byte_offset` of the UTF-8 answer."""

    text: str
    byte_offset: int
    stopped: bool


class IncrementalText:
    """Detokenizer of one answer.

    `decode` maps token ids to text and must replace invalid UTF-8 by U+FFFD, one for each
    maximal subpart (Unicode 15, section 3.9), as byte-level tokenizers do.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop_strings: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stop_strings = tuple(stop_strings)
        self._max_held_chars = max((len(stop) for stop in self._stop_strings), default=1) - 1
        self._window: list[int] = []  # a few settled tokens as context, then the unsettled ones
        self._num_context = 0
        self._window_text = ""  # the text of the window that was passed on already
        self._held = ""
        self._num_bytes = 0
        self._stopped = False

    @property
    def num_bytes(self) -> int:
        """Bytes of UTF-8 text passed on so far."""
        return self._num_bytes

    @property
    def stopped(self) -> bool:
        """True once a stop string was met; nothing is passed on after it."""
        return self._stopped

    def push(self, token_id: int) -> Piece:
        """Take one token; the piece's text may be empty."""
        return self._pass_on(self._settle(token_id))

    def prime(self, token_ids: Iterable[int]) -> str:
        """Take the tokens of an answer begun elsewhere; the text that had been passed on by then."""
        return "".join(self.push(token_id).text for token_id in token_ids)

    def flush(self) -> Piece:
        """The end of the answer: what was held back and is answer after all."""
        rest = self._decode(self._window)[len(self._window_text) :] if self._window else ""
        self._window, self._num_context, self._window_text = [], 0, ""
        piece = self._pass_on(rest)
        if self._stopped or not self._held:
            return piece
        tail, self._held = self._held, ""
        self._num_bytes += len(tail.encode())
        return Piece(piece.text + tail, piece.byte_offset, stopped=False)

    def _settle(self, token_id: int) -> str:
        """Text that later tokens can't change any more."""
        self._window.append(token_id)
        text = self._decode(self._window)
        unfinished = text.endswith(_REPLACEMENT)
        stable = text[:-1] if unfinished else text
        fresh = stable[len(self._window_text) :]
        self._window_text = max(self._window_text, stable, key=len)
        if not unfinished:
            self._forget_before(self._num_context)
            self._num_context = len(self._window)
        elif len(self._window) > _MAX_WINDOW:
            self._cut(text)
        return fresh

    def _forget_before(self, index: int) -> None:
        """Drop the oldest tokens; those that stay give the tokenizer its context for spaces."""
        if index == 0:
            return
        kept = self._window[index:]
        self._window, self._window_text = kept, self._decode(kept)

    def _cut(self, text: str) -> None:
        """Bound the window of a long run of invalid bytes where no character is cut in two."""
        for index in range(len(self._window) - 4, 0, -1):
            kept = self._window[index:]
            kept_text = self._decode(kept)
            if self._decode(self._window[:index]) + kept_text == text:
                self._window, self._num_context = kept, 0
                self._window_text = kept_text[:-1]
                return

    def _pass_on(self, fresh: str) -> Piece:
        offset = self._num_bytes
        if self._stopped:
            return Piece("", offset, stopped=True)
        text = self._held + fresh
        cut = self._first_stop(text)
        if cut is not None:
            text, self._held, self._stopped = text[:cut], "", True
        else:
            kept = self._num_held_chars(text)
            text, self._held = text[: len(text) - kept], text[len(text) - kept :]
        self._num_bytes += len(text.encode())
        return Piece(text, offset, self._stopped)

    def _first_stop(self, text: str) -> int | None:
        """Where the stop string begins that is complete first, whichever way the tokens were cut."""
        found = [(at + len(stop), at) for stop in self._stop_strings if (at := text.find(stop)) >= 0]
        return min(found)[1] if found else None

    def _num_held_chars(self, text: str) -> int:
        """Length of the longest end of `text` that may turn out to begin a stop string."""
        for length in range(min(self._max_held_chars, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop_strings):
                return length
        return 0
