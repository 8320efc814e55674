"""What an HTTP worker knows of one job under way: enough to bring it back when the engine dies. No I/O."""

from __future__ import annotations

import asyncio
from collections import deque

from longshore.errors import EngineFailedError, LongshoreError
from longshore_server.engines.base import EngineToken, GenerateJob
from longshore_server.ipc import TokenItem


class InFlight:
    """One job: what was received of it, what of that is unread, and how often it was replayed."""

    def __init__(self, job: GenerateJob) -> None:
        self.job = job
        self.stream = -1  # the number under which the engine knows it now; -1 while it does not
        self.received: list[int] = []
        self.unread: deque[EngineToken] = deque()
        self.error: LongshoreError | None = None
        self.has_ended = False
        self.is_parked = False
        self.was_resumed = False
        self.num_replays = 0
        self.news = asyncio.Event()

    @property
    def continue_from(self) -> tuple[int, ...]:
        return (*self.job.continue_from, *self.received)

    @property
    def next_offset(self) -> int:
        return len(self.job.continue_from) + len(self.received)

    def take(self, token: EngineToken) -> None:
        if token.token_id is not None:
            self.received.append(token.token_id)
        self.has_ended = token.finish_reason is not None
        self.unread.append(token)
        self.news.set()

    def fail(self, error: LongshoreError) -> None:
        if not self.has_ended:
            self.has_ended = True
            self.error = error
            self.news.set()

    def killed_engine(self) -> EngineFailedError:
        return EngineFailedError(
            f"the engine died {self.num_replays} times while it had this request",
            tokens_delivered=len(self.received),
        )


def engine_token(item: TokenItem, *, was_resumed: bool) -> EngineToken:
    """An output as it came over the socket, as the Engine protocol has it."""
    return EngineToken(
        token_id=item.token_id,
        offset=item.offset,
        logprob=item.logprob,
        top_logprobs=item.top_logprobs,
        finish_reason=item.finish_reason,
        num_cached_tokens=min(item.num_cached_tokens, item.num_prompt_tokens),
        num_prompt_tokens=item.num_prompt_tokens,
        was_resumed=was_resumed,
    )
