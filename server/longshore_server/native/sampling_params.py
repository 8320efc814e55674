"""How one answer is sampled: a frozen, validated set of settings in token ids. No text, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from longshore_server.native.checks import check_float, check_int
from longshore_server.native.errors import InvalidRequestError

MAX_SEED = 2**64 - 1
MAX_LOGPROBS = 100
MAX_LOGIT_BIAS = 1024
MAX_STOP_TOKENS = 256
GREEDY_BELOW_TEMPERATURE = 1e-5  # below this, dividing logits by the temperature overflows fp32


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Settings of one answer; raises InvalidRequestError naming the first wrong field.

    `top_k` of 0 or -1, `top_p` of 1 and `min_p` of 0 switch those filters off. Penalties follow vLLM and
    OpenAI: presence and frequency count generated tokens only, repetition counts the prompt as well.
    `num_logprobs` of None gives no logprobs, 0 the chosen token's alone. Log probabilities are the model's
    own, before bias, penalties and temperature.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    num_logprobs: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        err = InvalidRequestError
        check_int(err, "max_tokens", self.max_tokens, 1)
        check_int(err, "min_tokens", self.min_tokens, 0, self.max_tokens)
        check_float(err, "temperature", self.temperature, 0.0)
        check_float(err, "top_p", self.top_p, 0.0, 1.0, open_low=True)
        check_int(err, "top_k", self.top_k, -1)
        check_float(err, "min_p", self.min_p, 0.0, 1.0)
        check_float(err, "presence_penalty", self.presence_penalty, -2.0, 2.0)
        check_float(err, "frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        check_float(err, "repetition_penalty", self.repetition_penalty, 0.0, 10.0, open_low=True)
        check_int(err, "seed", self.seed, 0, MAX_SEED)
        if self.num_logprobs is not None:
            check_int(err, "num_logprobs", self.num_logprobs, 0, MAX_LOGPROBS)
        if not isinstance(self.ignore_eos, bool):
            raise err("ignore_eos", "must be true or false")
        self._check_token_maps()

    def _check_token_maps(self) -> None:
        if not isinstance(self.logit_bias, Mapping) or len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise InvalidRequestError("logit_bias", f"must map at most {MAX_LOGIT_BIAS} token ids to numbers")
        for token_id, bias in self.logit_bias.items():
            check_int(InvalidRequestError, "logit_bias", token_id, 0)
            check_float(InvalidRequestError, "logit_bias", bias, -100.0, 100.0)
        if not isinstance(self.stop_token_ids, tuple) or len(self.stop_token_ids) > MAX_STOP_TOKENS:
            raise InvalidRequestError(
                "stop_token_ids", f"must be a tuple of at most {MAX_STOP_TOKENS} token ids"
            )
        for token_id in self.stop_token_ids:
            check_int(InvalidRequestError, "stop_token_ids", token_id, 0)

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW_TEMPERATURE

    @property
    def has_penalties(self) -> bool:
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0 or self.repetition_penalty != 1.0

    @property
    def has_filters(self) -> bool:
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0

    @property
    def is_plain_greedy(self) -> bool:
        """True where the arg-max of the raw logits is the whole of sampling."""
        return (
            self.is_greedy
            and not self.has_penalties
            and not self.logit_bias
            and self.min_tokens == 0
            and self.num_logprobs is None
        )

    @property
    def is_filtered(self) -> bool:
        """True where filters choose what is drawn from; the likeliest token passes them all."""
        return self.has_filters and not self.is_greedy

    @property
    def is_simple(self) -> bool:
        """True where arg-max, or one draw by temperature from what filters keep, is the whole of sampling."""
        return (
            not self.has_penalties
            and not self.logit_bias
            and self.min_tokens == 0
            and self.num_logprobs is None
        )

    def check_vocab(self, vocab_size: int) -> None:
        """Raises InvalidRequestError when a token id named here is not in the vocabulary."""
        for name, token_ids in (("logit_bias", self.logit_bias), ("stop_token_ids", self.stop_token_ids)):
            for token_id in token_ids:
                if token_id >= vocab_size:
                    raise InvalidRequestError(
                        name, f"token {token_id} is not below the vocabulary's {vocab_size}"
                    )
