"""The generation loop in the model process: prefill, then one token at a time, until something ends it.

Keeps what the KV buffer holds, so that the next prompt is computed only from where it differs. Knows neither
text nor pipes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from longshore.device.sampling import SampledToken, Sampler, SamplingSettings

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Ending = Literal["stop", "length", "cancelled"]


class Decoder(Protocol):
    """What the loop needs of a session."""

    max_tokens: int
    vocab_size: int

    def forward(self, token_ids: Sequence[int], num_past: int) -> NDArray[np.float32]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One answer to generate; `generated` are its tokens so far, `max_tokens` counts them too."""

    prompt: tuple[int, ...]
    generated: tuple[int, ...]
    max_tokens: int
    stop_token_ids: tuple[int, ...]
    sampling: SamplingSettings


@dataclass(frozen=True, slots=True)
class GeneratedToken:
    """A token with its index in the answer, and why it is the last, if it is."""

    sampled: SampledToken
    offset: int
    ending: Ending | None
    num_cached: int  # prompt tokens that were found in the cache


class Generator:
    """Answers jobs one after another over one session."""

    def __init__(self, session: Decoder, prefill_chunk_tokens: int) -> None:
        self._session = session
        self._chunk = prefill_chunk_tokens
        self._cached: list[int] = []  # the tokens whose keys and values the buffer holds

    def run(
        self,
        job: Job,
        emit: Callable[[GeneratedToken], None],
        is_cancelled: Callable[[], bool],
    ) -> Ending:
        """Generate, telling each token to `emit`; gives why it ended."""
        session, tokens = self._session, [*job.prompt, *job.generated]
        sampler = Sampler(job.sampling, session.vocab_size, job.prompt, job.generated, job.stop_token_ids)
        num_cached = self._reusable(tokens)
        logits = self._prefill(tokens, num_cached, is_cancelled)
        num_cached_of_prompt = min(num_cached, len(job.prompt))
        limit = min(len(job.prompt) + job.max_tokens, session.max_tokens)
        while logits is not None:
            token = sampler.sample(logits)
            offset = len(tokens) - len(job.prompt)
            tokens.append(token.token_id)
            ending: Ending | None = "length" if len(tokens) >= limit else None
            if token.token_id in job.stop_token_ids and offset >= job.sampling.min_tokens:
                ending = "stop"
            emit(GeneratedToken(token, offset, ending, num_cached_of_prompt))
            if ending is not None:
                return ending
            logits = None if is_cancelled() else self._step(token.token_id)
        return "cancelled"

    def _reusable(self, tokens: list[int]) -> int:
        """How many leading tokens the buffer already holds; the last is computed again, for its logits."""
        shared = 0
        for ours, theirs in zip(self._cached, tokens[:-1], strict=False):
            if ours != theirs:
                break
            shared += 1
        return shared

    def _prefill(
        self, tokens: list[int], num_past: int, is_cancelled: Callable[[], bool]
    ) -> NDArray[np.float32] | None:
        """The last token's logits, or None if it was cancelled on the way."""
        del self._cached[num_past:]
        logits = None
        for begin in range(num_past, len(tokens), self._chunk):
            if is_cancelled():
                return None
            part = tokens[begin : begin + self._chunk]
            logits = self._session.forward(part, begin)
            self._cached += part
        return logits

    def _step(self, token_id: int) -> NDArray[np.float32]:
        logits = self._session.forward([token_id], len(self._cached))
        self._cached.append(token_id)
        return logits
