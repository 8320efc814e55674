"""Where each weight lies in a folder's safetensors files; checks headers before anything is read.

It reads no weight and knows no model. Format: https://github.com/huggingface/safetensors (README, "Format").
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from longshore_server.native.errors import ModelLoadError

INDEX_NAME = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100 * 1024 * 1024  # the format's own limit
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Place:
    """One weight: its file, its first byte there, its dtype and shape."""

    path: Path
    offset: int
    num_bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def locate(folder: Path) -> dict[str, Place]:
    """Every weight of the folder by name; raises ModelLoadError for a file that is missing or damaged."""
    index = _read_index(folder)
    files = sorted(set(index.values())) if index else sorted(p.name for p in folder.glob("*.safetensors"))
    places: dict[str, Place] = {}
    for name in files:
        found = _places_in(folder / name)
        if twice := places.keys() & found.keys():
            raise ModelLoadError(f"{folder} has {min(twice)} in two files")
        places |= found
    for weight, name in index.items():
        if weight not in places or places[weight].path.name != name:
            raise ModelLoadError(f"{folder}/{name} lacks {weight}, which the index says is there")
    return places


def _read_index(folder: Path) -> dict[str, str]:
    path = folder / INDEX_NAME
    if not path.is_file():
        return {}
    try:
        names = json.loads(path.read_bytes())["weight_map"]
        if not all(isinstance(n, str) and Path(n).name == n for n in names.values()):
            raise ValueError("it names files outside the folder")
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise ModelLoadError(f"{path} is damaged: {error}") from error
    return dict(names)


def _places_in(path: Path) -> dict[str, Place]:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if header_bytes > min(MAX_HEADER_BYTES, size - 8):
                raise ValueError("the header is longer than the file")
            header = json.loads(file.read(header_bytes))
        header.pop("__metadata__", None)
        places = {name: _place(path, 8 + header_bytes, entry) for name, entry in header.items()}
        _check_bytes(places, 8 + header_bytes, size)
    except FileNotFoundError as error:
        raise ModelLoadError(f"{path} is missing") from error
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise ModelLoadError(f"{path} is damaged: {str(error) or type(error).__name__}") from error
    return places


def _place(path: Path, data_start: int, entry: dict[str, Any]) -> Place:
    start, stop = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if not all(type(number) is int and number >= 0 for number in (start, stop, *shape)):
        raise ValueError("a shape or an offset is not a number")
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"a weight has the unknown type {entry['dtype']}")
    dtype = DTYPES[entry["dtype"]]
    if stop - start != math.prod(shape) * dtype.itemsize:
        raise ValueError("a weight's shape and its bytes disagree")
    return Place(path, data_start + start, stop - start, dtype, shape)


def _check_bytes(places: dict[str, Place], data_start: int, size: int) -> None:
    """The format's rule: the weights fill the file, without holes and without overlap."""
    end = data_start
    for place in sorted(places.values(), key=lambda each: (each.offset, each.num_bytes)):
        if place.offset != end:
            raise ValueError("weights overlap or leave holes")
        end += place.num_bytes
    if end != size:
        raise ValueError(f"it has {size} bytes, and its header speaks of {end}")
