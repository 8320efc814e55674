"""The pictures of a request made ready: taken out of their URLs, bounded, each given the size to be read at.

Looks at headers and decodes no pixel; the model process does that.
"""

from __future__ import annotations

import base64
import hashlib
import math
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from longshore.device.resolution import Choice, VisionCalibration, choose
from longshore.errors import BodyTooLargeError, InvalidImageError, LongshoreError
from longshore.images import image_bytes, image_size
from longshore.wire import AnyRequest, ChatRequest, ImageUrl, ImageUse, Manifest, VisionBucket

MAX_IMAGES_BYTES = 16 * 1024 * 1024  # of one request's pictures together, as files
_MAX_KEPT_SIZES = 256
_PRIOR_ANSWER_TOKENS = 64
_LEAST_ROOM = 4  # an answer is left at least this part of the context


class KeptSizes:
    """At which size each of the last few pictures was read, so that a later turn reads it no smaller."""

    def __init__(self) -> None:
        self._sizes: OrderedDict[str, tuple[int, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, digest: str) -> tuple[int, int] | None:
        """(width, height) in pixels; None for a picture that is not known."""
        with self._lock:
            return self._sizes.get(digest)

    def put(self, digest: str, size: tuple[int, int]) -> None:
        """Remember it, and forget the one that was put longest ago where there are too many."""
        with self._lock:
            self._sizes[digest] = size
            self._sizes.move_to_end(digest)
            if len(self._sizes) > _MAX_KEPT_SIZES:
                self._sizes.popitem(last=False)


@dataclass(frozen=True, slots=True)
class ImagePolicy:
    """What the choice of sizes goes by: measured speed, the time for all of a prompt, earlier sizes.

    `decode_ms_per_pixel` is what opening a file takes, whatever size it is read at.
    """

    calibration: VisionCalibration
    budget_ms: float
    kept: KeptSizes
    decode_ms_per_pixel: float = 0.0


@dataclass(frozen=True, slots=True)
class PlannedImage:
    """A picture of the prompt: its file, the digest of that, and how it will be read."""

    data: bytes = field(repr=False)
    digest: str
    param: str  # where in the request it stands
    num_pixels: int  # of the file
    use: ImageUse

    def job(self) -> dict[str, Any]:
        """The picture as the model process takes it."""
        return {
            "data": base64.b64encode(self.data).decode(),
            "digest": self.digest,
            "param": self.param,
            "width_px": self.use.width_px,
            "height_px": self.use.height_px,
            "num_tokens": self.use.num_tokens,
        }


def plan_images(
    request: AnyRequest, manifest: Manifest, num_text_tokens: int, policy: ImagePolicy
) -> tuple[PlannedImage, ...]:
    """The pictures in the order of the prompt; time and context are shared out evenly.

    Raises InvalidImageError naming the part, BodyTooLargeError where they are too much together.
    """
    found = list(_images(request))
    num_bytes, planned = 0, []
    for param, image in found:
        data, size = _read(param, image)
        num_bytes += len(data)
        if num_bytes > MAX_IMAGES_BYTES:
            raise BodyTooLargeError(f"the pictures are over {MAX_IMAGES_BYTES} bytes", param="messages")
        digest = hashlib.sha256(data).hexdigest()
        room = _room(request, manifest, num_text_tokens) / len(found)
        decode_ms = policy.decode_ms_per_pixel * size[0] * size[1]
        budget_ms = policy.budget_ms / len(found) - decode_ms
        choice = choose(
            manifest.vision_buckets,
            *size,
            detail=image.detail,
            calibration=policy.calibration,
            num_text_tokens=num_text_tokens / len(found),
            budget_ms=budget_ms,
            room_tokens=room,
        )
        use = _kept(digest, choice, manifest, policy, room, budget_ms) or _use(choice, decode_ms)
        planned.append(PlannedImage(data, digest, param, size[0] * size[1], use))
    return tuple(planned)


def _images(request: AnyRequest) -> Iterator[tuple[str, ImageUrl]]:
    """(where it stands, the image) of each, in order."""
    for number, message in enumerate(request.messages if isinstance(request, ChatRequest) else ()):
        for index, part in enumerate(() if isinstance(message.content, str) else message.content):
            if part.image_url is not None:
                yield f"messages[{number}].content[{index}].image_url", part.image_url


def _read(param: str, image: ImageUrl) -> tuple[bytes, tuple[int, int]]:
    try:
        data = image_bytes(image.url)
        return data, image_size(data)
    except LongshoreError as error:
        if isinstance(error, InvalidImageError):
            raise InvalidImageError(f"{param}: {error.message}", param=param) from None
        raise


def _room(request: AnyRequest, manifest: Manifest, num_text_tokens: int) -> float:
    """Tokens of the context that pictures may have, beside the text and the answer to come."""
    context = manifest.kv.max_tokens
    answer = min(request.token_limit or _PRIOR_ANSWER_TOKENS, context // _LEAST_ROOM)
    return context - num_text_tokens - answer


def _kept(
    digest: str, choice: Choice, manifest: Manifest, policy: ImagePolicy, room: float, budget_ms: float
) -> ImageUse | None:
    """The size of an earlier turn, where it is larger than the choice: its rows are likely still there."""
    size = policy.kept.get(digest)
    for bucket in manifest.vision_buckets:
        if (bucket.width_px, bucket.height_px) != size or choice.why not in ("budget", "quickest"):
            continue
        read_ms = 1000 * bucket.num_tokens / policy.calibration.prefill_tokens_per_s
        if _pixels(bucket) > _pixels(choice.bucket) and bucket.num_tokens <= room and read_ms <= budget_ms:
            return ImageUse(bucket.width_px, bucket.height_px, bucket.num_tokens, "kept", _told(read_ms))
    return None


def _use(choice: Choice, decode_ms: float) -> ImageUse:
    bucket = choice.bucket
    predicted_ms = None if choice.predicted_ms is None else _told(choice.predicted_ms + decode_ms)
    return ImageUse(bucket.width_px, bucket.height_px, bucket.num_tokens, choice.why, predicted_ms)


def _told(value_ms: float) -> float:
    """Rounded, and inside the wire's bound."""
    return round(min(value_ms, 1e9), 3) if math.isfinite(value_ms) else 1e9


def _pixels(bucket: VisionBucket) -> int:
    return bucket.width_px * bucket.height_px
