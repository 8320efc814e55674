"""The edge's own small model: the last resort, and the quick answer where a core would miss a target.

The model itself is `longshore.device`'s, imported only here and only then. Bounded: one answer at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

from longshore.bundle import installed, load_bundle, load_trust, read_manifest
from longshore.errors import BundleError, DeviceError, LongshoreError, UnavailableError
from longshore.sse import DONE, encode_data
from longshore.wire import (
    MANIFEST_NAME,
    AnswerEvent,
    AnyRequest,
    ChatRequest,
    FinishEvent,
    Hop,
    ModelCard,
    Report,
    TokenEvent,
    dump_json,
    encode,
    with_extension,
)
from longshore.wire.render import AnswerCollector, ChatRenderer, CompletionRenderer
from longshore_edge.answers import StreamAnswer, WholeAnswer
from longshore_edge.balance import PeakEwma
from longshore_edge.call import Call
from longshore_edge.config import EdgeConfig

if TYPE_CHECKING:
    from longshore.device import Calibration, Student

_RETRY_START_S = 10.0
_TYPICAL_TOKENS = 32


def bundle_folder(path: Path) -> Path:
    """The folder itself, or the current version where `path` is a bundle's place in a store."""
    if not (path / MANIFEST_NAME).exists():
        current = installed(path.parent, path.name)
        if current is not None:
            return current.path
    return path


def trust_file(config: EdgeConfig, folder: Path) -> Path | None:
    """The trust store that a bundle is held against; None if any is taken, as the settings have it."""
    if config.student_trust is None:
        return None
    is_let_in = config.student_allow_unsigned and read_manifest(folder).key_id is None
    return None if is_let_in else Path(config.student_trust)


def check_student(config: EdgeConfig) -> str:
    """Check the whole bundle of the settings; a line for the log where no key was asked about it, else "".

    Raises BundleError for a bundle that is not exactly what a trusted key signed, ConfigError for a trust
    store that can't be used.
    """
    assert config.student_bundle is not None
    folder = bundle_folder(Path(config.student_bundle))
    trust = trust_file(config, folder)
    load_bundle(folder, trusted_keys=None if trust is None else load_trust(trust))
    if trust is not None:
        return ""
    why = "there is no student_trust" if config.student_trust is None else "it is unsigned and let in"
    return f"student_bundle: {folder} is loaded without a signature check, since {why}"


class EdgeStudent:
    """One model process of this worker. `start` loads it; until then, and while it fails, it is not ready."""

    def __init__(self, config: EdgeConfig) -> None:
        from longshore.device import DeviceSettings, Student

        assert config.student_bundle is not None
        self._node = config.node
        self._stands_in_for = config.student_model_name
        folder = bundle_folder(Path(config.student_bundle))
        settings = DeviceSettings(
            max_waiting=config.student_max_waiting,
            num_threads=config.student_num_threads,
            trust=trust_file(config, folder),
        )
        self._student: Student = Student(folder, settings=settings)
        self._calibration: Calibration | None = None
        self._answer_s = PeakEwma(prior_s=0.0)
        self._num_in_flight = 0
        self.not_ready_reason = "still loading"

    @property
    def name(self) -> str:
        """The model's own name."""
        return self._student.manifest.name

    @property
    def model_digest(self) -> str:
        """The digest of its weights."""
        return self._student.manifest.model_digest

    @property
    def is_ready(self) -> bool:
        """True once it is loaded and measured."""
        return self._calibration is not None

    def card(self) -> ModelCard:
        """Its entry in the list of models."""
        manifest = self._student.manifest
        return ModelCard(
            self.name,
            max_model_len=manifest.kv.max_tokens,
            model_digest=self.model_digest,
            input_modalities=("text",) if manifest.vision is None else ("text", "image"),
        )

    def may_answer_for(self, model: str) -> bool:
        """True if it may stand in for `model`, as far as the settings say."""
        return model == self.name or self._stands_in_for in (None, model)

    async def run(self) -> None:
        """Load the model; a failed start is tried again, with a pause, until the task is cancelled."""
        while self._calibration is None:
            try:
                self._calibration = await asyncio.to_thread(self._student.start)
                self.not_ready_reason = ""
            except Exception as error:  # whatever it is, the edge runs without a student
                self.not_ready_reason = f"did not start: {error}"
                await asyncio.sleep(_RETRY_START_S)

    async def close(self) -> None:
        """End the model process."""
        await asyncio.to_thread(self._student.close)

    def predicted_ttft_s(self, request: AnyRequest) -> float | None:
        """When it would give its first token, after those that came before; None if it can't answer."""
        if self._calibration is None:
            return None
        try:
            ttft_s = self._student.expected_ttft_s(request)
        except LongshoreError:
            return None
        prior_s = ttft_s + self._calibration.expected_total_s(0, _TYPICAL_TOKENS)
        answer_s = self._answer_s.value_s(time.monotonic()) or prior_s
        return ttft_s + self._num_in_flight * answer_s

    async def answer(self, call: Call, reason: str, *, is_degraded: bool) -> WholeAnswer | StreamAnswer:
        """The answer to `call`; its first token is there when this returns. Raises what the model raises."""
        if not self.is_ready:
            raise UnavailableError(f"the edge's student is not ready: {self.not_ready_reason}")
        events = StudentEvents(self, call, reason, self._node, is_degraded)
        try:
            await events.prime()
            if call.request.stream:
                return StudentStream(events, call, self.name)
            return await _whole(events, call, self.name)
        except BaseException:
            await events.close()
            raise

    # -- for StudentEvents ---------------------------------------------------------------------

    def open(self, call: Call) -> AsyncIterator[AnswerEvent]:
        """Start an answer."""
        self._num_in_flight += 1
        request = with_extension(call.request, request_id=call.request_id, deadline_ms=None)
        return self._student.astream(request, deadline_s=call.deadline_s)

    def closed(self, elapsed_s: float, *, is_whole: bool) -> None:
        """An answer is over."""
        self._num_in_flight -= 1
        if is_whole:
            self._answer_s.observe(elapsed_s, time.monotonic())


class StudentEvents:
    """The events of one answer, with the edge's own report on the last."""

    def __init__(self, student: EdgeStudent, call: Call, reason: str, node: str, is_degraded: bool) -> None:
        self._student = student
        self._call = call
        self._reason = reason
        self._node = node
        self._is_degraded = is_degraded
        self._begun_s = time.monotonic()
        self._ttft_s: float | None = None
        self._events = student.open(call)
        self._first: AnswerEvent | None = None
        self._is_open = True
        self.is_done = False

    async def prime(self) -> None:
        """Wait for the first event."""
        self._first = await self._read()
        self._note_served()

    async def next(self) -> AnswerEvent | None:
        """The next event, None after the last."""
        if self._first is not None:
            event, self._first = self._first, None
            return event
        return None if self.is_done else await self._read()

    async def close(self) -> None:
        """Stop the model if it has not ended. Safe to call again."""
        if not self._is_open:
            return
        self._is_open = False
        self._student.closed(time.monotonic() - self._begun_s, is_whole=self.is_done)
        with contextlib.suppress(LongshoreError):
            await self._events.aclose()  # type: ignore[attr-defined]  # an async generator

    async def _read(self) -> AnswerEvent | None:
        try:
            event = await anext(self._events)
        except StopAsyncIteration:
            raise DeviceError("the edge's student stopped without an end of the answer") from None
        if isinstance(event, FinishEvent) and event.report is not None:
            self.is_done = True
            event = dataclasses.replace(event, report=self._report(event.report))
        return event

    def _note_served(self) -> None:
        if self._ttft_s is None:
            self._ttft_s = time.monotonic()
            elapsed_s = self._ttft_s - self._begun_s
            self._call.note("edge", "served", self._reason, node=self._node, elapsed_s=elapsed_s)

    def _report(self, report: Report) -> Report:
        call, now_s = self._call, time.monotonic()
        ttft_s = self._ttft_s or now_s
        hop = Hop(
            "edge",
            self._node,
            queue_ms=round((self._begun_s - call.arrived_s) * 1e3, 3),
            ttft_ms=round((ttft_s - call.arrived_s) * 1e3, 3),
            total_ms=round((now_s - call.arrived_s) * 1e3, 3),
        )
        self._note_served()
        segments = tuple(
            dataclasses.replace(segment, tier="edge", node=self._node) for segment in report.segments
        )
        return dataclasses.replace(
            report,
            request_id=call.request_id,
            served_by="edge",
            node=self._node,
            reason=self._reason[:2000],
            degraded=self._is_degraded,
            attempts=tuple(call.attempts),
            hops=(hop,),
            segments=segments,
        )


class StudentStream:
    """The events as server-sent events."""

    is_cacheable = False

    def __init__(self, events: StudentEvents, call: Call, model: str) -> None:
        self._events = events
        make = ChatRenderer if isinstance(call.request, ChatRequest) else CompletionRenderer
        self._renderer = make(
            request_id=call.request_id,
            model=model,
            created=int(time.time()),
            num_choices=call.num_choices,
            include_usage=call.wants_usage,
        )
        self.num_tokens = 0

    async def next_block(self) -> bytes | None:
        """The chunks of the next event; the last block ends with the end mark."""
        event = await self._events.next()
        if event is None:
            return None
        self.num_tokens += isinstance(event, TokenEvent)
        block = b"".join(encode_data(chunk) for chunk in self._renderer.chunks(event))
        return block + DONE if self._events.is_done else block

    async def close(self) -> None:
        """Stop the model if it has not ended."""
        await self._events.close()


async def _whole(events: StudentEvents, call: Call, model: str) -> WholeAnswer:
    collector = AnswerCollector(call.num_choices)
    while (event := await events.next()) is not None:
        collector.add(event)
    await events.close()
    is_chat = isinstance(call.request, ChatRequest)
    make = collector.chat_completion if is_chat else collector.completion
    answer = make(request_id=call.request_id, model=model, created=int(time.time()))
    return WholeAnswer(dump_json(encode(answer)), is_cacheable=False)


def open_student(config: EdgeConfig) -> EdgeStudent | None:
    """The student of the settings, not yet loaded; raises BundleError when its manifest can't be used."""
    if config.student_bundle is None:
        return None
    try:
        return EdgeStudent(config)
    except ImportError as error:
        raise BundleError(f"student_bundle needs longshore[device]: {error}") from None
