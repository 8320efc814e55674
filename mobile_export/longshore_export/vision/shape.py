"""What the encoder's builder needs to know of a SmolVLM, read from its Hugging Face folder.

Refuses, by name, every setting that the graph would not carry out. Knows no ONNX.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from longshore.errors import ExportError
from longshore.wire import VisionBucket, VisionGeometry

ENCODER_NAME = "vision.onnx"
FAMILY = "smolvlm"
PROCESSOR_NAME = "preprocessor_config.json"
MEAN = [0.5, 0.5, 0.5]  # a byte becomes byte / 127.5 - 1, on every tier


@dataclass(frozen=True, slots=True)
class VisionShape:
    """Sizes of tower and connector; `hidden_size` is the decoder's, `buckets` the sizes on offer."""

    width: int
    num_layers: int
    num_heads: int
    patch_px: int
    positions_per_side: int
    scale_factor: int
    layer_norm_eps: float
    hidden_size: int
    image_token_id: int
    buckets: tuple[VisionBucket, ...]

    @property
    def unit_px(self) -> int:
        """The side of a picture's token in pixels."""
        return self.patch_px * self.scale_factor

    @property
    def geometry(self) -> VisionGeometry:
        """As a bundle's manifest tells it."""
        return VisionGeometry(ENCODER_NAME, self.image_token_id, self.unit_px, self.hidden_size)

    @property
    def max_patches_per_side(self) -> int:
        """The longest side that the graph has places for."""
        largest = max(max(bucket.width_px, bucket.height_px) for bucket in self.buckets)
        return max(self.positions_per_side, largest // self.patch_px)


def read_vision_shape(config: Any, processor: dict[str, Any]) -> VisionShape:
    """The shape of a SmolVLM configuration and its preprocessor_config.json.

    Raises ExportError naming what is not known, or what is wrong with a bucket.
    """
    vision = config.vision_config
    for name in ("image_size", "patch_size"):
        if not isinstance(getattr(vision, name), int):
            raise ExportError(f"the tower's {name} must be one number, not {getattr(vision, name)}")
    if vision.hidden_act != "gelu_pytorch_tanh":
        raise ExportError(f"the tower's activation must be tanh GELU, not {vision.hidden_act!r}")
    if processor.get("image_mean", MEAN) != MEAN or processor.get("image_std", MEAN) != MEAN:
        raise ExportError("pictures must be scaled to -1..1: mean and deviation 0.5")
    unit_px = vision.patch_size * config.scale_factor
    return VisionShape(
        width=vision.hidden_size,
        num_layers=vision.num_hidden_layers,
        num_heads=vision.num_attention_heads,
        patch_px=vision.patch_size,
        positions_per_side=vision.image_size // vision.patch_size,
        scale_factor=config.scale_factor,
        layer_norm_eps=vision.layer_norm_eps,
        hidden_size=config.text_config.hidden_size,
        image_token_id=config.image_token_id,
        buckets=_buckets(processor, unit_px),
    )


def _buckets(processor: dict[str, Any], unit_px: int) -> tuple[VisionBucket, ...]:
    """The listed sizes; each must be whole tokens, and as many as transformers' connector can arrange."""
    listed = processor.get("buckets")
    if not isinstance(listed, list) or not listed:
        raise ExportError(f"{PROCESSOR_NAME} lists no buckets: [[width_px, height_px, num_tokens], ...]")
    try:
        buckets = tuple(VisionBucket(*map(int, item)) for item in listed)
    except (TypeError, ValueError):
        raise ExportError(f"a bucket in {PROCESSOR_NAME} is not [width_px, height_px, num_tokens]") from None
    for bucket in buckets:
        width, height = bucket.width_px // unit_px, bucket.height_px // unit_px
        is_whole = (width * unit_px, height * unit_px) == (bucket.width_px, bucket.height_px)
        if not is_whole or not width or not height or bucket.num_tokens != width * height:
            raise ExportError(
                f"the bucket {bucket.width_px} x {bucket.height_px} is not {bucket.num_tokens} "
                f"squares of {unit_px} pixels"
            )
        if round(bucket.num_tokens**0.5) ** 2 != bucket.num_tokens:
            raise ExportError(
                f"{bucket.width_px} x {bucket.height_px} is {bucket.num_tokens} tokens, and SmolVLM's pixel "
                "shuffle takes square numbers alone"
            )
    return buckets
