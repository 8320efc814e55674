"""The small model on this device: requests in, answer events out, one answer at a time.

Owns the line before the model process and that process's starts; the model itself runs in it (child.py).
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import threading
import time
import weakref
from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self, cast

from longshore.bundle import check_runtime, load_bundle, load_trust, read_manifest
from longshore.detokenize import IncrementalText
from longshore.device.answer import AnswerWriter
from longshore.device.calibrate import Calibration
from longshore.device.call import Call
from longshore.device.draft import Draft, load_draft
from longshore.device.encoder import Encoded
from longshore.device.image_plan import ImagePolicy, KeptSizes
from longshore.device.plan import ChoicePlan, Plan, make_plan, read_prompts
from longshore.device.process import Channel, ModelProcess
from longshore.device.resolution import (
    PRIOR_DECODE_MS_PER_PIXEL,
    VisionCalibration,
    device_score,
    moved,
    prior_calibration,
)
from longshore.device.settings import DeviceSettings
from longshore.device.text import StudentText
from longshore.device.turn import Turnstile
from longshore.errors import (
    BundleDamagedError,
    BundleIncompatibleError,
    ConfigError,
    DeviceError,
    LongshoreError,
)
from longshore.wire import AnswerEvent, AnyRequest, FinishReason, Manifest, Variant


class Student:
    """A bundle's model, answering on this device.

    Making one reads the manifest and nothing else. `start` checks every file, loads the model into a process
    of its own and measures it; the first request does so where `start` was not called. Safe to use from
    several threads and event loops. Raises BundleError where the bundle can't be used.
    """

    def __init__(self, bundle_dir: Path | str, *, settings: DeviceSettings = DeviceSettings()) -> None:  # noqa: B008
        self._bundle_dir = Path(bundle_dir)
        self._settings = settings
        self.manifest: Manifest = read_manifest(self._bundle_dir)
        self._variant = _choose_variant(self.manifest, settings.variant)
        self._turnstile = Turnstile(settings.max_waiting)
        self._lock = threading.RLock()
        self._process: ModelProcess | None = None
        self._starting: ModelProcess | None = None
        self._finalizer: weakref.finalize[..., Student] | None = None
        self._calibration: Calibration | None = None
        self._text: StudentText | None = None
        self._draft: Draft | None = None
        self._kept_sizes = KeptSizes()
        self._decode_ms_per_pixel = PRIOR_DECODE_MS_PER_PIXEL
        self._is_closed = False

    # --- what routing looks at ---

    @property
    def num_waiting(self) -> int:
        """Requests that wait for the session; at most the setting `max_waiting`."""
        return self._turnstile.num_waiting

    @property
    def is_busy(self) -> bool:
        """True while a request has the session."""
        return self._turnstile.is_taken

    @property
    def calibration(self) -> Calibration | None:
        """What the last start measured; None before the first."""
        return self._calibration

    @property
    def process_id(self) -> int | None:
        """The model process, for those who watch it; None while there is none."""
        process = self._process
        return process.pid if process is not None and process.is_alive else None

    def count_prompt_tokens(self, request: AnyRequest) -> int:
        """Tokens of the request's prompts together, pictures included.

        InvalidRequestError or a subclass where they can't be made.
        """
        prompts, _ = read_prompts(request, self.manifest, self._texts(), self._image_policy(None))
        return sum(map(len, prompts))

    def expected_ttft_s(self, request: AnyRequest) -> float:
        """Time to the first token while nothing else is asked, in seconds: reading pictures, then the prompt.

        Raises as `count_prompt_tokens`, and DeviceError before the first start has measured anything.
        """
        calibration = self._calibration
        if calibration is None:
            raise DeviceError("this student was not measured yet")
        prompts, images = read_prompts(request, self.manifest, self._texts(), self._image_policy(None))
        vision = self.vision_calibration
        image_ms = sum(vision.encode_ms(image.use.width_px * image.use.height_px) for image in images)
        image_ms += self._decode_ms_per_pixel * sum(image.num_pixels for image in images)
        return calibration.expected_ttft_s(sum(map(len, prompts))) + image_ms / 1e3

    @property
    def vision_calibration(self) -> VisionCalibration:
        """What pictures cost here: measured at the last start and with each since; before that, a guess."""
        calibration = self._calibration
        if calibration is not None and calibration.vision is not None:
            return calibration.vision
        return prior_calibration(device_score(os.cpu_count() or 1, self._settings.num_threads))

    def predicted_image_ms(self) -> float:
        """The encoder's time for one picture, at most: of the largest size, or the whole budget."""
        largest = max((b.width_px * b.height_px for b in self.manifest.vision_buckets), default=0)
        return min(self.vision_calibration.encode_ms(largest), self._settings.image_budget_ms)

    # --- start and end ---

    def start(self) -> Calibration:
        """Check, load and measure the model; nothing happens while it runs already.

        Raises BundleDamagedError, BundleIncompatibleError, ConfigError where onnxruntime is not installed,
        and DeviceError where the model process fails.
        """
        with self._lock:
            if self._is_closed:
                raise DeviceError("this student is closed")
            if self._calibration is not None and self._process is not None and self._process.is_alive:
                return self._calibration
            self._end_process()
            self._check_bundle()
            check_runtime(self.manifest, _onnxruntime_version())
            self._texts()
            self._calibration = self._start_process()
            return self._calibration

    def close(self) -> None:
        """End the model process; a request or a start in flight ends in DeviceError. Safe to call again."""
        self._is_closed = True
        starting = self._starting
        if starting is not None:
            starting.kill()  # the start gives up at once, and lets go of the lock
        with self._lock:
            self._end_process()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    # --- answering ---

    def stream(
        self, request: AnyRequest, *, deadline_s: float | None = None
    ) -> Generator[AnswerEvent, None, None]:
        """The answer's events; closing the iterator cancels it within one step of the model.

        `deadline_s` is a time of `time.monotonic()`; without it the request's own `deadline_ms` counts from
        now. Raises InvalidRequestError or a subclass (PromptTooLongError) here, and QueueFullError,
        DeadlineExceededError or DeviceError as it is read. The last FinishEvent has usage and report.
        """
        call = Call(_deadline(request, deadline_s))
        writer = AnswerWriter(self._plan(request, call), self._texts(), self.manifest.model_digest)
        return self._events(call, writer)

    async def astream(
        self, request: AnyRequest, *, deadline_s: float | None = None
    ) -> AsyncGenerator[AnswerEvent, None]:
        """As `stream`; cancelling the task or closing the iterator cancels the answer."""
        call = Call(_deadline(request, deadline_s))
        loop = asyncio.get_running_loop()
        out: asyncio.Queue[AnswerEvent | BaseException | None] = asyncio.Queue()

        def pump() -> None:
            ending: BaseException | None = None
            try:
                plan = self._plan(request, call)
                for event in self._events(
                    call, AnswerWriter(plan, self._texts(), self.manifest.model_digest)
                ):
                    loop.call_soon_threadsafe(out.put_nowait, event)
            except BaseException as error:  # handed to the reader, who raises it
                ending = error
            with suppress(RuntimeError):  # the loop is closed: nobody reads any more
                loop.call_soon_threadsafe(out.put_nowait, ending)

        threading.Thread(target=pump, name="longshore-device", daemon=True).start()
        try:
            while (item := await out.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            call.cancel()
            self._turnstile.nudge()

    def _plan(self, request: AnyRequest, call: Call) -> Plan:
        plan = make_plan(request, self.manifest, self._texts(), self._image_policy(call.deadline_s))
        for image in plan.images:
            self._kept_sizes.put(image.digest, (image.use.width_px, image.use.height_px))
        return plan

    def _image_policy(self, deadline_s: float | None) -> ImagePolicy:
        budget_ms = self._settings.image_budget_ms
        if deadline_s is not None:
            budget_ms = min(budget_ms, max(0.0, (deadline_s - time.monotonic()) * 1e3 / 2))
        return ImagePolicy(self.vision_calibration, budget_ms, self._kept_sizes, self._decode_ms_per_pixel)

    def _events(self, call: Call, writer: AnswerWriter) -> Generator[AnswerEvent, None, None]:
        try:
            self._turnstile.enter(call, call.is_cancelled, call.deadline_s)
            call.begun_s = time.monotonic()
            for choice in writer.plan.choices:
                yield from self._choice(call, writer, choice)
        except LongshoreError as error:
            error.request_id, error.tokens_delivered = writer.plan.request_id, call.num_tokens
            raise
        finally:
            call.end(self._settings.cancel_grace_s)
            self._turnstile.leave(call)

    def _choice(
        self, call: Call, writer: AnswerWriter, choice: ChoicePlan
    ) -> Generator[AnswerEvent, None, None]:
        detokenizer = self._texts().incremental(writer.plan.stop_strings)
        detokenizer.prime(choice.generated)
        reason = "stop" if detokenizer.stopped else writer.plan.ending(choice)
        if reason is None:
            reason = yield from self._tokens(call, writer, choice, detokenizer)
        rest = detokenizer.flush()
        yield writer.finish(choice, "stop" if detokenizer.stopped else reason, rest.text, call)

    def _tokens(
        self, call: Call, writer: AnswerWriter, choice: ChoicePlan, detokenizer: IncrementalText
    ) -> Generator[AnswerEvent, None, FinishReason]:
        """The tokens of one choice as events; gives why they ended."""
        process, channel = self._submit(call, writer, choice)
        while True:
            frame = call.next_frame(process, channel)
            self._learn(writer.plan, frame.get("encoded", ()))
            event = writer.token(choice, detokenizer, frame)
            if event is not None:
                call.count_token()
                yield event
            if detokenizer.stopped or "ending" in frame:
                call.num_cached += frame.get("num_cached", 0)
                call.end(self._settings.cancel_grace_s)  # after a stop string it would go on
                return "stop" if detokenizer.stopped else cast(FinishReason, frame["ending"])

    def _submit(self, call: Call, writer: AnswerWriter, choice: ChoicePlan) -> tuple[ModelProcess, Channel]:
        """Hand the choice to the model process, which is started again where it had died."""
        with self._lock:
            self.start()
            process = self._process
        if process is None:
            raise DeviceError("this student is closed")
        is_last = choice is writer.plan.choices[-1]

        def ended() -> None:
            if is_last:  # the next request may have the session, however slowly this answer is read
                self._turnstile.leave(call)

        channel = process.submit(writer.plan.job(choice), ended)
        call.attach(process, channel)
        return process, channel

    def _learn(self, plan: Plan, encoded: Sequence[Encoded]) -> None:
        """Take in how long pictures took."""
        for index, decode_ms, encode_ms in encoded:
            image, calibration = plan.images[index], self._calibration
            self._decode_ms_per_pixel = moved(self._decode_ms_per_pixel, decode_ms / image.num_pixels)
            if calibration is not None and calibration.vision is not None:
                vision = calibration.vision.refined(image.use.width_px * image.use.height_px, encode_ms)
                self._calibration = dataclasses.replace(calibration, vision=vision)

    # --- the process ---

    def _start_process(self) -> Calibration:
        process = self._starting = ModelProcess()
        finalizer = weakref.finalize(self, process.close)
        try:
            if self._is_closed:
                raise DeviceError("this student is closed")
            ready = process.load(self._load_frame(), self._settings.start_timeout_s)
        except BaseException:
            finalizer()
            raise
        finally:
            self._starting = None
        self._process, self._finalizer = process, finalizer
        prefill = ready["prefill_tokens_per_s"]
        vision = None
        if "encode" in ready:
            small_pixels, small_ms, large_pixels, large_ms = ready["encode"]
            vision = VisionCalibration(small_pixels, small_ms, large_pixels, large_ms, prefill)
        return Calibration(ready["load_s"], prefill, ready["decode_tokens_per_s"], vision)

    def _check_bundle(self) -> None:
        trust = self._settings.trust
        trusted_keys = load_trust(trust) if trust is not None else None
        if load_bundle(self._bundle_dir, trusted_keys=trusted_keys) != self.manifest:
            raise BundleDamagedError(f"the bundle at {self._bundle_dir} changed after it was opened")
        if self._settings.draft is not None:
            self._draft = load_draft(self._settings.draft, self.manifest, trusted_keys)
            check_runtime(self._draft.manifest, _onnxruntime_version())

    def _load_frame(self) -> dict[str, object]:
        settings, prefill, vision = self._settings, self._variant.prefill_file, self.manifest.vision
        folder = self._bundle_dir.resolve()
        return {
            "model": str(folder / self._variant.file),
            "prefill_model": str(folder / prefill) if prefill else None,
            "encoder": str(folder / vision.encoder_file) if vision else None,
            "vision": dataclasses.asdict(vision) if vision else None,
            "image_sizes": [(bucket.width_px, bucket.height_px) for bucket in self.manifest.vision_buckets],
            "operators": list(self._variant.required_operators),
            "kv": dataclasses.asdict(self.manifest.kv),
            "num_threads": settings.num_threads,
            "chunk": settings.prefill_chunk_tokens,
            "calibration_s": settings.calibration_s,
            # int8 rounds activations over all rows of a call, so that guesses would change the answer.
            "speculation": settings.speculation and self._variant.precision != "int8",
            "draft": self._draft.load_frame() if self._draft is not None else None,
            "memory_limit_bytes": settings.memory_limit_bytes,
        }

    def _end_process(self) -> None:
        if self._finalizer is not None:
            self._finalizer()
        self._process, self._finalizer = None, None

    def _texts(self) -> StudentText:
        text = self._text  # without the lock, which a start holds for long; read twice, it is the same
        if text is None:
            text = self._text = StudentText(self._bundle_dir, self.manifest)
        return text


def _choose_variant(manifest: Manifest, name: str | None) -> Variant:
    """The graph to run: the one of that name, else the first that this runtime can run."""
    for variant in manifest.variants:
        if name in (None, variant.name):
            return variant
    known = ", ".join(variant.name for variant in manifest.variants)
    raise BundleIncompatibleError(f"bundle {manifest.name} has no variant {name or 'at all'}; it has {known}")


def _onnxruntime_version() -> str:
    """The installed version, without importing it: only the model process does."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("onnxruntime")
    except PackageNotFoundError:
        raise ConfigError("the device tier needs more packages: install longshore[device]") from None


def _deadline(request: AnyRequest, deadline_s: float | None) -> float | None:
    deadline_ms = request.longshore.deadline_ms
    if deadline_s is not None or deadline_ms is None:
        return deadline_s
    return time.monotonic() + deadline_ms / 1e3
