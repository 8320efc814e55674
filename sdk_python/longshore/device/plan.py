"""What a request asks of the student, worked out before anything runs: prompts, limits, where it goes on.

Pure functions of request, manifest and text; refuses what this model can't do. Starts nothing.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from longshore.device.text import StudentText, check_text_only
from longshore.errors import InvalidRequestError, OutOfRangeError, PromptTooLongError, ResumeUnavailableError
from longshore.seeds import sub_seed
from longshore.wire import AnyRequest, ChatRequest, Continuation, FinishReason, Manifest, new_request_id

VOCAB_SIZE = "vocab_size"  # the manifest's capability that names it


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoicePlan:
    """One answer: `generated` are its tokens so far, the last of `offset` tokens and `byte_offset` bytes.

    `max_tokens` counts `generated` in. Where another model began the answer, its text stands in `prompt`,
    `generated` is empty and `offset` counts the other model's tokens.
    """

    index: int
    prompt: tuple[int, ...]
    generated: tuple[int, ...]
    max_tokens: int
    seed: int
    offset: int
    byte_offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A request made ready: its choices in the order in which they are answered."""

    request_id: str
    choices: tuple[ChoicePlan, ...]
    stop_strings: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    sampling: dict[str, Any]  # of all choices; the seed is a choice's own
    segment: int
    resumed: bool
    num_prompt_tokens: int

    def ending(self, choice: ChoicePlan) -> FinishReason | None:
        """Why the answer so far is whole already, or None."""
        so_far, min_tokens = choice.generated, int(self.sampling["min_tokens"])
        if so_far and so_far[-1] in self.stop_token_ids and len(so_far) > min_tokens:
            return "stop"
        return "length" if len(so_far) >= choice.max_tokens else None

    def job(self, choice: ChoicePlan) -> dict[str, Any]:
        """The choice as the model process takes it."""
        return {
            "prompt": choice.prompt,
            "generated": choice.generated,
            "max_tokens": choice.max_tokens,
            "stop_token_ids": self.stop_token_ids,
            "sampling": self.sampling | {"seed": choice.seed},
        }


@dataclass(frozen=True, slots=True)
class _Seam:
    """Where this model takes over: `offset` tokens and the text of others, or `token_ids` of its own."""

    token_ids: tuple[int, ...] = ()
    text: str = ""
    offset: int = 0


def make_plan(request: AnyRequest, manifest: Manifest, text: StudentText) -> Plan:
    """Raises InvalidRequestError or a subclass, or ResumeUnavailableError, naming the field."""
    check_text_only(request)
    continuation = request.longshore.continue_from
    seam = _seam(continuation, manifest.model_digest)
    prompts = text.prompts(request, seam.text)
    _check(request, manifest, prompts, seam.token_ids)
    return Plan(
        request_id=request.longshore.request_id or new_request_id(),
        choices=tuple(_choices(request, manifest.kv.max_tokens, prompts, seam)),
        stop_strings=request.stop_strings,
        stop_token_ids=() if request.ignore_eos else manifest.eos_token_ids,
        sampling=_sampling(request, min_tokens=max(request.min_tokens - seam.offset, 0)),
        segment=continuation.segment if continuation else 0,
        resumed=continuation is not None,
        num_prompt_tokens=sum(map(len, prompts)),
    )


def _seam(continuation: Continuation | None, model_digest: str) -> _Seam:
    if continuation is None:
        return _Seam()
    if continuation.model_digest == model_digest:
        return _Seam(continuation.token_ids)
    if continuation.token_ids and not continuation.text:
        raise ResumeUnavailableError(
            "the answer was begun by another model: send its text to go on from",
            param="longshore.continue_from",
        )
    return _Seam((), continuation.text, len(continuation.token_ids))


def _choices(
    request: AnyRequest, context_tokens: int, prompts: list[tuple[int, ...]], seam: _Seam
) -> Iterator[ChoicePlan]:
    """`n` of each prompt, told apart by their seeds."""
    seed = secrets.randbits(63) if request.seed is None else request.seed
    for number, prompt in enumerate(prompts):
        room = context_tokens - len(prompt)
        limit = room if request.token_limit is None else request.token_limit - seam.offset
        for copy in range(request.n):
            yield ChoicePlan(
                index=number * request.n + copy,
                prompt=prompt,
                generated=seam.token_ids,
                max_tokens=min(limit, room),
                seed=sub_seed(seed, copy),
                offset=seam.offset + len(seam.token_ids),
                byte_offset=len(seam.text.encode()),
            )


def _sampling(request: AnyRequest, min_tokens: int) -> dict[str, Any]:
    return {
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k,
        "min_p": request.min_p,
        "presence_penalty": request.presence_penalty,
        "frequency_penalty": request.frequency_penalty,
        "repetition_penalty": request.repetition_penalty,
        "logit_bias": {int(key): value for key, value in (request.logit_bias or {}).items()},
        "num_logprobs": request.num_logprobs,
        "min_tokens": min_tokens,
    }


def _check(
    request: AnyRequest, manifest: Manifest, prompts: list[tuple[int, ...]], generated: tuple[int, ...]
) -> None:
    name = "messages" if isinstance(request, ChatRequest) else "prompt"
    limit, vocab_size = manifest.kv.max_tokens, int(manifest.capabilities.get(VOCAB_SIZE, 0))
    for prompt in prompts:
        num_tokens = len(prompt) + len(generated)
        if not prompt:
            raise InvalidRequestError("must hold at least one token", param=name)
        if num_tokens >= limit:
            raise PromptTooLongError(
                f"the prompt has {num_tokens} tokens; this model takes {limit} tokens in all, "
                "at least one of them for the answer",
                param=name,
            )
    if request.token_limit is not None and request.min_tokens > request.token_limit:
        raise InvalidRequestError("must not be more than max_tokens", param="min_tokens")
    for param, token_ids in (
        (name, [token_id for prompt in prompts for token_id in prompt]),
        ("longshore.continue_from.token_ids", generated),
        ("logit_bias", [int(key) for key in request.logit_bias or ()]),
    ):
        if token_ids and max(token_ids) >= vocab_size:
            raise OutOfRangeError(f"a token id is not below the vocabulary's {vocab_size}", param=param)
