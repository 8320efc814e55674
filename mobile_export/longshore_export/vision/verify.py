"""Parity of a built picture encoder with torch, over many sizes. Writes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from longshore.errors import ParityError
from longshore_export.vision.checkpoint import VisionCheckpoint
from longshore_export.vision.shape import VisionShape

MAX_DIFFERENCE = 1e-4
MAX_SHARE_OF_ROUNDING = 0.25
OBLONG_UNITS = ((1, 4), (4, 1), (2, 8), (9, 4), (4, 9), (8, 2))
"""Oblong pictures whose patches make a square number, which is what the pixel shuffle takes."""
SMALL_UNITS = ((1, 1), (1, 4), (2, 2), (4, 1), (3, 3))
SEED = 21

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class EncoderParity:
    """The largest difference of a feature, and the sizes (height, width in pixels) that were compared."""

    max_difference: float
    sizes_px: tuple[tuple[int, int], ...]


def parity_sizes(shape: VisionShape) -> tuple[tuple[int, int], ...]:
    """(height, width) of every bucket, and of oblong pictures that are none."""
    unit, longest = shape.unit_px, shape.max_patches_per_side * shape.patch_px
    oblong = [(unit * height, unit * width) for height, width in OBLONG_UNITS]
    listed = [(bucket.height_px, bucket.width_px) for bucket in shape.buckets]
    return tuple(dict.fromkeys([*listed, *(size for size in oblong if max(size) <= longest)]))


def check_encoder(file: Path, vision: VisionCheckpoint) -> EncoderParity:
    """Compare the graph in `file` with torch in fp32; raises ParityError where they differ too much."""
    session, worst = _session(file), 0.0
    sizes = parity_sizes(vision.shape)
    for planes in _pictures(sizes):
        got, expected = _run(session, planes), torch_features(vision.model, planes)
        worst = max(worst, _difference(got, expected))
        if not worst <= MAX_DIFFERENCE:
            raise ParityError(
                f"a picture's feature differs from torch's by {worst:.2e}, over {MAX_DIFFERENCE:.0e}"
            )
    return EncoderParity(worst, sizes)


def check_rounded_encoder(file: Path, vision: VisionCheckpoint, emulated: Any) -> EncoderParity:
    """Compare a quantized graph with the torch model `emulated`, which rounds as the graph should.

    A sum in another order now and then moves an activation to the next step, and later layers make more of
    it. So pictures are small, and the median of several is held against what rounding changes at all;
    ParityError where it is over a quarter of that.
    """
    session, worst, shares = _session(file), 0.0, []
    sizes = tuple(
        (vision.shape.unit_px * height, vision.shape.unit_px * width) for height, width in SMALL_UNITS
    )
    for planes in _pictures(sizes):
        got = _run(session, planes)
        expected, plain = (torch_features(model, planes) for model in (emulated, vision.model))
        worst = max(worst, _difference(got, expected))
        shares.append(np.abs(got - expected).mean() / np.abs(expected - plain).mean())
    share = float(np.median(shares))
    if not share <= MAX_SHARE_OF_ROUNDING:
        raise ParityError(f"the quantized encoder differs from its emulation by {share:.0%} of the rounding")
    return EncoderParity(worst, sizes)


@torch.no_grad()
def torch_features(model: Any, planes: Floats) -> Floats:
    """What transformers makes of one picture [3, height, width]: rows [tokens, hidden]."""
    rows = model.model.get_image_features(torch.from_numpy(planes)[None, None]).pooler_output[0]
    features: Floats = rows.numpy()
    return features


def _pictures(sizes: tuple[tuple[int, int], ...]) -> Iterator[Floats]:
    rng = np.random.default_rng(SEED)
    for height, width in sizes:
        yield rng.uniform(-1, 1, (3, height, width)).astype(np.float32)


def _difference(got: Floats, expected: Floats) -> float:
    if got.shape != expected.shape:
        raise ParityError(f"the encoder gives {got.shape} for a picture, and torch {expected.shape}")
    return float(np.abs(got - expected).max())


def _session(file: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own classes share no base of their own
        raise ParityError(f"ONNX Runtime refuses the encoder: {str(error).splitlines()[0]}") from None


def _run(session: Any, planes: Floats) -> Floats:
    features: Floats = session.run(["image_features"], {"pixel_values": planes[None]})[0]
    return features
