"""Pictures in a task's messages: OpenAI's `image_url` parts with data: URLs, none scaled down needlessly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from longshore.device.resolution import choose
from longshore.errors import ExportError
from longshore.images import image_bytes, image_size, pixel_values
from longshore.wire import VisionBucket
from longshore_export.vision.checkpoint import VisionCheckpoint
from longshore_export.vision.shape import VisionShape
from longshore_export.vision.verify import torch_features


@dataclass(frozen=True, slots=True)
class Picture:
    """The bytes of a picture's file, and the size to read it at."""

    data: bytes = field(repr=False)
    bucket: VisionBucket


def embedded(vision: VisionCheckpoint, token_ids: list[int], pictures: Sequence[Picture]) -> torch.Tensor:
    """The embeddings [tokens, hidden] of a prompt, its pictures' features in their places."""
    rows = [
        torch_features(vision.model, pixel_values(item.data, item.bucket.width_px, item.bucket.height_px))
        for item in pictures
    ]
    ids = torch.tensor(token_ids)
    with torch.no_grad():
        table: torch.Tensor = vision.model.get_input_embeddings()(ids)
    table[ids == vision.shape.image_token_id] = torch.from_numpy(np.concatenate(rows))
    return table


class Sight:
    """Puts the pictures of one prompt into its text; `pictures` are those met so far, in order."""

    def __init__(self, shape: VisionShape | None, tokenizer: Any) -> None:
        self.pictures: list[Picture] = []
        self._shape = shape
        self._token = tokenizer.id_to_token(shape.image_token_id) if shape else ""

    def text(self, content: Any, guard: Callable[[str], str]) -> str:
        """The prompt text of a message's content; its texts go through `guard`."""
        if isinstance(content, str):
            return guard(content)
        return "".join(
            guard(str(part["text"])) if part["type"] == "text" else self._picture(part["image_url"]["url"])
            for part in content
        )

    def _picture(self, url: str) -> str:
        if self._shape is None:
            raise ExportError("the task has pictures, and the model takes none")
        data = image_bytes(url)
        bucket = choose(self._shape.buckets, *image_size(data)).bucket
        self.pictures.append(Picture(data, bucket))
        return self._token * bucket.num_tokens
