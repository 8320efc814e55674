"""What a request asks of the student, worked out before anything runs: prompts, limits, where it goes on.

Pure functions of request, manifest and text; refuses what this model can't do. Starts nothing.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from longshore.device.image_plan import ImagePolicy, PlannedImage, plan_images
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
    images: tuple[PlannedImage, ...] = ()
    never: tuple[int, ...] = ()  # token ids that are not drawn: they stand for pictures

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
            "images": [image.job() for image in self.images],
            "never": self.never,
        }


@dataclass(frozen=True, slots=True)
class _Seam:
    """Where this model takes over: `offset` tokens and the text of others, or `token_ids` of its own."""

    token_ids: tuple[int, ...] = ()
    text: str = ""
    offset: int = 0


def read_prompts(
    request: AnyRequest,
    manifest: Manifest,
    text: StudentText,
    policy: ImagePolicy,
    so_far: str = "",
    num_generated: int = 0,
) -> tuple[list[tuple[int, ...]], tuple[PlannedImage, ...]]:
    """Each prompt's token ids, `so_far` after it, and the pictures that their image tokens show.

    Raises InvalidRequestError or a subclass, naming the field.
    """
    check_text_only(request, manifest)
    prompts = text.prompts(request, so_far)
    if manifest.vision is None:
        return prompts, ()
    token_id = manifest.vision.image_token_id
    if not isinstance(request, ChatRequest):
        _refuse_image_token("prompt", (item for prompt in prompts for item in prompt), token_id)
        return prompts, ()
    [prompt] = prompts
    num_images = prompt.count(token_id)
    images = plan_images(request, manifest, len(prompt) - num_images + num_generated, policy)
    if num_images != len(images):
        raise InvalidRequestError("the chat template names pictures that are not there", param="messages")
    return [tuple(_expanded(prompt, token_id, images))], images


def _refuse_image_token(param: str, token_ids: Iterable[int], image_token_id: int) -> None:
    if image_token_id in token_ids:
        raise InvalidRequestError(
            f"token {image_token_id} stands for a picture, which only messages bring", param=param
        )


def _expanded(
    prompt: tuple[int, ...], image_token_id: int, images: tuple[PlannedImage, ...]
) -> Iterator[int]:
    """The prompt with as many image tokens for each picture as its size makes."""
    sizes = iter(images)
    for token_id in prompt:
        if token_id != image_token_id:
            yield token_id
        else:
            yield from (token_id for _ in range(next(sizes).use.num_tokens))


def make_plan(request: AnyRequest, manifest: Manifest, text: StudentText, policy: ImagePolicy) -> Plan:
    """Raises InvalidRequestError or a subclass, or ResumeUnavailableError, naming the field."""
    continuation = request.longshore.continue_from
    seam = _seam(continuation, manifest.model_digest)
    never = () if manifest.vision is None else (manifest.vision.image_token_id,)
    for token_id in never:
        _refuse_image_token("longshore.continue_from.token_ids", seam.token_ids, token_id)
    prompts, images = read_prompts(request, manifest, text, policy, seam.text, len(seam.token_ids))
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
        images=images,
        never=never,
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
