"""Which of cuBLASLt's algorithms was measured fastest for a product: tables by chip and shape, kept as JSON.

A table counts for the chip and the version of the library that it was measured with; for all others there is
none, and torch asks the library. `native/gemm/tuned` holds those that come along, a model's folder its own.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from longshore_server.native.errors import ModelLoadError

FILE_NAME = "gemm_plans.json"
FORMAT = 1
DTYPES = ("bfloat16", "float16", "float8_e4m3fn")
TUNED_FOLDER = Path(__file__).parent / "tuned"
MAX_NUMBER = 2**31 - 1


class Algorithm(NamedTuple):
    """The numbers that cuBLASLt calls an algorithm's configuration, in its own order of attributes."""

    id: int
    tile: int
    split_k: int
    reduction: int
    swizzle: int
    custom_option: int
    stages: int
    inner_shape: int
    cluster_shape: int


class Product(NamedTuple):
    """What is multiplied: rows and a weight [num_outputs, width] of torch's type `dtype`."""

    dtype: str  # one of DTYPES
    num_outputs: int
    width: int


class Plan(NamedTuple):
    """The algorithm for so many rows."""

    first_row: int
    last_row: int
    algorithm: Algorithm


@dataclass
class Plans:
    """Plans of one chip; those of a product are in order and do not overlap."""

    device_name: str
    cublaslt_version: int
    products: dict[Product, list[Plan]] = field(default_factory=dict)

    def find(self, product: Product, num_rows: int) -> Algorithm | None:
        """None where torch's own choice stands."""
        plans = self.products.get(product, [])
        place = bisect_left(plans, num_rows, key=lambda plan: plan.last_row)
        if place == len(plans) or plans[place].first_row > num_rows:
            return None
        return plans[place].algorithm

    def write(self, path: Path) -> None:
        """One line for each plan, so that tables can be read and compared."""
        lines = [
            json.dumps(
                {**product._asdict(), "rows": [plan.first_row, plan.last_row], "algorithm": [*plan.algorithm]}
            )
            for product, plans in sorted(self.products.items())
            for plan in plans
        ]
        head = {"format": FORMAT, "device_name": self.device_name, "cublaslt_version": self.cublaslt_version}
        path.write_text(f'{json.dumps(head)[:-1]}, "plans": [\n ' + ",\n ".join(lines) + "\n]}\n")


def dtype_name(dtype: Any) -> str:
    """A type of torch's as tables write it."""
    return str(dtype).removeprefix("torch.")


def read_plans(path: Path) -> Plans:
    """Raises ModelLoadError, in one line, for a file that is not a table of plans."""
    try:
        return _parse(json.loads(path.read_bytes()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelLoadError(f"{path} is no table of matrix products: {error!r}") from error


def packaged_file(device_name: str) -> Path:
    """Where the table of a chip stands among those that come along, if there is one."""
    return TUNED_FOLDER / (re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-") + ".json")


def find_plans(device_name: str, cublaslt_version: int, model_folder: Path) -> list[Plans]:
    """The tables for this chip and library: the model's own before the one that comes along."""
    files = [model_folder / FILE_NAME, packaged_file(device_name)]
    tables = [read_plans(path) for path in files if path.is_file()]
    return [t for t in tables if (t.device_name, t.cublaslt_version) == (device_name, cublaslt_version)]


def _parse(raw: dict[str, Any]) -> Plans:
    if raw["format"] != FORMAT:
        raise ValueError(f"format {raw['format']!r}")
    plans = Plans(str(raw["device_name"]), _number(raw["cublaslt_version"]))
    for entry in raw["plans"]:
        first_row, last_row = map(_number, entry["rows"])
        numbers = [_number(value) for value in entry["algorithm"]]
        product = Product(str(entry["dtype"]), _number(entry["num_outputs"]), _number(entry["width"]))
        if product.dtype not in DTYPES:
            raise ValueError(f"type {product.dtype}")
        before = plans.products.setdefault(product, [])
        if not (before[-1].last_row if before else 0) < first_row <= last_row:
            raise ValueError(f"rows {first_row} to {last_row} of {product}")
        before.append(Plan(first_row, last_row, Algorithm(*numbers)))
    return plans


def _number(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= MAX_NUMBER:
        raise ValueError(f"{value!r} is no number of a table")
    return value
