"""Checks a request against the model and the caller, and puts it into tokens: a Plan, or a typed error.

It starts nothing. Text is longshore_server.text's, rights are the caller's own.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from longshore.errors import (
    InvalidRequestError,
    OutOfRangeError,
    PromptTooLongError,
    ResumeUnavailableError,
    UnknownModelError,
)
from longshore.seeds import sub_seed
from longshore.wire import AnyRequest, ChatRequest, Continuation, ImageUse
from longshore_server.admission import priority_of
from longshore_server.auth import Caller
from longshore_server.choice import Seam
from longshore_server.config import CoreConfig
from longshore_server.engines.base import Engine, GenerateJob, SamplingSpec
from longshore_server.images import ImageReader, ReadImages, without_pictures
from longshore_server.text import ModelText, check_text_only

ANSWER_ROOM_TOKENS = 64  # that pictures leave of the context, where smaller ones are to be had
MAX_JOB_PIXELS = 2 * 1024 * 1024  # of the pictures of all choices, in the sizes they are read at


@dataclass(frozen=True, slots=True)
class Plan:
    """A request that was checked and put into tokens; times are of `time.monotonic()`."""

    request: AnyRequest
    request_id: str
    caller: Caller
    model: str
    arrived_s: float
    deadline_s: float
    jobs: tuple[GenerateJob, ...]
    seam: Seam
    images: tuple[ImageUse, ...] = ()

    @property
    def key(self) -> tuple[str, str, int]:
        """What no two requests in flight may share; a continuation is a request of its own."""
        return (self.caller.tenant, self.request_id, self.seam.segment)


class Planner:
    """Makes plans for one engine that has started; without a `reader` it takes no pictures."""

    def __init__(
        self, config: CoreConfig, engine: Engine, text: ModelText, reader: ImageReader | None = None
    ) -> None:
        self._config = config
        self._text = text
        self._reader = reader
        self._info = engine.info
        self._can_resume = "resume" in engine.capabilities

    def time_s(self, request: AnyRequest) -> float:
        """What the request has from its arrival to its end."""
        deadline_ms = request.longshore.deadline_ms
        return self._config.default_deadline_s if deadline_ms is None else deadline_ms / 1000

    async def plan(self, request: AnyRequest, caller: Caller, request_id: str, arrived_s: float) -> Plan:
        """Check a request and put it into tokens; raises a RequestError."""
        self._check(request, caller)
        seam, answer_so_far = self._seam(request.longshore.continue_from)
        prompts = await self._text.prompts(request, answer_so_far=answer_so_far)
        shown = ReadImages()
        if self._reader is not None:
            shown = await self._read_images(self._reader, request, prompts)
            prompts = tuple(
                self._reader.sizes.expand(prompt, shown.uses, _param(request)) for prompt in prompts
            )
        deadline_s = arrived_s + self.time_s(request)
        draft = GenerateJob(
            request_id=f"{request_id}-{seam.segment}",
            prompt_token_ids=(),
            tenant=caller.tenant,
            priority=priority_of(request.lane),
            deadline_s=deadline_s,
            continue_from=seam.token_ids,
            images=shown.images,
        )
        return Plan(
            request=without_pictures(request),  # megabytes that nobody needs while the answer lasts
            request_id=request_id,
            caller=caller,
            model=self._config.model_name,
            arrived_s=arrived_s,
            deadline_s=deadline_s,
            jobs=tuple(self._jobs(request, caller, prompts, seam, draft)),
            seam=seam,
            images=shown.uses,
        )

    async def _read_images(
        self, reader: ImageReader, request: AnyRequest, prompts: tuple[tuple[int, ...], ...]
    ) -> ReadImages:
        """The pictures, as large as they add something and context and engine hold them."""
        num_text_tokens = max(map(len, prompts))
        return await reader.read(
            request,
            max_tokens=self._info.max_model_len - num_text_tokens - ANSWER_ROOM_TOKENS,
            max_pixels=MAX_JOB_PIXELS // request.n,  # each choice brings the engine its own copy
        )

    def _jobs(
        self,
        request: AnyRequest,
        caller: Caller,
        prompts: tuple[tuple[int, ...], ...],
        seam: Seam,
        draft: GenerateJob,
    ) -> Iterator[GenerateJob]:
        """One job per choice: `n` of each prompt, told apart by their seeds."""
        seed = secrets.randbits(63) if request.seed is None else request.seed
        for number, prompt in enumerate(prompts):
            for index in range(request.n):
                # the engine's ids are its own, so that a repeat right after an abort can't collide
                name = f"{draft.request_id}-{number * request.n + index}-{secrets.token_hex(4)}"
                params = self._sampling(request, caller, prompt, seam, sub_seed(seed, index))
                yield replace(draft, request_id=name, prompt_token_ids=prompt, params=params)

    def _check(self, request: AnyRequest, caller: Caller) -> None:
        if request.model not in self._config.model_names:
            raise UnknownModelError(f"model: no model {request.model!r} here", param="model")
        caller.check(request)
        if self._reader is None:
            check_text_only(request)

    def _seam(self, continuation: Continuation | None) -> tuple[Seam, str]:
        """Where the answer goes on, and the text that a model with other tokens has to read first."""
        if continuation is None:
            return Seam(), ""
        token_ids, text = continuation.token_ids, continuation.text
        is_same_model = continuation.model_digest == self._info.digest
        if is_same_model and self._can_resume:
            _check_vocabulary(token_ids, self._info.vocab_size, "longshore.continue_from.token_ids")
            return Seam(continuation.segment, token_ids), ""
        if token_ids and not text:
            raise ResumeUnavailableError(
                "the answer was begun by another model: send its text to go on from",
                param="longshore.continue_from",
            )
        seam = Seam(continuation.segment, (), len(token_ids), len(text.encode()))
        return seam, text

    def _sampling(
        self, request: AnyRequest, caller: Caller, prompt: tuple[int, ...], seam: Seam, seed: int
    ) -> SamplingSpec:
        max_tokens = self._max_tokens(request, caller, prompt) - seam.offset
        if request.min_tokens > max_tokens + seam.offset:
            raise OutOfRangeError(
                f"min_tokens: {request.min_tokens} is more than the {max_tokens} tokens that may come",
                param="min_tokens",
            )
        bias = {int(token_id): value for token_id, value in (request.logit_bias or {}).items()}
        _check_vocabulary(bias, self._info.vocab_size, "logit_bias")
        return SamplingSpec(
            max_tokens=max(max_tokens, 0),
            min_tokens=max(request.min_tokens - seam.offset, 0),
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=request.top_k,
            min_p=request.min_p,
            presence_penalty=request.presence_penalty,
            frequency_penalty=request.frequency_penalty,
            repetition_penalty=request.repetition_penalty,
            logit_bias=bias,
            num_logprobs=request.num_logprobs,
            ignore_eos=request.ignore_eos,
            seed=seed,
        )

    def _max_tokens(self, request: AnyRequest, caller: Caller, prompt: tuple[int, ...]) -> int:
        """The most tokens of the whole answer: what was asked for, as far as the context holds it."""
        param = _param(request)
        max_model_len = self._info.max_model_len
        _check_vocabulary(prompt, self._info.vocab_size, param)
        if not prompt:
            raise InvalidRequestError(f"{param}: holds no token", param=param)
        if len(prompt) >= max_model_len:
            raise PromptTooLongError(
                f"{param}: the prompt has {len(prompt)} tokens; this model's context holds {max_model_len}, "
                "at least one of them for the answer",
                param=param,
            )
        limits = (
            max_model_len - len(prompt),
            request.token_limit or self._config.default_max_tokens,
            caller.max_tokens,
        )
        return min(limit for limit in limits if limit is not None)


def _param(request: AnyRequest) -> str:
    """The field that the prompt comes from."""
    return "messages" if isinstance(request, ChatRequest) else "prompt"


def _check_vocabulary(token_ids: Iterable[int], vocab_size: int, param: str) -> None:
    for token_id in token_ids:
        if token_id >= vocab_size:
            raise OutOfRangeError(
                f"{param}: {token_id} is no token of this model, which has {vocab_size}", param=param
            )
