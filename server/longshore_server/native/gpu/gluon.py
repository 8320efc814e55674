"""Whether our kernels in Gluon, Triton's lower language, can be used; imported on CUDA only."""

from __future__ import annotations

import functools
import logging

import torch
import triton

logger = logging.getLogger(__name__)

GLUON_VERSION = ("3", "6")  # of Triton: the language changes from one to the next
HOPPER = 9  # major number of the compute capability whose instructions they take


@functools.cache
def knows_gluon() -> bool:
    """Whether Triton is the one whose Gluon the kernels are written in; where not, it says so once."""
    if tuple(triton.__version__.split(".")[:2]) == GLUON_VERSION:
        return True
    words = "decodes take slower kernels: the faster ones are written in Gluon of Triton %s, this is %s"
    logger.warning(words, ".".join(GLUON_VERSION), triton.__version__)
    return False


@functools.cache
def has_gluon(device: torch.device) -> bool:
    """Whether this is a Hopper GPU and a Triton that we know."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == HOPPER and knows_gluon()
