"""The device tier as the clients use it: starts the student beside them and tells routing what it can do.

Imports `longshore.device` only where a device was asked for.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from longshore.errors import (
    BundleError,
    ConfigError,
    DeadlineExceededError,
    DeviceError,
    LongshoreError,
    RequestError,
)
from longshore.policy import TierView, estimate_prompt_tokens
from longshore.wire import AnswerEvent, AnyRequest, ModelCard

if TYPE_CHECKING:
    from longshore.device import DeviceSettings, Student

NODE = "device"
_LOAD_PRIOR_MS = 2000.0
_POLL_S = 0.005
_MAX_COUNTED_TOKENS = 50_000  # a longer prompt is only estimated: counting it would take too long here


class OnDevice:
    """One student, started in the background; a Student that was passed in is not closed with the client."""

    def __init__(
        self,
        device: Path | str | Student,
        settings: DeviceSettings | None,
        clock: Callable[[], float],
    ) -> None:
        self._owns_student = isinstance(device, str | Path)
        self.student = _open_student(device, settings) if isinstance(device, str | Path) else device
        self._clock = clock
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._started_s = 0.0
        self._is_settled = threading.Event()
        self.final_error: LongshoreError | None = None
        self._passing_error: LongshoreError | None = None

    def start_in_background(self) -> None:
        """Load and calibrate without holding up the caller; safe to call again."""
        with self._lock:
            if self._thread is None:
                self._started_s = self._clock()
                self._thread = threading.Thread(
                    target=self._start, name="longshore-device-start", daemon=True
                )
                self._thread.start()

    def close(self) -> None:
        """End the student, if it was made here."""
        if self._owns_student:
            self.student.close()
        if self._thread is not None:
            self._thread.join(timeout=5.0)

    def describe(self, view: TierView, now_s: float) -> TierView:
        """The measured view with what the student itself knows."""
        calibration = self.student.calibration
        if self.final_error is not None:
            return replace(view, broken=f"{self.final_error.code}: {self.final_error.message}")
        takes_images = self.student.manifest.vision is not None
        image_ms = self.student.predicted_image_ms() if takes_images else 0.0
        view = replace(view, takes_images=takes_images, image_ms=image_ms)
        if calibration is None:
            spent_ms = (now_s - self._started_s) * 1000 if self._thread is not None else 0.0
            return replace(view, ready_in_ms=max(0.0, _LOAD_PRIOR_MS - spent_ms))
        others = self.student.num_waiting + int(self.student.is_busy) - view.num_in_flight
        ms_per_token = 1000 / max(calibration.decode_tokens_per_s, 1e-3)
        return replace(
            view,
            prefill_tokens_per_s=calibration.prefill_tokens_per_s,
            ms_per_token=view.ms_per_token if view.ms_per_token is not None else ms_per_token,
            num_queued=max(0, others),
            max_model_len=self.student.manifest.kv.max_tokens,
        )

    def count_prompt_tokens(self, request: AnyRequest) -> int | None:
        """The exact length, once the student is loaded; None where only an estimate is to be had."""
        if self.student.calibration is None or estimate_prompt_tokens(request) > _MAX_COUNTED_TOKENS:
            return None
        try:
            return self.student.count_prompt_tokens(request)
        except (RequestError, ConfigError):  # told when the device is asked
            return None

    def model_card(self) -> ModelCard:
        """The student as an entry of the list of models."""
        manifest = self.student.manifest
        return ModelCard(
            manifest.name,
            max_model_len=manifest.kv.max_tokens,
            model_digest=manifest.model_digest,
            input_modalities=("text",) if manifest.vision is None else ("text", "image"),
        )

    def stream(
        self, request: AnyRequest, first_token_by_s: float, deadline_s: float
    ) -> Iterator[AnswerEvent]:
        """The answer's events; closing the iterator cancels the generation."""
        self.start_in_background()
        if not self._is_settled.wait(max(0.0, first_token_by_s - self._clock())):
            raise DeadlineExceededError("the device was still loading its model")
        self._raise_start_error()
        return self.student.stream(request, deadline_s=deadline_s)

    async def astream(
        self, request: AnyRequest, first_token_by_s: float, deadline_s: float
    ) -> AsyncGenerator[AnswerEvent, None]:
        """The same for asyncio; here each wait is bounded too."""
        self.start_in_background()
        by_s = first_token_by_s
        try:
            async with asyncio.timeout(by_s - self._clock()):
                while not self._is_settled.is_set():
                    await asyncio.sleep(_POLL_S)
            self._raise_start_error()
            async with _closing(self.student.astream(request, deadline_s=deadline_s)) as events:
                while True:
                    async with asyncio.timeout(by_s - self._clock()):
                        event = await anext(events, None)
                    if event is None:
                        return
                    by_s = deadline_s
                    yield event
        except TimeoutError:
            raise DeadlineExceededError("the device took longer than it was given") from None

    def _start(self) -> None:
        try:
            self.student.start()
        except (ConfigError, BundleError) as error:
            self.final_error = error
        except LongshoreError as error:
            self._passing_error = error
        except Exception as error:  # a thread has nobody above it: the next request tells
            words = f"the device did not start: {type(error).__name__}: {error}"
            self._passing_error = DeviceError(words)
        finally:
            self._is_settled.set()

    def _raise_start_error(self) -> None:
        """A student whose process failed starts anew with the next request; a bad bundle stays bad."""
        if self.final_error is not None:
            raise self.final_error
        error, self._passing_error = self._passing_error, None
        if error is not None:
            raise error


def _closing(
    events: AsyncIterator[AnswerEvent],
) -> AbstractAsyncContextManager[AsyncGenerator[AnswerEvent, None]]:
    """Close the student's generator with ours, so that leaving cancels the generation at once."""
    return aclosing(cast("AsyncGenerator[AnswerEvent, None]", events))


def _open_student(device: Path | str, settings: DeviceSettings | None) -> Student:
    try:
        from longshore.device import DeviceSettings, Student
    except ImportError as error:
        raise ConfigError(
            f'the device tier needs `pip install "longshore[device]"` ({error.name} is missing)',
            param="device",
        ) from None
    return Student(device, settings=settings if settings is not None else DeviceSettings())
