"""Which size a picture is read at: the largest whose answer begins inside the time budget. Pure functions.

`examples/android` has the same rule in Kotlin; the golden vectors hold both to it. Measures nothing itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from longshore.wire import ImageReason, VisionBucket

Detail = Literal["auto", "low", "high"]

# What one core is taken for before anything was measured: about that of a phone of 2022.
_PRIOR_ENCODE_MS_PER_PIXEL = 2e-3
_PRIOR_PREFILL_TOKENS_PER_S = 1000.0
PRIOR_DECODE_MS_PER_PIXEL = 2e-5
_PRIOR_SMALL_PIXELS, _PRIOR_LARGE_PIXELS = 64 * 64, 256 * 256
_MOST_USEFUL_CORES = 8
# A new measurement moves the figures by a quarter of the way, and no single one by more than threefold.
_WEIGHT = 0.25
_MOST_OFF = 3.0


@dataclass(frozen=True, slots=True)
class VisionCalibration:
    """What was measured here: the encoder's time at two sizes, and how fast a prompt is read.

    Between and beyond the two sizes the encoder's time is a straight line in pixels.
    """

    small_pixels: int
    small_encode_ms: float
    large_pixels: int
    large_encode_ms: float
    prefill_tokens_per_s: float

    def encode_ms(self, pixels: int) -> float:
        """The encoder's expected time for a picture of so many pixels, in milliseconds."""
        slope = (self.large_encode_ms - self.small_encode_ms) / max(1, self.large_pixels - self.small_pixels)
        return max(0.0, self.small_encode_ms + slope * (pixels - self.small_pixels))

    def predicted_ms(self, bucket: VisionBucket, num_text_tokens: float) -> float:
        """The expected time until the answer begins, with `num_text_tokens` of text beside the picture."""
        prefill_ms = 1000.0 * (bucket.num_tokens + num_text_tokens) / self.prefill_tokens_per_s
        return self.encode_ms(bucket.width_px * bucket.height_px) + prefill_ms

    def refined(self, pixels: int, encode_ms: float) -> VisionCalibration:
        """The figures after one more picture was encoded, in so many milliseconds."""
        factor = moved(1.0, encode_ms / max(self.encode_ms(pixels), 1e-6))
        return replace(
            self,
            small_encode_ms=self.small_encode_ms * factor,
            large_encode_ms=self.large_encode_ms * factor,
        )


def moved(before: float, measured: float) -> float:
    """A quarter of the way from a figure to a measurement of it, which counts as at most threefold off."""
    bounded = min(max(measured, before / _MOST_OFF), before * _MOST_OFF)
    return before + _WEIGHT * (bounded - before)


def device_score(num_cores: int, num_threads: int) -> float:
    """How many times faster than one core this device is taken to be, before it was measured.

    Threads share memory's bandwidth, so that each one more is worth less; clocks are not asked, since what a
    system says of them tells nothing between makes. `num_threads` 0 is as many as there are cores.
    """
    useful = min(num_cores, num_threads or num_cores, _MOST_USEFUL_CORES)
    return math.pow(max(1, useful), 0.7)


def prior_calibration(score: float) -> VisionCalibration:
    """What a device of this score is taken for until it is measured."""
    per_pixel_ms = _PRIOR_ENCODE_MS_PER_PIXEL / score
    return VisionCalibration(
        _PRIOR_SMALL_PIXELS,
        per_pixel_ms * _PRIOR_SMALL_PIXELS,
        _PRIOR_LARGE_PIXELS,
        per_pixel_ms * _PRIOR_LARGE_PIXELS,
        _PRIOR_PREFILL_TOKENS_PER_S * score,
    )


# -- choosing ----------------------------------------------------------------------------------


def useful_buckets(buckets: Sequence[VisionBucket], width_px: int, height_px: int) -> list[VisionBucket]:
    """By size, up to the first that holds a picture of this size whole: beyond it, nothing is to be seen."""
    by_size = sorted(buckets, key=lambda bucket: bucket.width_px * bucket.height_px)
    for number, bucket in enumerate(by_size, 1):
        if bucket.width_px >= width_px and bucket.height_px >= height_px:
            return by_size[:number]
    return by_size


def choose_bucket(
    buckets: Sequence[VisionBucket],
    width_px: int,
    height_px: int,
    calibration: VisionCalibration,
    num_text_tokens: float,
    budget_ms: float,
) -> VisionBucket | None:
    """The useful bucket with the most pixels inside the budget; where none is, the one with the fewest.

    None for a model that takes no pictures.
    """
    useful = useful_buckets(buckets, width_px, height_px)
    inside = [item for item in useful if calibration.predicted_ms(item, num_text_tokens) <= budget_ms]
    candidates = inside or useful[:1]
    return candidates[-1] if candidates else None


@dataclass(frozen=True, slots=True)
class Choice:
    """A size, why it was no larger, and the time to the first token that this went by."""

    bucket: VisionBucket
    why: ImageReason
    predicted_ms: float | None


def choose(
    buckets: Sequence[VisionBucket],
    width_px: int,
    height_px: int,
    *,
    detail: Detail = "auto",
    calibration: VisionCalibration | None = None,
    num_text_tokens: float = 0.0,
    budget_ms: float = math.inf,
    room_tokens: float = math.inf,
) -> Choice:
    """`choose_bucket`, among the sizes of at most `room_tokens`, with the reason.

    `detail` is OpenAI's: `low` takes the smallest size, `high` has no time budget. Without a calibration
    there is none either. `buckets` must hold one at least; where none fits the room, the smallest is taken.
    """
    useful = useful_buckets(buckets, width_px, height_px)
    fitting = [item for item in useful if item.num_tokens <= room_tokens] or useful[:1]
    limit_ms = budget_ms if detail == "auto" and calibration is not None else math.inf
    measured = calibration or prior_calibration(1.0)
    chosen = choose_bucket(fitting, width_px, height_px, measured, num_text_tokens, limit_ms) or fitting[0]
    if detail == "low":
        chosen = fitting[0]
    predicted_ms = calibration.predicted_ms(chosen, num_text_tokens) if calibration is not None else None
    return Choice(
        chosen, _why(chosen, useful, fitting, detail, (predicted_ms or 0.0) <= limit_ms), predicted_ms
    )


def _why(
    chosen: VisionBucket,
    useful: list[VisionBucket],
    fitting: list[VisionBucket],
    detail: Detail,
    is_in_time: bool,
) -> ImageReason:
    if not is_in_time:
        return "quickest"
    if chosen == useful[-1]:
        return "full"
    if detail == "low":
        return "asked"
    return "context" if chosen == fitting[-1] else "budget"
