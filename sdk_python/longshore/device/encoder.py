"""Pictures in the model process: decoded, encoded, and kept for the next question about the same one.

Owns the encoder's session and the rows that it gives; where they go in a prompt is the generation loop's.
"""

from __future__ import annotations

import hashlib
import statistics
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longshore.errors import BundleIncompatibleError, InvalidImageError
from longshore.images import pixel_values
from longshore.wire import VisionGeometry

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAX_KEPT_BYTES = 32 * 1024 * 1024
MOST_OF_BUDGET = 2.5

Encoded = tuple[
    int, float, float
]  # number of the picture in its prompt, milliseconds of decoding, of encoding


@dataclass(frozen=True, slots=True)
class JobImage:
    """A picture of a prompt: the bytes of its file, their SHA-256 in hexadecimal, the size to read it at.

    `param` says where in the request it stands.
    """

    data: bytes = field(repr=False)
    digest: str
    width_px: int
    height_px: int
    num_tokens: int
    param: str = ""

    @property
    def key(self) -> int:
        """Names picture and size; negative, so that it is no token id."""
        text = f"{self.digest} {self.width_px} {self.height_px}"
        return -1 - int.from_bytes(hashlib.sha256(text.encode()).digest())


def position_keys(tokens: Sequence[int], images: Sequence[JobImage], image_token_id: int | None) -> list[int]:
    """The tokens, with what is shown in place of each image token: equal keys give equal keys and values."""
    keys = list(tokens)
    if image_token_id is None or not images:
        return keys
    shown = iter([image.key for image in images for _ in range(image.num_tokens)])
    for position, token_id in enumerate(keys):
        if token_id == image_token_id:
            keys[position] = next(shown)
    return keys


class PictureEncoder:
    """The session of a bundle's picture encoder, and the rows of the pictures that it saw last."""

    def __init__(self, path: Path, vision: VisionGeometry, num_threads: int) -> None:
        import onnxruntime

        from longshore.device.session import session_options

        self.image_token_id = vision.image_token_id
        self._hidden_size = vision.hidden_size
        options = session_options(onnxruntime, num_threads)
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._check_interface()
        self._kept: OrderedDict[int, NDArray[np.float32]] = OrderedDict()
        self._num_kept_bytes = 0

    def encode(self, planes: NDArray[np.float32]) -> NDArray[np.float32]:
        """Pixels [3, height, width] to rows [num_tokens, hidden]."""
        rows: NDArray[np.float32] = self._session.run(["image_features"], {"pixel_values": planes[None]})[0]
        return rows

    def rows(self, image: JobImage) -> tuple[NDArray[np.float32], tuple[float, float] | None]:
        """The picture's rows, and the milliseconds of decoding and encoding; None where they were kept.

        Raises InvalidImageError for what can't be decoded, BundleIncompatibleError for rows of another shape.
        """
        known = self._kept.get(image.key)
        if known is not None:
            self._kept.move_to_end(image.key)
            return known, None
        begin_s = time.perf_counter()
        planes = pixel_values(image.data, image.width_px, image.height_px)
        decoded_s = time.perf_counter()
        rows = self.encode(planes)
        if rows.shape != (image.num_tokens, self._hidden_size):
            raise BundleIncompatibleError(f"the encoder gave {rows.shape} for {image.num_tokens} tokens")
        encode_ms = (time.perf_counter() - decoded_s) * 1e3
        self._keep(image.key, rows)
        return rows, ((decoded_s - begin_s) * 1e3, encode_ms)

    def _keep(self, key: int, rows: NDArray[np.float32]) -> None:
        self._kept[key] = rows
        self._num_kept_bytes += rows.nbytes
        while self._num_kept_bytes > MAX_KEPT_BYTES:
            self._num_kept_bytes -= self._kept.popitem(last=False)[1].nbytes

    def _check_interface(self) -> None:
        inputs = {item.name for item in self._session.get_inputs()}
        outputs = {item.name: item.shape for item in self._session.get_outputs()}
        width = (outputs.get("image_features") or [None])[-1]
        is_right = inputs == {"pixel_values"} and (
            width == self._hidden_size or isinstance(width, str | None)
        )
        if "image_features" not in outputs or not is_right:
            raise BundleIncompatibleError(
                "the encoder's inputs and outputs are not those that this runtime feeds"
            )


class PromptPictures:
    """The rows of one prompt's pictures, each encoded when its first row is asked for."""

    def __init__(self, images: Sequence[JobImage], encoder: PictureEncoder | None) -> None:
        self._images = images
        self._encoder = encoder
        self._encoded: list[Encoded] = []

    def rows(self, first: int, num_rows: int, is_cancelled: Callable[[], bool]) -> NDArray[np.float32] | None:
        """Rows [num_rows, hidden] of all the prompt's image tokens from `first` on; None if cancelled."""
        import numpy as np

        parts: list[NDArray[np.float32]] = []
        begin = 0
        for index, image in enumerate(self._images):
            end = begin + image.num_tokens
            if begin < first + num_rows and end > first:
                if is_cancelled():
                    return None
                parts.append(self._of(index, image)[max(0, first - begin) : first + num_rows - begin])
            begin = end
        return np.concatenate(parts)

    def take_encoded(self) -> tuple[Encoded, ...]:
        """What was encoded since this was asked last."""
        encoded, self._encoded = tuple(self._encoded), []
        return encoded

    def _of(self, index: int, image: JobImage) -> NDArray[np.float32]:
        assert self._encoder is not None
        try:
            rows, times_ms = self._encoder.rows(image)
        except InvalidImageError as error:
            raise InvalidImageError(f"{image.param}: {error.message}", param=image.param) from None
        if times_ms is not None:
            self._encoded.append((index, *times_ms))
        return rows


# -- measuring ---------------------------------------------------------------------------------


def measure_encoder(
    run: Callable[[int, int], object], sizes: Sequence[tuple[int, int]], budget_s: float
) -> tuple[int, float, int, float]:
    """(pixels, milliseconds) at the smallest of `sizes` and at a larger one, after a run that does not count.

    The larger one is the largest that, by its pixels, takes two and a half budgets at most, and at least the
    next: attention makes time grow faster than pixels, so a line drawn too short would promise too much. It
    never takes less than the smallest: a disturbed measurement that says so would favour large pictures.
    """
    by_size = sorted(sizes, key=lambda size: size[0] * size[1])
    small = by_size[0]
    run(*small)  # the first run allocates and is no measure
    small_s = _median_s(run, small, budget_s / 2)
    pixels = small[0] * small[1]
    most_s = MOST_OF_BUDGET * budget_s
    affordable = [size for size in by_size if size[0] * size[1] / pixels * small_s <= most_s]
    large = max(affordable[-1:] + by_size[1:2] or [small], key=lambda size: size[0] * size[1])
    large_s = small_s if large == small else max(small_s, _median_s(run, large, 0.0))
    return pixels, small_s * 1e3, large[0] * large[1], large_s * 1e3


def _median_s(run: Callable[[int, int], object], size: tuple[int, int], budget_s: float) -> float:
    times: list[float] = []
    end_s = time.perf_counter() + budget_s
    while not times or (len(times) < 9 and time.perf_counter() < end_s):
        begin_s = time.perf_counter()
        run(*size)
        times.append(time.perf_counter() - begin_s)
    return max(statistics.median(times), 1e-9)


def blank(width_px: int, height_px: int) -> Any:
    """Pixels [3, height, width] of nothing, to measure with."""
    import numpy as np

    return np.zeros((3, height_px, width_px), np.float32)
