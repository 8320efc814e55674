"""Prompt text that is part template, part foreign: what people wrote never becomes a control token.

A leaf that the core's workers and the device share; the tokenizer (of the `tokenizers` library) is passed in.
It renders no template. A message that spells `<|end|>` or the like is read as those characters; only the
template can end a turn or begin one.
"""

from __future__ import annotations

import re
import secrets
from typing import Any

__all__ = ["LONG_TEXT_CHARS", "ForeignText", "PromptEncoder"]

LONG_TEXT_CHARS = 32_768
"""Texts above this length take long enough that no event loop should wait for them."""


class ForeignText:
    """Marks the control tokens that are spelt in one prompt's foreign text, until the prompt is encoded.

    The mark is random, so that nothing in a message can forge one.
    """

    def __init__(self, spellings: re.Pattern[str] | None) -> None:
        self._spellings = spellings
        self._mark = f"\U000f0000{secrets.randbits(64)}."
        self._found: list[str] = []

    def guard(self, text: str) -> str:
        """The text with a mark in place of each control token it spells; most texts come back as they are."""
        return text if self._spellings is None else self._spellings.sub(self._note, text)

    def split(self, prompt: str) -> list[str]:
        """The prompt cut at the marks; every second piece is the spelling that stood there."""
        if not self._found:
            return [prompt]
        pieces = re.split(f"{self._mark}([0-9]+);", prompt)
        pieces[1::2] = [self._found[int(number)] for number in pieces[1::2]]
        return pieces

    def _note(self, match: re.Match[str]) -> str:
        self._found.append(match.group())
        return f"{self._mark}{len(self._found) - 1};"


class PromptEncoder:
    """Encodes prompts with one tokenizer; safe to use from several threads."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        special = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
        self._spellings = re.compile("|".join(map(re.escape, special))) if special else None
        self._plain_ids = _plain_ids(tokenizer, special)

    def foreign(self) -> ForeignText:
        """A guard for the foreign text of one prompt."""
        return ForeignText(self._spellings)

    def encode(self, text: str, *, add_special_tokens: bool = False) -> tuple[int, ...]:
        """The token ids of a text that may name control tokens; `add_special_tokens` as the model has it."""
        return tuple(self._ids(text, add_special_tokens))

    def encode_prompt(
        self, prompt: str, foreign: ForeignText, *, add_special_tokens: bool = False
    ) -> tuple[int, ...]:
        """The token ids of a prompt whose foreign parts went through `foreign.guard`."""
        first, *rest = foreign.split(prompt)
        ids = self._ids(first, add_special_tokens)
        for spelling, piece in zip(rest[::2], rest[1::2], strict=True):
            ids += self._plain_ids[spelling]
            ids += self._ids(piece, False)
        return tuple(ids)

    def _ids(self, text: str, add_special_tokens: bool) -> list[int]:
        ids: list[int]
        if len(text) <= LONG_TEXT_CHARS:
            ids = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
            return ids
        # of the tokenizer's calls only the batch ones let other threads run meanwhile
        (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids = encoding.ids
        return ids


def _plain_ids(tokenizer: Any, special: list[str]) -> dict[str, list[int]]:
    """What each control token's spelling is as ordinary text."""
    tokenizer.encode_special_tokens = True
    try:
        return {text: tokenizer.encode(text, add_special_tokens=False).ids for text in special}
    finally:
        tokenizer.encode_special_tokens = False
