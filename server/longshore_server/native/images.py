"""Images of a request: their pixels, and which of the prompt's tokens each stands for. No torch, no I/O.

Decoding and resizing are not done here: an image comes as the bytes that the vision tower's input is made of.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from longshore_server.native.errors import InvalidRequestError

FIELD = "images"
MAX_IMAGES = 64
MAX_REQUEST_PIXELS = 2 * 1024 * 1024  # of all images of a request, in the size that the tower sees
# What one step encodes beside its first image: decodes wait for it. A CPU core takes about two seconds for a
# million pixels with a tower as small as Shop's, a GPU some milliseconds.
CPU_STEP_PIXELS = 128 * 1024
GPU_STEP_PIXELS = 2 * 1024 * 1024
CHANNELS = 3


@dataclass(frozen=True, slots=True)
class ImageInput:
    """An image in the size that the tower sees; `rgb` holds height x width x 3 bytes, row by row.

    `digest` names size and pixels: SHA-256, because a client chooses them and must not forge a match.
    """

    height_px: int
    width_px: int
    rgb: bytes = field(repr=False)
    digest: bytes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        head = f"{self.height_px}x{self.width_px}:".encode()
        object.__setattr__(self, "digest", hashlib.sha256(head + self.rgb).digest())

    @property
    def num_pixels(self) -> int:
        return self.height_px * self.width_px


@dataclass(frozen=True, slots=True)
class PlacedImage:
    """An image and the tokens of its sequence, `start` to `stop`, that stand for it."""

    image: ImageInput
    start: int
    stop: int

    def overlaps(self, start: int, stop: int) -> bool:
        return self.start < stop and start < self.stop


@dataclass(frozen=True, slots=True)
class ImageGeometry:
    """How a model takes images: the token that stands for a square of `unit_px` by `unit_px` pixels.

    Images must be square: transformers' connector of SmolVLM takes the root of the number of patches for both
    sides, so another grid would be read wrongly or not at all.
    """

    image_token_id: int
    unit_px: int

    def place(self, prompt: SequenceOf[int], images: SequenceOf[ImageInput]) -> tuple[PlacedImage, ...]:
        """Gives each image its tokens, in order; raises InvalidRequestError where they don't match."""
        self._check(images)
        places = [index for index, token in enumerate(prompt) if token == self.image_token_id]
        placed: list[PlacedImage] = []
        taken = 0
        for number, image in enumerate(images):
            count = image.num_pixels // self.unit_px**2
            mine = places[taken : taken + count]
            if len(mine) < count or mine[-1] - mine[0] != count - 1:
                raise InvalidRequestError(FIELD, f"image {number} does not have {count} tokens in a row")
            placed.append(PlacedImage(image, mine[0], mine[0] + count))
            taken += count
        if taken < len(places):
            raise InvalidRequestError(FIELD, f"{len(places) - taken} image tokens stand for no image")
        return tuple(placed)

    def _check(self, images: SequenceOf[ImageInput]) -> None:
        if len(images) > MAX_IMAGES:
            raise InvalidRequestError(FIELD, f"{len(images)} images are over the bound of {MAX_IMAGES}")
        for number, image in enumerate(images):
            if image.height_px != image.width_px:
                raise InvalidRequestError(FIELD, f"image {number} must be square")
            if image.width_px < 1 or image.width_px % self.unit_px:
                raise InvalidRequestError(
                    FIELD, f"image {number}: its sides must be multiples of {self.unit_px} pixels"
                )
            if len(image.rgb) != image.num_pixels * CHANNELS:
                raise InvalidRequestError(FIELD, f"image {number} has not {CHANNELS} bytes for each pixel")
        if sum(image.num_pixels for image in images) > MAX_REQUEST_PIXELS:
            raise InvalidRequestError(FIELD, f"together they have more than {MAX_REQUEST_PIXELS} pixels")


def content_digest(images: SequenceOf[PlacedImage], start: int, stop: int) -> bytes:
    """What the images among the tokens `start` to `stop` add to those tokens' digest; empty without any."""
    shown = [each.image.digest for each in images if each.overlaps(start, stop)]
    return hashlib.sha256(b"".join(shown)).digest() if shown else b""


def fit_pixels(
    images: SequenceOf[PlacedImage], start: int, num_tokens: int, max_pixels: int, *, is_first: bool
) -> tuple[int, int]:
    """How many of the tokens from `start` on a step can take, and the pixels that it encodes for them.

    It stops before the first image that is over `max_pixels`; a step's first image is taken in any case.
    """
    num_pixels = 0
    for each in images:
        if not each.overlaps(start, start + num_tokens):
            continue
        more = num_pixels + each.image.num_pixels
        if more > max_pixels and not is_first:
            return max(0, each.start - start), num_pixels
        num_pixels, is_first = more, False
    return num_tokens, num_pixels
