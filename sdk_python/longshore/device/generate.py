"""The generation loop in the model process: prefill, then a few tokens at a time, until something ends it.

Keeps what the KV buffer holds, so that the next prompt is computed only from where it differs; of a picture's
tokens, what they show counts, not that they are all one token. Guesses of a proposer are computed together
and kept as far as the sampler draws the same. Knows neither text nor pipes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from longshore.device.encoder import Encoded, JobImage, PictureEncoder, PromptPictures, position_keys
from longshore.device.sampling import SampledToken, Sampler, SamplingSettings
from longshore.device.speculate import DraftLength, Proposer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Ending = Literal["stop", "length", "cancelled"]


class Decoder(Protocol):
    """What the loop needs of a session."""

    max_tokens: int
    vocab_size: int

    def forward(
        self, token_ids: Sequence[int], num_past: int, image_features: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]: ...

    def forward_rows(self, token_ids: Sequence[int], num_past: int) -> NDArray[np.float32]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One answer to generate; `generated` are its tokens so far, `max_tokens` counts them too.

    `images` are the prompt's pictures in order; each has its `num_tokens` image tokens there.
    """

    prompt: tuple[int, ...]
    generated: tuple[int, ...]
    max_tokens: int
    stop_token_ids: tuple[int, ...]
    sampling: SamplingSettings
    images: tuple[JobImage, ...] = ()


@dataclass(frozen=True, slots=True)
class GeneratedToken:
    """A token with its index in the answer, and why it is the last, if it is.

    `encoded` are the pictures that were encoded for it.
    """

    sampled: SampledToken
    offset: int
    ending: Ending | None
    num_cached: int  # prompt tokens that were found in the cache
    encoded: tuple[Encoded, ...] = ()


class Generator:
    """Answers jobs one after another over one session."""

    def __init__(
        self,
        session: Decoder,
        prefill_chunk_tokens: int,
        proposer: Proposer | None = None,
        encoder: PictureEncoder | None = None,
    ) -> None:
        self._session = session
        self._chunk = prefill_chunk_tokens
        self._proposer = proposer
        self._encoder = encoder
        self._image_token_id = encoder.image_token_id if encoder is not None else None
        self._cached: list[int] = []  # what the buffer holds keys and values of, as `position_keys` names it

    def run(
        self,
        job: Job,
        emit: Callable[[GeneratedToken], None],
        is_cancelled: Callable[[], bool],
    ) -> Ending:
        """Generate, telling each token to `emit`; gives why it ended.

        Raises InvalidImageError for a picture that can't be decoded, and is ready for the next job then.
        """
        session, tokens = self._session, [*job.prompt, *job.generated]
        pictures = PromptPictures(job.images, self._encoder)
        sampler = Sampler(job.sampling, session.vocab_size, job.prompt, job.generated, job.stop_token_ids)
        keys = position_keys(tokens, job.images, self._image_token_id)
        num_cached = self._reusable(keys)
        rows = self._prefill(tokens, keys, num_cached, pictures, is_cancelled)
        num_cached_of_prompt = min(num_cached, len(job.prompt))
        limit = min(len(job.prompt) + job.max_tokens, session.max_tokens)
        length, guesses = DraftLength(), list[int]()
        while rows is not None:
            num_before = len(tokens)
            for row, guess in zip(rows, [*guesses, None], strict=True):
                token = sampler.sample(row)
                offset = len(tokens) - len(job.prompt)
                tokens.append(token.token_id)
                ending: Ending | None = "length" if len(tokens) >= limit else None
                if token.token_id in job.stop_token_ids and offset >= job.sampling.min_tokens:
                    ending = "stop"
                emit(GeneratedToken(token, offset, ending, num_cached_of_prompt, pictures.take_encoded()))
                if ending is not None:
                    return ending
                if token.token_id != guess:
                    break
            length.learn(len(guesses), len(tokens) - num_before - 1)
            if is_cancelled():
                break
            guesses = self._guesses(tokens, min(length.num_tokens, limit - len(tokens) - 1))
            rows = self._step([tokens[-1], *guesses], len(tokens) - 1)
        return "cancelled"

    def _reusable(self, keys: list[int]) -> int:
        """How many leading tokens the buffer already holds; the last is computed again, for its logits."""
        shared = 0
        for ours, theirs in zip(self._cached, keys[:-1], strict=False):
            if ours != theirs:
                break
            shared += 1
        return shared

    def _prefill(
        self,
        tokens: list[int],
        keys: list[int],
        num_past: int,
        pictures: PromptPictures,
        is_cancelled: Callable[[], bool],
    ) -> NDArray[np.float32] | None:
        """The last token's logits [1, vocab], or None if it was cancelled on the way."""
        del self._cached[num_past:]
        logits = None
        for begin in range(num_past, len(tokens), self._chunk):
            if is_cancelled():
                return None
            end = min(begin + self._chunk, len(tokens))
            features = self._features(tokens, begin, end, pictures, is_cancelled)
            if is_cancelled():
                return None
            logits = self._session.forward(tokens[begin:end], begin, features)
            self._cached += keys[begin:end]
        return None if logits is None else logits[None]

    def _features(
        self,
        tokens: list[int],
        begin: int,
        end: int,
        pictures: PromptPictures,
        is_cancelled: Callable[[], bool],
    ) -> NDArray[np.float32] | None:
        """The rows of the image tokens from `begin` to `end`; None where there are none."""
        if self._image_token_id is None:
            return None
        num_rows = tokens[begin:end].count(self._image_token_id)
        if num_rows == 0:
            return None
        first = tokens[:begin].count(self._image_token_id)
        return pictures.rows(first, num_rows, is_cancelled)

    def _guesses(self, tokens: list[int], most: int) -> list[int]:
        if self._proposer is None or most < 1:
            return []
        guesses = list(self._proposer.propose(tokens, most))[:most]
        if self._image_token_id in guesses:  # it is never drawn, and without a picture can't be computed
            del guesses[guesses.index(self._image_token_id) :]
        return guesses

    def _step(self, token_ids: list[int], num_past: int) -> NDArray[np.float32]:
        """Logits [tokens, vocab]; what was guessed wrong before is overwritten in the buffer."""
        rows = self._session.forward_rows(token_ids, num_past)
        del self._cached[num_past:]
        self._cached += token_ids
        return rows
