"""One choice of an answer: engine tokens in, events with text, marks and log-probabilities out. No I/O."""

from __future__ import annotations

from dataclasses import dataclass

from longshore.wire import FinishEvent, FinishReason, Report, TokenEvent, TokenMark, Usage
from longshore_server.engines.base import EngineToken
from longshore_server.text import ModelText


@dataclass(frozen=True, slots=True)
class Seam:
    """Where the events of this tier begin: 0 everywhere unless the answer began elsewhere.

    `token_ids` are the answer's tokens so far of the same model, which the engine counts in itself;
    `offset` and `byte_offset` are what other models gave.
    """

    segment: int = 0
    token_ids: tuple[int, ...] = ()
    offset: int = 0
    byte_offset: int = 0


class Choice:
    """Follows one choice from its first token to its end."""

    def __init__(
        self,
        index: int,
        text: ModelText,
        *,
        model_digest: str,
        stop_strings: tuple[str, ...] = (),
        num_logprobs: int | None = None,
        seam: Seam = Seam(),
    ) -> None:
        self.index = index
        self.finish_reason: FinishReason | None = None
        self.num_tokens = seam.offset + len(seam.token_ids)
        self._text = text
        self._model_digest = model_digest
        self._num_logprobs = num_logprobs
        self._seam = seam
        self._pieces = text.incremental(stop_strings)
        self._pieces.prime(seam.token_ids)
        if self._pieces.stopped:  # the answer was whole; only its end got lost
            self.finish_reason = "stop"

    def take(self, token: EngineToken) -> TokenEvent | None:
        """The event of a token; None for one that is no part of the text. May set `finish_reason`."""
        self.finish_reason = token.finish_reason
        if token.token_id is None or token.finish_reason == "stop":
            return None  # a stop token ends the answer and is not in it
        piece = self._pieces.push(token.token_id)
        if piece.stopped:
            self.finish_reason = "stop"
        offset = self._seam.offset + token.offset
        self.num_tokens = offset + 1
        mark = TokenMark(
            self._seam.segment,
            offset,
            token.token_id,
            self._seam.byte_offset + piece.byte_offset,
            self._model_digest,
        )
        logprob = None
        if self._num_logprobs is not None and token.logprob is not None:
            logprob = self._text.logprob(
                token.token_id, token.logprob, token.top_logprobs, self._num_logprobs
            )
        return TokenEvent(mark, piece.text, self.index, logprob)

    def finish(self, usage: Usage | None = None, report: Report | None = None) -> FinishEvent:
        """The end, with the text that was held back and is answer after all."""
        assert self.finish_reason is not None
        return FinishEvent(self.finish_reason, self.index, self._pieces.flush().text, usage, report)
