"""The picture sizes of a model, and which of them a request's pictures are read at. It decodes nothing.

There is no time budget here, as there is on a device: a picture is read as large as that adds something and
as the context holds it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longshore.device.resolution import useful_buckets
from longshore.errors import ConfigError, InvalidRequestError, OutOfRangeError
from longshore.wire import ImageReason, ImageUse, VisionBucket, decode


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture's own size; `is_low` where the request asks for little detail."""

    width_px: int
    height_px: int
    is_low: bool = False


@dataclass(frozen=True, slots=True)
class ImageSizes:
    """The token that stands for a piece of a picture, and the sizes that a model takes, smallest first."""

    image_token_id: int
    buckets: tuple[VisionBucket, ...]

    @classmethod
    def load(cls, folder: Path) -> ImageSizes | None:
        """Those of a Hugging Face folder; None where the model does not see or names no sizes.

        The sizes are `buckets` in preprocessor_config.json: width, height, tokens. Raises ConfigError, in one
        line, for sizes that the model can't take.
        """
        config, processor = (
            _read_json(folder / name) for name in ("config.json", "preprocessor_config.json")
        )
        if "vision_config" not in config or not processor.get("buckets"):
            return None
        try:
            unit_px = config["vision_config"]["patch_size"] * config["scale_factor"]
            buckets = [_bucket(row, unit_px) for row in processor["buckets"]]
            return cls(int(config["image_token_id"]), tuple(sorted(buckets, key=_num_pixels)))
        except (KeyError, TypeError, ValueError, InvalidRequestError) as error:
            raise ConfigError(f"model: the picture sizes of {folder} can't be used: {error}") from None

    def choose(
        self, pictures: Sequence[Picture], *, max_tokens: int, max_pixels: int
    ) -> tuple[ImageUse, ...]:
        """The size that each picture is read at: the largest that adds something, or the smallest if asked.

        Where they are too much together, the largest are read smaller, as far as there are smaller sizes.
        Raises OutOfRangeError where even so they have more than `max_pixels`.
        """
        full = [len(useful_buckets(self.buckets, each.width_px, each.height_px)) - 1 for each in pictures]
        asked = [0 if each.is_low else best for each, best in zip(pictures, full, strict=True)]
        chosen = list(asked)
        while self._is_over(chosen, max_tokens, max_pixels) and any(chosen):
            chosen[chosen.index(max(chosen))] -= 1
        if sum(_num_pixels(self.buckets[index]) for index in chosen) > max_pixels:
            raise OutOfRangeError(
                f"messages: {len(chosen)} pictures are too many for so many choices", param="messages"
            )
        return tuple(map(self._use, chosen, full, asked))

    def _is_over(self, chosen: Sequence[int], max_tokens: int, max_pixels: int) -> bool:
        buckets = [self.buckets[index] for index in chosen]
        num_tokens = sum(bucket.num_tokens for bucket in buckets)
        return num_tokens > max_tokens or sum(map(_num_pixels, buckets)) > max_pixels

    def _use(self, index: int, full: int, asked: int) -> ImageUse:
        bucket = self.buckets[index]
        why: ImageReason = "full" if index == full else "asked" if index == asked else "context"
        return ImageUse(bucket.width_px, bucket.height_px, bucket.num_tokens, why)

    def expand(self, prompt: tuple[int, ...], uses: Sequence[ImageUse], param: str) -> tuple[int, ...]:
        """The prompt with each picture's one token as often as the picture has tokens.

        Raises InvalidRequestError where the prompt has places for another number of pictures.
        """
        num_places = prompt.count(self.image_token_id)
        if num_places != len(uses):
            raise InvalidRequestError(
                f"{param}: the prompt has places for {num_places} pictures, and {len(uses)} are given",
                param=param,
            )
        sizes = iter(uses)
        expanded: list[int] = []
        for token_id in prompt if uses else ():
            is_place = token_id == self.image_token_id
            expanded += [token_id] * (next(sizes).num_tokens if is_place else 1)
        return tuple(expanded) if uses else prompt


def _bucket(row: Any, unit_px: int) -> VisionBucket:
    """Squares alone: the connector of transformers' SmolVLM takes the patches' root for both sides."""
    width_px, height_px, num_tokens = row
    size = {"width_px": width_px, "height_px": height_px, "num_tokens": num_tokens}
    bucket = decode(VisionBucket, size)
    if width_px != height_px or width_px % unit_px or num_tokens != (width_px // unit_px) ** 2:
        raise ValueError(f"{row} is no square of whole units of {unit_px} pixels, with a token for each")
    return bucket


def _num_pixels(bucket: VisionBucket) -> int:
    return bucket.width_px * bucket.height_px


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes()) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"model: can't read {path}: {error}") from None
    return value if isinstance(value, dict) else {}
