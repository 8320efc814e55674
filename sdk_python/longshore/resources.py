"""`client.chat.completions`, `client.completions` and `client.models`, as users of OpenAI's client know them.

Makes requests of keyword arguments and answers of events; the clients do the rest.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

from longshore.call import Call, Progress, num_choices
from longshore.errors import AnswerInterruptedError, LongshoreError
from longshore.params import ChatParams, CompletionParams, completion_request
from longshore.streams import (
    Assembly,
    AsyncChatStream,
    AsyncCompletionStream,
    ChatStream,
    CompletionStream,
)
from longshore.transport import SocketTransport, Timing
from longshore.wire import (
    AnswerEvent,
    AnyRequest,
    ChatCompletion,
    ChatCompletionChunk,
    ChatRequest,
    Completion,
    ModelList,
)
from longshore.wire.render import ChatRenderer, CompletionRenderer

if TYPE_CHECKING:
    from longshore.client import AsyncClient, Client


def _request_id(request: AnyRequest) -> str:
    return request.longshore.request_id or ""


def _frame(request: AnyRequest) -> dict[str, Any]:
    return {"request_id": _request_id(request), "model": request.model, "created": int(time.time())}


def _renderer_frame(request: AnyRequest) -> dict[str, Any]:
    options = request.stream_options
    include_usage = options is not None and options.include_usage
    return {**_frame(request), "num_choices": num_choices(request), "include_usage": include_usage}


def _chat_chunks(request: AnyRequest, progress: Callable[[], Progress]) -> Assembly[ChatCompletionChunk]:
    renderer = ChatRenderer(**_renderer_frame(request))
    return Assembly(renderer, ChatCompletionChunk, progress, _request_id(request))


def _completion_chunks(request: AnyRequest, progress: Callable[[], Progress]) -> Assembly[Completion]:
    renderer = CompletionRenderer(**_renderer_frame(request))
    return Assembly(renderer, Completion, progress, _request_id(request))


def _whole_chat(call: Call) -> ChatCompletion:
    answer = call.progress.collector.chat_completion(**_frame(call.request))
    return replace(answer, longshore=call.report)


def _whole_completion(call: Call) -> Completion:
    answer = call.progress.collector.completion(**_frame(call.request))
    return replace(answer, longshore=call.report)


# -- blocking ----------------------------------------------------------------------------------


class Chat:
    """`client.chat`."""

    def __init__(self, client: Client) -> None:
        self.completions = ChatCompletions(client)


class ChatCompletions:
    """`client.chat.completions`."""

    def __init__(self, client: Client) -> None:
        self._client = client

    @overload
    def create(self, *, stream: Literal[False] = False, **params: Unpack[ChatParams]) -> ChatCompletion: ...

    @overload
    def create(self, *, stream: Literal[True], **params: Unpack[ChatParams]) -> ChatStream: ...

    @overload
    def create(self, *, stream: bool, **params: Unpack[ChatParams]) -> ChatCompletion | ChatStream: ...

    def create(self, *, stream: bool = False, **params: Unpack[ChatParams]) -> ChatCompletion | ChatStream:
        """Answer a chat, whole or (`stream=True`) as an iterator of chunks.

        OpenAI's parameters, and ours: mode, deadline_ms, ttft_target_ms, lane, privacy, request_id,
        traceparent. A stream is returned once its first token is there, so that everything that can
        go wrong before it is raised here. Raises errors of `longshore.errors`; TypeError for an
        unknown name.
        """
        client = self._client
        request = client.chat_request(params, stream)
        call = client.call(request, params.get("mode"), stream)
        events = client.answer(call)
        if stream:
            return ChatStream(events, next(events), _chat_chunks(request, lambda: call.progress))
        for _ in events:
            pass
        return _whole_chat(call)


class Completions:
    """`client.completions`."""

    def __init__(self, client: Client) -> None:
        self._client = client

    @overload
    def create(self, *, stream: Literal[False] = False, **params: Unpack[CompletionParams]) -> Completion: ...

    @overload
    def create(self, *, stream: Literal[True], **params: Unpack[CompletionParams]) -> CompletionStream: ...

    @overload
    def create(
        self, *, stream: bool, **params: Unpack[CompletionParams]
    ) -> Completion | CompletionStream: ...

    def create(
        self, *, stream: bool = False, **params: Unpack[CompletionParams]
    ) -> Completion | CompletionStream:
        """Complete a prompt of text or token ids; otherwise as `chat.completions.create`."""
        client = self._client
        request = completion_request(params, stream, client.defaults())
        call = client.call(request, params.get("mode"), stream)
        events = client.answer(call)
        if stream:
            return CompletionStream(events, next(events), _completion_chunks(request, lambda: call.progress))
        for _ in events:
            pass
        return _whole_completion(call)


class Models:
    """`client.models`."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def list(self) -> ModelList:
        """The models of the first remote tier that answers, and the device's."""
        return self._client.list_models()


# -- asyncio -----------------------------------------------------------------------------------


class AsyncChat:
    """`client.chat`."""

    def __init__(self, client: AsyncClient) -> None:
        self.completions = AsyncChatCompletions(client)


class AsyncChatCompletions:
    """`client.chat.completions`."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    @overload
    async def create(
        self, *, stream: Literal[False] = False, **params: Unpack[ChatParams]
    ) -> ChatCompletion: ...

    @overload
    async def create(self, *, stream: Literal[True], **params: Unpack[ChatParams]) -> AsyncChatStream: ...

    @overload
    async def create(
        self, *, stream: bool, **params: Unpack[ChatParams]
    ) -> ChatCompletion | AsyncChatStream: ...

    async def create(
        self, *, stream: bool = False, **params: Unpack[ChatParams]
    ) -> ChatCompletion | AsyncChatStream:
        """As `ChatCompletions.create`; the stream is for `async for`."""
        client = self._client
        request = await client.chat_request(params, stream)
        call = client.call(request, params.get("mode"), stream)
        events = client.answer(call)
        if stream:
            return AsyncChatStream(events, await anext(events), _chat_chunks(request, lambda: call.progress))
        async for _ in events:
            pass
        return _whole_chat(call)


class AsyncCompletions:
    """`client.completions`."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    @overload
    async def create(
        self, *, stream: Literal[False] = False, **params: Unpack[CompletionParams]
    ) -> Completion: ...

    @overload
    async def create(
        self, *, stream: Literal[True], **params: Unpack[CompletionParams]
    ) -> AsyncCompletionStream: ...

    @overload
    async def create(
        self, *, stream: bool, **params: Unpack[CompletionParams]
    ) -> Completion | AsyncCompletionStream: ...

    async def create(
        self, *, stream: bool = False, **params: Unpack[CompletionParams]
    ) -> Completion | AsyncCompletionStream:
        """As `Completions.create`; the stream is for `async for`."""
        client = self._client
        request = completion_request(params, stream, client.defaults())
        call = client.call(request, params.get("mode"), stream)
        events = client.answer(call)
        if stream:
            return AsyncCompletionStream(
                events, await anext(events), _completion_chunks(request, lambda: call.progress)
            )
        async for _ in events:
            pass
        return _whole_completion(call)


class AsyncModels:
    """`client.models`."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def list(self) -> ModelList:
        """The models of the first remote tier that answers, and the device's."""
        return await self._client.list_models()


class StreamSocket:
    """Several streamed chats at once over one WebSocket; made by `AsyncClient.stream_socket`."""

    def __init__(self, client: AsyncClient, socket: SocketTransport) -> None:
        self._client = client
        self._socket = socket

    async def chat(self, **params: Unpack[ChatParams]) -> AsyncChatStream:
        """Start a chat; the stream's chunks come as those of `create(stream=True)`."""
        request = await self._client.chat_request(params, True)
        progress = Progress(num_choices(request))
        events = self._events(request, progress)
        first = await anext(events)
        return AsyncChatStream(events, first, _chat_chunks(request, lambda: progress))

    async def ping(self, timeout_s: float = 5.0) -> float:
        """Round trip to the tier in seconds."""
        return await self._socket.ping(timeout_s)

    async def _events(self, request: ChatRequest, progress: Progress) -> AsyncGenerator[AnswerEvent, None]:
        deadline_ms = request.longshore.deadline_ms or self._client.defaults()["deadline_ms"]
        by_s = self._client.clock() + deadline_ms / 1000
        answer = self._socket.stream(request, num_choices(request), Timing(by_s, by_s))
        try:
            async with contextlib.aclosing(answer) as events:
                async for event in events:
                    progress.add(event)
                    yield event
            if not progress.collector.is_finished:
                raise AnswerInterruptedError(f"the answer stopped after {progress.num_tokens} tokens")
        except LongshoreError as error:
            error.tokens_delivered = progress.num_tokens
            error.partial_text = progress.collector.text()
            raise
