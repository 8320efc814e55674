"""Models that see: the language model and the vision tower of a SmolVLM, and the embedding of both in a step.

The language model is served as any other; the tower encodes each image by itself, so that no image changes
another's features. Pixels come in ready; it decodes and resizes nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from longshore_server.native.attention import interface
from longshore_server.native.images import CHANNELS, ImageGeometry, ImageInput, PlacedImage
from longshore_server.native.scheduler import Chunk

SEEING_TYPES = ("smolvlm",)
MAX_CACHED_BYTES = 64 * 1024 * 1024
HALF_BYTE_RANGE = 127.5  # a byte b is the value b / 127.5 - 1
_LANGUAGE_MODEL = "_longshore_language_model"


def is_seeing(hf_config: PreTrainedConfig) -> bool:
    return hf_config.model_type in SEEING_TYPES


def build_seeing(hf_config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The class as transformers has it; only its language model attends through the paged cache."""
    attention = {"text_config": interface.ATTENTION_NAME, "vision_config": "sdpa"}
    model: PreTrainedModel = AutoModelForImageTextToText.from_config(  # type: ignore[no-untyped-call]
        hf_config, dtype=dtype, attn_implementation=attention, trust_remote_code=False
    )
    text: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        hf_config.text_config, dtype=dtype, attn_implementation=interface.ATTENTION_NAME
    )
    text.model, text.lm_head = model.model.text_model, model.lm_head
    model.__dict__[_LANGUAGE_MODEL] = text  # no submodule: all that it holds has a name in the model already
    return model


def language_model(model: PreTrainedModel) -> PreTrainedModel:
    """The causal language model inside a model that sees; another model is its own."""
    text: PreTrainedModel = model.__dict__.get(_LANGUAGE_MODEL, model)
    return text


def language_part(model: PreTrainedModel) -> nn.Module:
    """Where the decoder's layers are to be looked for: a tower has layers, too."""
    return model.model.text_model if is_seeing(model.config) else model  # type: ignore[no-any-return,union-attr]


class VisionTower:
    """Encoder and connector of a model that sees, called for one square image at a time."""

    def __init__(self, model: PreTrainedModel) -> None:
        whole: Any = model
        self._encoder = whole.model.vision_model
        self._connector = whole.model.connector
        self._patch_px: int = whole.config.vision_config.patch_size
        self._device, self._dtype = whole.device, whole.dtype
        self.geometry = ImageGeometry(whole.config.image_token_id, self._patch_px * whole.config.scale_factor)

    def encode(self, image: ImageInput) -> torch.Tensor:
        """The features of an image: [tokens, hidden]."""
        shape = (image.height_px, image.width_px, CHANNELS)
        rgb = torch.frombuffer(bytearray(image.rgb), dtype=torch.uint8).to(self._device).view(shape)
        pixels = (rgb.permute(2, 0, 1).to(torch.float32) / HALF_BYTE_RANGE - 1).to(self._dtype)
        grid = (1, image.height_px // self._patch_px, image.width_px // self._patch_px)
        every_patch = torch.ones(grid, dtype=torch.bool, device=self._device)
        encoded = self._encoder(pixel_values=pixels[None], patch_attention_mask=every_patch)
        return self._connector(encoded.last_hidden_state)[0]  # type: ignore[no-any-return]


class ImageFeatures:
    """The features of images, encoded when a step first needs them and kept for who shows the same one again.

    They are kept by tenant, as the prefix cache is, so that nobody's times tell what others show.
    """

    def __init__(self, tower: VisionTower) -> None:
        self.geometry = tower.geometry
        self._tower = tower
        self._kept: OrderedDict[tuple[str, bytes], torch.Tensor] = OrderedDict()  # oldest first
        self._kept_bytes = 0

    def shown(self, chunk: Chunk) -> Iterator[tuple[int, torch.Tensor]]:
        """From which row of the chunk on images stand, and their features there: [rows, hidden]."""
        for placed in images_of(chunk):
            start, stop = max(placed.start, chunk.start), min(placed.stop, chunk.context_len)
            features = self._of(chunk.sequence.tenant, placed.image)
            yield start - chunk.start, features[start - placed.start : stop - placed.start]

    def _of(self, tenant: str, image: ImageInput) -> torch.Tensor:
        key = (tenant, image.digest)
        features = self._kept.get(key)
        if features is None:
            features = self._kept[key] = self._tower.encode(image)
            self._kept_bytes += features.nbytes
        self._kept.move_to_end(key)
        while self._kept_bytes > MAX_CACHED_BYTES and len(self._kept) > 1:
            _, oldest = self._kept.popitem(last=False)
            self._kept_bytes -= oldest.nbytes
        return features


def images_of(chunk: Chunk) -> SequenceOf[PlacedImage]:
    """The images of which a chunk computes tokens."""
    return [each for each in chunk.sequence.images if each.overlaps(chunk.start, chunk.context_len)]


def shows_image(chunk: Chunk) -> bool:
    return bool(chunk.sequence.images and images_of(chunk))


def model_inputs(
    model: PreTrainedModel,
    features: ImageFeatures | None,
    token_ids: torch.Tensor,
    chunks: SequenceOf[Chunk],
) -> dict[str, torch.Tensor]:
    """What the language model reads of a step: its tokens, or their embeddings where it shows images."""
    if features is None or not any(shows_image(chunk) for chunk in chunks):
        return {"input_ids": token_ids[None]}  # [1, tokens]
    embedded = model.get_input_embeddings()(token_ids)  # [tokens, hidden]
    first_row = 0
    for chunk in chunks:
        for row, rows in features.shown(chunk):
            embedded[first_row + row : first_row + row + len(rows)] = rows
        first_row += chunk.num_tokens
    return {"inputs_embeds": embedded[None]}
