"""Guesses at the next tokens, which the model then checks together: prompt lookup, or a smaller model.

A guess never decides anything: a token is kept only where the sampler, with its own draw for that position,
takes the same one. Several rows cost far less than as many steps, which is all there is to win.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from longshore.device.generate import Decoder

LONGEST_MATCH = 4
SHORTEST_MATCH = 2
MAX_GUESSES = 8
FIRST_GUESSES = 4


class Proposer(Protocol):
    """Guesses what comes after `tokens`: at most `most` token ids, or none."""

    def propose(self, tokens: Sequence[int], most: int) -> Sequence[int]: ...


class PromptLookup:
    """What followed the last time that the latest few tokens stood in prompt or answer.

    Saxena, "Prompt Lookup Decoding", 2023. The index of n-grams grows with the answer, so a guess costs no
    search.
    """

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}  # n-gram -> index after its latest place but the end

    def propose(self, tokens: Sequence[int], most: int) -> Sequence[int]:
        self._follow(tokens)
        for size in range(LONGEST_MATCH, SHORTEST_MATCH - 1, -1):
            begin = self._ends.get(tuple(self._tokens[-size:]))
            if begin is not None:
                return self._tokens[begin : begin + most]
        return ()

    def _follow(self, tokens: Sequence[int]) -> None:
        """Bring the index up to all n-grams that something follows."""
        known = len(self._tokens)
        if self._tokens != tokens[:known]:  # another prompt
            known, self._ends = 0, {}
            self._tokens = []
        self._tokens += tokens[known:]
        for end in range(max(known, 1), len(self._tokens)):
            for size in range(SHORTEST_MATCH, min(LONGEST_MATCH, end) + 1):
                self._ends[tuple(self._tokens[end - size : end])] = end


class DraftModel:
    """A smaller model of the same vocabulary guesses greedily; it keeps a cache of its own."""

    def __init__(self, session: Decoder) -> None:
        self._session = session
        self._cached: list[int] = []

    def propose(self, tokens: Sequence[int], most: int) -> Sequence[int]:
        most = min(most, self._session.max_tokens - len(tokens))
        if most < 1:
            return ()
        shared = 0
        for ours, theirs in zip(self._cached, tokens[:-1], strict=False):
            if ours != theirs:
                break
            shared += 1
        whole, guesses = list(tokens), []
        logits = self._session.forward(whole[shared:], shared)
        for number in range(most):
            guesses.append(int(logits.argmax()))
            if number + 1 < most:
                logits = self._session.forward(guesses[-1:], len(whole) + number)
        self._cached = whole + guesses[:-1]
        return guesses


class DraftLength:
    """How many tokens to guess: twice as many after a hit of all, as many as hit and one after a miss."""

    def __init__(self) -> None:
        self.num_tokens = FIRST_GUESSES

    def learn(self, num_guessed: int, num_right: int) -> None:
        """Take in how one round of guesses went; nothing is learnt from none."""
        if num_guessed == 0:
            return
        if num_right >= num_guessed:
            self.num_tokens = min(2 * self.num_tokens, MAX_GUESSES)
        else:
            self.num_tokens = min(num_right + 1, MAX_GUESSES)
