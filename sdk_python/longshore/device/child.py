"""The model process: loads one graph under limits, answers one job at a time, and ends with its parent.

    in    load {model, prefill_model, encoder, kv, vision, image_sizes, num_threads, chunk, calibration_s,
          speculation, draft, memory_limit_bytes}, job {...}, cancel {id}
    out   ready {...}, token {id, token_id, offset, ...}, end {id, reason}, refused {id, message, param},
          error {id, kind, message}

It opens no socket and no file but the model's, and holds no text of anyone. Pictures are decoded here and not
in the app, so that a decoder's fault or appetite ends with this process.
"""

from __future__ import annotations

import base64
import math
import os
import queue
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from longshore.device.frames import Frame, read_frame, write_frame
from longshore.errors import BundleIncompatibleError, InvalidImageError

if TYPE_CHECKING:
    from longshore.device.encoder import JobImage, PictureEncoder
    from longshore.device.generate import GeneratedToken, Generator, Job
    from longshore.device.speculate import Proposer
    from longshore.wire import VisionGeometry

EXIT_FAILED = 70
PARENT_POLL_S = 1.0
_MAX_FILE_BYTES = 1024 * 1024


class _Inbox:
    """Frames from the parent, read by a thread of their own, so that a cancel is seen between two tokens."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._frames: queue.SimpleQueue[Frame] = queue.SimpleQueue()
        self._cancelled_up_to = -1
        threading.Thread(target=self._read, daemon=True).start()

    def get(self) -> Frame:
        return self._frames.get()

    def is_cancelled(self, job_id: int) -> bool:
        return job_id <= self._cancelled_up_to

    def _read(self) -> None:
        with suppress(BaseException):
            while (frame := read_frame(self._stream)) is not None:
                if frame["type"] == "cancel":
                    self._cancelled_up_to = frame["id"]
                else:
                    self._frames.put(frame)
        os._exit(0)  # the parent is gone or closed the pipe; nobody waits for what is being computed


def main() -> None:
    """Serve the parent on stdin and stdout until it leaves."""
    source, sink = sys.stdin.buffer, _claim_stdout()
    threading.Thread(target=_leave_with_parent, args=(os.getppid(),), daemon=True).start()
    inbox = _Inbox(source)
    try:
        generator = _load(inbox.get(), sink)
        while True:
            _answer(generator, inbox, inbox.get(), sink)
    except BrokenPipeError:
        os._exit(0)
    except BaseException as error:  # whatever a model makes the runtime raise is told, then ends this process
        _tell_failure(sink, error)
        os._exit(EXIT_FAILED)


def _claim_stdout() -> BinaryIO:
    """The pipe to the parent; anything that a library prints goes to stderr instead."""
    sink = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return sink


def _leave_with_parent(parent: int) -> None:
    """End when the parent has ended, even where another process still holds its end of the pipe."""
    while os.getppid() == parent:
        time.sleep(PARENT_POLL_S)
    os._exit(0)


def _tell_failure(sink: BinaryIO, error: BaseException) -> None:
    kind = "memory" if isinstance(error, MemoryError) or "alloc" in str(error).lower() else "failed"
    kind = "incompatible" if isinstance(error, BundleIncompatibleError) else kind
    message = f"{type(error).__name__}: {error}"[:500].encode("utf-8", "replace").decode()
    with suppress(BaseException):
        write_frame(sink, {"type": "error", "id": None, "kind": kind, "message": message})


# --- loading ---


def _load(frame: Frame, sink: BinaryIO) -> Generator:
    _limit(frame["memory_limit_bytes"])
    begin_s = time.perf_counter()
    import onnxruntime

    from longshore.device.calibrate import choose_threads, measure
    from longshore.device.generate import Generator
    from longshore.device.operators import refuse_unknown
    from longshore.device.session import DecoderSession
    from longshore.wire import KvGeometry, VisionGeometry

    refuse_unknown(frame["operators"])
    prefill_path = Path(frame["prefill_model"]) if frame["prefill_model"] else None
    vision = VisionGeometry(**frame["vision"]) if frame["vision"] else None

    def open_session(num_threads: int) -> DecoderSession:
        kv = KvGeometry(**frame["kv"])
        return DecoderSession(Path(frame["model"]), kv, num_threads, prefill_path, vision)

    if frame["num_threads"]:
        session = open_session(frame["num_threads"])
    else:
        session = choose_threads(open_session, frame["calibration_s"], os.cpu_count() or 1)
    encoder = _open_encoder(frame, vision, session.num_threads)
    load_s = time.perf_counter() - begin_s
    prefill, decode = measure(session, frame["calibration_s"])
    ready: Frame = {"load_s": load_s, "prefill_tokens_per_s": prefill, "decode_tokens_per_s": decode}
    ready |= {"vocab_size": session.vocab_size, "onnxruntime": onnxruntime.__version__}
    if encoder is not None:
        ready["encode"] = _measure_encoder(encoder, frame["image_sizes"], frame["calibration_s"])
    write_frame(sink, {"type": "ready", **ready})
    return Generator(session, frame["chunk"], _open_proposer(frame, session.num_threads), encoder)


def _open_proposer(frame: Frame, num_threads: int) -> Proposer | None:
    """What guesses ahead: a smaller model where there is one, else the lookup."""
    from longshore.device.session import DecoderSession
    from longshore.device.speculate import DraftModel, PromptLookup
    from longshore.wire import KvGeometry

    draft = frame["draft"]
    if not frame["speculation"]:
        return None
    if draft is None:
        return PromptLookup()
    prefill_path = Path(draft["prefill_model"]) if draft["prefill_model"] else None
    kv = KvGeometry(**draft["kv"])
    return DraftModel(DecoderSession(Path(draft["model"]), kv, num_threads, prefill_path))


def _open_encoder(frame: Frame, vision: VisionGeometry | None, num_threads: int) -> PictureEncoder | None:
    from longshore.device.encoder import PictureEncoder

    return PictureEncoder(Path(frame["encoder"]), vision, num_threads) if vision is not None else None


def _measure_encoder(
    encoder: PictureEncoder, sizes: list[tuple[int, int]], budget_s: float
) -> tuple[int, float, int, float]:
    from longshore.device.encoder import blank, measure_encoder

    return measure_encoder(lambda width, height: encoder.encode(blank(width, height)), sizes, budget_s)


def _limit(memory_bytes: int) -> None:
    """Cap private writable memory, and forbid core dumps and large files, where the system can.

    RLIMIT_DATA counts heap and private mappings and not the mapped libraries, so that the cap means what it
    says; macOS and Windows have no such limit, and there the cap is not enforced.
    """
    try:
        import resource
    except ImportError:
        return
    for name, value in (
        ("RLIMIT_DATA", memory_bytes),
        ("RLIMIT_CORE", 0),
        ("RLIMIT_FSIZE", _MAX_FILE_BYTES),
    ):
        kind = getattr(resource, name)
        _, hard = resource.getrlimit(kind)
        wanted = value if hard == resource.RLIM_INFINITY else min(value, hard)
        with suppress(ValueError, OSError):
            resource.setrlimit(kind, (wanted, wanted))


# --- answering ---


def _answer(generator: Generator, inbox: _Inbox, frame: Frame, sink: BinaryIO) -> None:
    job_id = frame["id"]

    def emit(token: GeneratedToken) -> None:
        sampled = token.sampled
        out: Frame = {"type": "token", "id": job_id, "token_id": sampled.token_id, "offset": token.offset}
        if token.num_cached:
            out["num_cached"] = token.num_cached
        if token.encoded:
            out["encoded"] = token.encoded
        if sampled.logprob is not None:
            out |= {"logprob": sampled.logprob, "top_logprobs": sampled.top_logprobs}
        if token.ending is not None:
            out["ending"] = token.ending
        write_frame(sink, out)

    try:
        reason = generator.run(_job(frame), emit, lambda: inbox.is_cancelled(job_id))
    except InvalidImageError as error:
        refused = {"type": "refused", "id": job_id, "message": error.message, "param": error.param}
        write_frame(sink, refused)
        return
    write_frame(sink, {"type": "end", "id": job_id, "reason": reason})


def _job(frame: Frame) -> Job:
    from longshore.device.generate import Job
    from longshore.device.sampling import SamplingSettings

    sampling = dict(frame["sampling"])
    sampling["logit_bias"] = {int(key): value for key, value in sampling.get("logit_bias", {}).items()}
    for token_id in frame["never"]:
        sampling["logit_bias"][token_id] = -math.inf
    return Job(
        prompt=tuple(frame["prompt"]),
        generated=tuple(frame["generated"]),
        max_tokens=frame["max_tokens"],
        stop_token_ids=tuple(frame["stop_token_ids"]),
        sampling=SamplingSettings(**sampling),
        images=tuple(map(_image, frame["images"])),
    )


def _image(fields: Frame) -> JobImage:
    from longshore.device.encoder import JobImage

    return JobImage(**fields | {"data": base64.b64decode(fields["data"])})


if __name__ == "__main__":
    main()
