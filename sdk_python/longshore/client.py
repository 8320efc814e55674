"""`Client` and `AsyncClient`: one call that device, edge or core answers, in the shape of OpenAI's client.

Thin shells over `_ClientBase`, which is free of I/O; what to try next is `call.Call`'s to say.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

from longshore.call import Call, CallSettings, Try, Wait, num_choices
from longshore.config import (
    ClientSettings,
    HttpSettings,
    Mode,
    RoutingSettings,
    api_key_or_env,
    base_urls,
    check_mode,
)
from longshore.errors import ConfigError, LongshoreError, NoTierAvailableError
from longshore.image_parts import holds_images
from longshore.measure import RetryBudget, TierMeter
from longshore.on_device import NODE as DEVICE_NODE
from longshore.on_device import OnDevice
from longshore.params import ChatParams, chat_request
from longshore.policy import TierView, estimate_prompt_tokens
from longshore.resources import (
    AsyncChat,
    AsyncCompletions,
    AsyncModels,
    Chat,
    Completions,
    Models,
    StreamSocket,
)
from longshore.transport import AsyncHttpTransport, HttpTransport, Timing, open_socket
from longshore.wire import (
    AnswerEvent,
    AnyRequest,
    ChatRequest,
    ModelList,
    Tier,
    new_request_id,
)

if TYPE_CHECKING:
    from longshore.device import DeviceSettings, Student

_MODELS_TIMEOUT_S = 10.0
_T = TypeVar("_T")


class _ClientBase:
    """Settings, live measurements and the making of calls; sends nothing and waits for nothing."""

    def __init__(
        self,
        *,
        edge_url: str | Iterable[str] | None = None,
        core_url: str | Iterable[str] | None = None,
        device: Path | str | Student | None = None,
        api_key: str | None = None,
        mode: Mode = "auto",
        deadline_s: float = 60.0,
        ttft_target_ms: int = 300,
        image_max_side_px: int = 1536,
        device_settings: DeviceSettings | None = None,
        device_start: Literal["background", "first-use"] = "background",
        http: HttpSettings | None = None,
        routing: RoutingSettings | None = None,
    ) -> None:
        self.settings = ClientSettings(
            edge_urls=base_urls(edge_url, "edge_url"),
            core_urls=base_urls(core_url, "core_url"),
            has_device=device is not None,
            api_key=api_key_or_env(api_key),
            mode=mode,
            deadline_s=deadline_s,
            ttft_target_ms=ttft_target_ms,
            image_max_side_px=image_max_side_px,
            http=http or HttpSettings(),
            routing=routing or RoutingSettings(),
        )
        if device_start not in ("background", "first-use"):
            raise ConfigError(f"device_start must be 'background' or 'first-use', not {device_start!r}")
        self.clock: Callable[[], float] = time.monotonic
        self._budget = RetryBudget(self.settings.routing)
        self._device = OnDevice(device, device_settings, self.clock) if device is not None else None
        self._meters = {node: TierMeter(tier, node, self.settings.routing) for tier, node in self._nodes()}
        self._open()
        if self._device is not None and device_start == "background":
            self._device.start_in_background()

    def _open(self) -> None:
        """Make what does the I/O; nothing is connected yet."""
        raise TypeError("use Client or AsyncClient")

    def measurements(self) -> tuple[TierView, ...]:
        """What is known of each tier right now: the figures that routing goes by."""
        return tuple(self._views(self.clock()))

    def _nodes(self) -> list[tuple[Tier, str]]:
        nodes: list[tuple[Tier, str]] = [("edge", url) for url in self.settings.edge_urls]
        nodes += [("core", url) for url in self.settings.core_urls if url not in self.settings.edge_urls]
        if self._device is not None:
            nodes.append(("device", DEVICE_NODE))
        return nodes

    @property
    def _remote_urls(self) -> list[str]:
        return [*self.settings.edge_urls, *self.settings.core_urls]

    def _views(self, now_s: float) -> Sequence[TierView]:
        views = [meter.view(now_s) for meter in self._meters.values()]
        if self._device is None:
            return views
        device = self._device
        return [device.describe(view, now_s) if view.tier == "device" else view for view in views]

    def defaults(self) -> dict[str, Any]:
        """The `longshore` fields of a request that does not name them."""
        return {
            "request_id": new_request_id(),
            "deadline_ms": max(1, int(self.settings.deadline_s * 1000)),
            "ttft_target_ms": self.settings.ttft_target_ms,
        }

    def call(self, request: AnyRequest, mode: Mode | None, stream: bool) -> Call:
        """A request's way through the tiers, not yet begun."""
        mode = mode if mode is not None else self.settings.mode
        check_mode(mode)
        self._check_device(request, mode)
        started_s = self.clock()
        extension = request.longshore
        deadline_ms = extension.deadline_ms or self.defaults()["deadline_ms"]
        settings = CallSettings(
            mode=mode,
            started_s=started_s,
            deadline_s=started_s + deadline_ms / 1000,
            ttft_target_ms=extension.ttft_target_ms or self.settings.ttft_target_ms,
            delivers_tokens=stream,
            routing=self.settings.routing,
        )
        return Call(
            request,
            settings,
            meters=self._meters,
            views=self._views,
            num_prompt_tokens=self._count(request),
            budget=self._budget,
            random_unit=random.random,
        )

    def _check_device(self, request: AnyRequest, mode: Mode) -> None:
        """Where only the device may answer, why it can't is the error, not that no tier is left."""
        if mode != "device-only" and request.longshore.privacy != "device-only":
            return
        if self._device is None:
            raise NoTierAvailableError("the request must stay on the device, and no device is configured")
        if self._device.final_error is not None:
            raise self._device.final_error

    def _count(self, request: AnyRequest) -> int:
        count = self._device.count_prompt_tokens(request) if self._device is not None else None
        return count if count is not None else estimate_prompt_tokens(request)

    def _merged(self, remote: ModelList | None, error: LongshoreError | None) -> ModelList:
        """The remote tier's models and the device's; the error only where neither has any."""
        cards = list(remote.data) if remote is not None else []
        if self._device is not None:
            card = self._device.model_card()
            cards += [card] if card.id not in {other.id for other in cards} else []
        elif remote is None and error is not None:
            raise error
        return ModelList(tuple(cards))


def _timing(step: Try) -> Timing:
    return Timing(step.first_token_by_s, step.deadline_s)


# -- blocking ----------------------------------------------------------------------------------


class Client(_ClientBase):
    """Asks device, edge and core, in any subset; safe to share between threads.

    `edge_url` and `core_url` are addresses or lists of them; `device` is the folder of an exported
    student, or a `longshore.device.Student`. `api_key` defaults to LONGSHORE_API_KEY. `mode` is one
    of auto, prefer-device, prefer-core, device-only, edge-only, core-only. A picture with a side over
    `image_max_side_px` is scaled down before it is sent. Raises ConfigError.

        with Client(edge_url="https://edge.example") as client:
            answer = client.chat.completions.create(model="shop", messages=[...])
    """

    def _open(self) -> None:
        self._http = HttpTransport(self.settings.http, self.settings.api_key, self.clock)
        if self._remote_urls:
            self._http.prepare()
        self._sleep: Callable[[float], None] = time.sleep
        self.chat = Chat(self)
        self.completions = Completions(self)
        self.models = Models(self)

    def close(self) -> None:
        """Close connections and end the device's model."""
        self._http.close()
        if self._device is not None:
            self._device.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def chat_request(self, params: ChatParams, stream: bool) -> ChatRequest:
        """The wire's request of keyword arguments."""
        return chat_request(params, stream, self.defaults(), self.settings.image_max_side_px)

    def answer(self, call: Call) -> Generator[AnswerEvent, None, None]:
        """Drive the call: try, take, fail, wait, until the answer is whole or an error is final."""
        try:
            while True:
                step = call.next_step(self.clock())
                if isinstance(step, Wait):
                    self._sleep(step.seconds)
                    continue
                try:
                    with contextlib.closing(self._source(step)) as events:
                        for event in events:
                            yield call.take(event, self.clock())
                    call.end()
                    return
                except LongshoreError as error:
                    call.fail(error, self.clock())
        finally:
            call.leave(self.clock())

    def _source(self, step: Try) -> Generator[AnswerEvent, None, None]:
        if step.candidate.tier == "device":
            yield from self._on_device().stream(step.request, step.first_token_by_s, step.deadline_s)
            return
        choices = num_choices(step.request)
        yield from self._http.stream(step.candidate.node, step.request, choices, _timing(step))

    def _on_device(self) -> OnDevice:
        if self._device is None:
            raise ConfigError("no device is configured")
        return self._device

    def list_models(self) -> ModelList:
        """The models of the first remote tier that answers, and the device's."""
        error: LongshoreError | None = None
        for url in self._remote_urls:
            try:
                return self._merged(self._http.models(url, _MODELS_TIMEOUT_S), None)
            except LongshoreError as failure:
                error = failure
        return self._merged(None, error)


# -- asyncio -----------------------------------------------------------------------------------


class AsyncClient(_ClientBase):
    """`Client` for asyncio; belongs to the event loop that first uses it."""

    def _open(self) -> None:
        self._http = AsyncHttpTransport(self.settings.http, self.settings.api_key, self.clock)
        if self._remote_urls:
            self._http.prepare()
        self.chat = AsyncChat(self)
        self.completions = AsyncCompletions(self)
        self.models = AsyncModels(self)

    async def close(self) -> None:
        """Close connections and end the device's model."""
        await self._http.close()
        if self._device is not None:
            await asyncio.to_thread(self._device.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @contextlib.asynccontextmanager
    async def stream_socket(self, node: str | None = None) -> AsyncIterator[StreamSocket]:
        """One WebSocket to a tier (the first edge, else the first core) for many answers at once.

        There is no fallback over a socket: what goes wrong is raised.
        """
        if not self._remote_urls:
            raise ConfigError("a socket needs edge_url or core_url")
        url = base_urls(node, "node")[0] if node is not None else self._remote_urls[0]
        timeout_s = self.settings.http.connect_timeout_s
        socket = await open_socket(url, self.settings.api_key, self.settings.http, timeout_s, self.clock)
        try:
            yield StreamSocket(self, socket)
        finally:
            await socket.close()

    async def chat_request(self, params: ChatParams, stream: bool) -> ChatRequest:
        """The wire's request of keyword arguments; pictures are made ready on a thread."""
        most_px = self.settings.image_max_side_px
        messages = params.get("messages")
        if isinstance(messages, Sequence) and holds_images(messages):
            return await asyncio.to_thread(chat_request, params, stream, self.defaults(), most_px)
        return chat_request(params, stream, self.defaults(), most_px)

    async def answer(self, call: Call) -> AsyncGenerator[AnswerEvent, None]:
        """Drive the call: try, take, fail, wait, until the answer is whole or an error is final."""
        try:
            while True:
                step = call.next_step(self.clock())
                if isinstance(step, Wait):
                    await asyncio.sleep(step.seconds)
                    continue
                try:
                    async with contextlib.aclosing(self._source(step)) as events:
                        async for event in events:
                            yield call.take(event, self.clock())
                    call.end()
                    return
                except LongshoreError as error:
                    call.fail(error, self.clock())
        finally:
            call.leave(self.clock())

    async def _source(self, step: Try) -> AsyncGenerator[AnswerEvent, None]:
        if step.candidate.tier == "device":
            if self._device is None:
                raise ConfigError("no device is configured")
            answer = self._device.astream(step.request, step.first_token_by_s, step.deadline_s)
        else:
            choices = num_choices(step.request)
            answer = self._http.stream(step.candidate.node, step.request, choices, _timing(step))
        async with contextlib.aclosing(answer) as events:
            async for event in events:
                yield event

    async def list_models(self) -> ModelList:
        error: LongshoreError | None = None
        for url in self._remote_urls:
            try:
                return self._merged(await self._http.models(url, _MODELS_TIMEOUT_S), None)
            except LongshoreError as failure:
                error = failure
        return self._merged(None, error)
