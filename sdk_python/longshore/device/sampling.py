"""Chooses the next token of one answer, by the same definition as the core's sampler, in numpy.

Penalties, bias, temperature, min-p, top-k, top-p, draw, log-probabilities. Knows token ids and no text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]
    TokenIds = NDArray[np.int64]

GREEDY_BELOW_TEMPERATURE = 1e-5  # below this, dividing logits by the temperature overflows fp32


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingSettings:
    """How one answer is sampled, in token ids; bounds are the wire's."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    num_logprobs: int | None = None
    seed: int = 0
    min_tokens: int = 0

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW_TEMPERATURE

    @property
    def has_penalties(self) -> bool:
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0 or self.repetition_penalty != 1.0

    @property
    def has_filters(self) -> bool:
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0


@dataclass(frozen=True, slots=True)
class SampledToken:
    """The choice, and the model's own log-probabilities where they were asked for."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


class Sampler:
    """The sampler of one answer; `generated` are the answer's tokens so far, from elsewhere or here."""

    def __init__(
        self,
        settings: SamplingSettings,
        vocab_size: int,
        prompt: Sequence[int],
        generated: Sequence[int] = (),
        stop_token_ids: Sequence[int] = (),
    ) -> None:
        import numpy as np

        self._np = np
        self._settings = settings
        self._num_generated = len(generated)
        self._stop_token_ids = list(stop_token_ids)
        self._bias_ids = np.array(list(settings.logit_bias), np.int64)
        self._bias = np.array(list(settings.logit_bias.values()), np.float32)
        if settings.has_penalties:
            self._in_prompt = np.zeros(vocab_size, bool)
            self._in_prompt[list(prompt)] = True
            self._counts = np.bincount(np.array(generated, np.int64), minlength=vocab_size).astype(np.float32)

    def sample(self, logits: Floats) -> SampledToken:
        """The next token for the logits [vocab]; ValueError where they are not finite."""
        best = int(logits.argmax())  # a NaN anywhere is numpy's maximum
        if not self._np.isfinite(logits[best]):
            raise ValueError("the model's logits are not finite")
        processed = self._process(logits)
        if self._settings.is_greedy:
            chosen = best if processed is logits else int(processed.argmax())
        else:
            chosen = self._draw(processed)
        self._num_generated += 1
        if self._settings.has_penalties:
            self._counts[chosen] += 1
        return self._with_logprobs(chosen, logits)

    # --- logits: minimum length, bias, penalties ---

    def _process(self, raw: Floats) -> Floats:
        must_go_on = self._num_generated < self._settings.min_tokens
        if not (must_go_on or len(self._bias_ids) or self._settings.has_penalties):
            return raw
        logits = raw.copy()
        if must_go_on and self._stop_token_ids:
            logits[self._stop_token_ids] = -self._np.inf
        logits[self._bias_ids] += self._bias
        return self._penalize(logits) if self._settings.has_penalties else logits

    def _penalize(self, logits: Floats) -> Floats:
        """Repetition over prompt and answer, then frequency and presence over the answer alone."""
        np, settings = self._np, self._settings
        repetition = np.float32(settings.repetition_penalty)
        is_generated = self._counts > 0
        scaled = np.where(logits > 0, logits / repetition, logits * repetition)
        logits = np.where(self._in_prompt | is_generated, scaled, logits)
        frequency = np.float32(settings.frequency_penalty) * self._counts
        penalized: Floats = logits - frequency - np.float32(settings.presence_penalty) * is_generated
        return penalized

    # --- the draw ---

    def _draw(self, logits: Floats) -> int:
        from longshore.device.randomness import gumbel_noise
        from longshore.seeds import row_keys

        np = self._np
        scaled = (logits - logits.max()) / np.float32(self._settings.temperature)
        token_ids = self._kept(scaled) if self._settings.has_filters else np.arange(len(scaled))
        noise = gumbel_noise(row_keys(self._settings.seed, self._num_generated), token_ids)
        return int(token_ids[(scaled[token_ids] + noise).argmax()])

    def _kept(self, scaled: Floats) -> TokenIds:
        """The tokens that min-p, then top-k, then top-p keep; equal logits stand or fall together."""
        np, settings = self._np, self._settings
        threshold = np.log(np.float32(settings.min_p)) if settings.min_p > 0 else np.float32(-np.inf)
        if 0 < settings.top_k < len(scaled):
            threshold = max(threshold, np.partition(scaled, -settings.top_k)[-settings.top_k])
        if settings.top_p < 1.0:
            candidates = np.sort(scaled[scaled >= threshold])[::-1]  # likeliest first
            weights = np.exp(candidates)
            before = np.cumsum(weights, dtype=np.float64) - weights  # mass of the likelier ones
            num_kept = int((before < settings.top_p * weights.sum(dtype=np.float64)).sum())
            threshold = max(threshold, candidates[max(num_kept, 1) - 1])
        kept: TokenIds = np.flatnonzero(scaled >= threshold)
        return kept

    # --- log probabilities ---

    def _with_logprobs(self, chosen: int, raw: Floats) -> SampledToken:
        """The model's own, before any processing."""
        np, wanted = self._np, self._settings.num_logprobs
        if wanted is None:
            return SampledToken(chosen)
        shifted = raw - raw.max()
        logprobs = shifted - np.log(np.exp(shifted).sum())
        best = np.argsort(-logprobs, kind="stable")[:wanted]
        top = tuple((int(token_id), float(logprobs[token_id])) for token_id in best)
        return SampledToken(chosen, float(logprobs[chosen]), top)
