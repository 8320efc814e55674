"""cuBLASLt's own interface to a product's algorithm, by ctypes: torch takes the library's first guess alone.

Names and numbers are those of `cublasLt.h` (CUDA 13). The library is loaded when first asked for.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from ctypes import byref, c_float, c_int, c_int8, c_int32, c_int64, c_size_t, c_uint16, c_uint32, c_uint64

import torch

from longshore_server.native.gemm.plans import Algorithm, Product
from longshore_server.native.model.fp8 import FP8_DTYPE, unit_scale

COMPUTE_32F = 68
REAL_32F, REAL_16F, REAL_16BF, REAL_8F_E4M3 = 0, 2, 14, 28
TYPES = {torch.bfloat16: REAL_16BF, torch.float16: REAL_16F, FP8_DTYPE: REAL_8F_E4M3}
DESC_TRANSA, DESC_A_SCALE_POINTER, DESC_B_SCALE_POINTER, DESC_FAST_ACCUM = 3, 17, 18, 25
PREF_MAX_WORKSPACE_BYTES = 1
CONFIG_INNER_SHAPE_ID, CONFIG_CLUSTER_SHAPE_ID = 7, 8  # attributes of 16 bits, the others have 32
# A scheduler's counters fit; what adds up parts of a sum in the workspace was never faster.
MAX_WORKSPACE_BYTES = 64 * 1024
ALIGNMENT_BYTES = 16
ALPHA, BETA = c_float(1.0), c_float(0.0)  # of the product and of what the output held before


class CublasLtError(RuntimeError):
    """The library refuses what it was asked for."""


class _Algo(ctypes.Structure):
    _fields_ = [("data", c_uint64 * 8)]


class _HeuristicResult(ctypes.Structure):
    _fields_ = [
        ("algo", _Algo),
        ("workspace_bytes", c_size_t),
        ("state", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    ]


class CublasLt:
    """The library that torch has loaded, with a handle for one device; any thread may call it."""

    def __init__(self, device: torch.device) -> None:
        """Raises CublasLtError where the library cannot be had."""
        major = str(torch.version.cuda).partition(".")[0]
        try:
            self.lib = ctypes.CDLL(f"libcublasLt.so.{major}")
        except OSError as error:
            raise CublasLtError(str(error)) from error
        self.lib.cublasLtGetVersion.restype = c_size_t
        self.version: int = self.lib.cublasLtGetVersion()
        pointer = ctypes.c_void_p
        self.lib.cublasLtMatmul.argtypes = [pointer] * 14 + [c_size_t, pointer]
        self.handle = pointer()
        with torch.cuda.device(device):
            check(self.lib.cublasLtCreate(byref(self.handle)))
        self.unit_scale = unit_scale(device)


@functools.cache
def cublaslt_of(device: torch.device) -> CublasLt:
    """The process keeps one handle for each device, to its end."""
    return CublasLt(device)


def is_aligned(matrix: torch.Tensor) -> bool:
    """Contiguous and at a multiple of ALIGNMENT_BYTES, as vector and TMA loads of a whole matrix want it."""
    return matrix.is_contiguous() and matrix.data_ptr() % ALIGNMENT_BYTES == 0


class Matmul:
    """Rows [num_rows, width] times a weight [num_outputs, width] transposed, by one algorithm.

    Sums are in float32, FP8's with fast accumulation, as torch's are. To the library, whose matrices lie
    column by column, this is the transposed weight times the transposed rows.
    """

    def __init__(
        self, lt: CublasLt, product: Product, num_rows: int, dtype: torch.dtype, algorithm: Algorithm
    ) -> None:
        """`dtype` is the output's. Raises CublasLtError if the algorithm cannot do it."""
        self._problem = _Problem(lt, product, num_rows, dtype)
        self._algo, self._workspace_bytes = self._problem.checked(algorithm)
        self._lt, self._dtype = lt, dtype
        self._shape = num_rows, product.num_outputs

    def __call__(self, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Both contiguous, at multiples of ALIGNMENT_BYTES; in the current stream, and it can be captured."""
        device = rows.device
        output = torch.empty(self._shape, dtype=self._dtype, device=device)
        workspace = None
        if self._workspace_bytes:
            workspace = torch.empty(self._workspace_bytes, dtype=torch.uint8, device=device).data_ptr()
        of, result = self._problem, output.data_ptr()
        status = self._lt.lib.cublasLtMatmul(
            self._lt.handle, of.desc, byref(ALPHA), weight.data_ptr(), of.weight, rows.data_ptr(), of.rows,
            byref(BETA), result, of.output, result, of.output,
            byref(self._algo), workspace, self._workspace_bytes,
            torch._C._cuda_getCurrentRawStream(device.index),
        )  # fmt: skip
        check(status)
        return output


class _Problem:
    """The library's descriptions of a product and its three matrices, destroyed with this object."""

    def __init__(self, lt: CublasLt, product: Product, num_rows: int, dtype: torch.dtype) -> None:
        self._lib, self._handle = lt.lib, lt.handle
        kind = TYPES[getattr(torch, product.dtype)]
        self._types = kind, kind, TYPES[dtype], TYPES[dtype]
        self.desc, self.weight, self.rows, self.output = (ctypes.c_void_p() for _ in range(4))
        check(self._lib.cublasLtMatmulDescCreate(byref(self.desc), COMPUTE_32F, REAL_32F))
        self._set(DESC_TRANSA, c_int32(1))
        if kind == REAL_8F_E4M3:
            for attribute in (DESC_A_SCALE_POINTER, DESC_B_SCALE_POINTER):
                self._set(attribute, c_uint64(lt.unit_scale.data_ptr()))
            self._set(DESC_FAST_ACCUM, c_int8(1))
        width, num_outputs = product.width, product.num_outputs
        self._lay_out(self.weight, kind, width, num_outputs)
        self._lay_out(self.rows, kind, width, num_rows)
        self._lay_out(self.output, self._types[2], num_outputs, num_rows)

    def __del__(self) -> None:
        for layout in (self.weight, self.rows, self.output):
            self._lib.cublasLtMatrixLayoutDestroy(layout)
        self._lib.cublasLtMatmulDescDestroy(self.desc)

    @property
    def matrices(self) -> tuple[ctypes.c_void_p, ...]:
        return self.weight, self.rows, self.output, self.output

    def checked(self, algorithm: Algorithm) -> tuple[_Algo, int]:
        """The library's form of it, and how many bytes of workspace it takes here."""
        algo, result = _Algo(), _HeuristicResult()
        check(
            self._lib.cublasLtMatmulAlgoInit(
                self._handle, COMPUTE_32F, REAL_32F, *self._types, algorithm.id, byref(algo)
            )
        )
        for attribute, value in enumerate(algorithm):
            if attribute > 0:  # the id is fixed by now
                number = _config_type(attribute)(value)
                size = c_size_t(ctypes.sizeof(number))
                check(
                    self._lib.cublasLtMatmulAlgoConfigSetAttribute(
                        byref(algo), attribute, byref(number), size
                    )
                )
        check(
            self._lib.cublasLtMatmulAlgoCheck(
                self._handle, self.desc, *self.matrices, byref(algo), byref(result)
            )
        )
        if result.workspace_bytes > MAX_WORKSPACE_BYTES:
            raise CublasLtError(f"{algorithm} takes {result.workspace_bytes} bytes of workspace")
        return algo, result.workspace_bytes

    def guesses(self, max_count: int) -> Iterator[Algorithm]:
        """What the library would try, most promising first."""
        preference, count = ctypes.c_void_p(), c_int()
        results = (_HeuristicResult * max_count)()
        check(self._lib.cublasLtMatmulPreferenceCreate(byref(preference)))
        try:
            limit = c_uint64(MAX_WORKSPACE_BYTES)
            check(
                self._lib.cublasLtMatmulPreferenceSetAttribute(
                    preference, PREF_MAX_WORKSPACE_BYTES, byref(limit), c_size_t(8)
                )
            )
            check(
                self._lib.cublasLtMatmulAlgoGetHeuristic(
                    self._handle, self.desc, *self.matrices, preference, max_count, results, byref(count)
                )
            )
        finally:
            self._lib.cublasLtMatmulPreferenceDestroy(preference)
        for result in results[: count.value]:
            if result.state == 0:
                yield self._configuration(result.algo)

    def _configuration(self, algo: _Algo) -> Algorithm:
        values = []
        for attribute in range(len(Algorithm._fields)):
            number, written = _config_type(attribute)(), c_size_t()
            size = c_size_t(ctypes.sizeof(number))
            check(
                self._lib.cublasLtMatmulAlgoConfigGetAttribute(
                    byref(algo), attribute, byref(number), size, byref(written)
                )
            )
            values.append(number.value)
        return Algorithm(*values)

    def _set(self, attribute: int, value: ctypes._SimpleCData[int]) -> None:
        size = c_size_t(ctypes.sizeof(value))
        check(self._lib.cublasLtMatmulDescSetAttribute(self.desc, attribute, byref(value), size))

    def _lay_out(self, layout: ctypes.c_void_p, kind: int, height: int, width: int) -> None:
        sizes = c_uint64(height), c_uint64(width), c_int64(height)
        check(self._lib.cublasLtMatrixLayoutCreate(byref(layout), kind, *sizes))


def guesses(
    lt: CublasLt, product: Product, num_rows: int, dtype: torch.dtype, max_count: int
) -> list[Algorithm]:
    """The library's own candidates for a product, most promising first; torch takes the first."""
    return list(_Problem(lt, product, num_rows, dtype).guesses(max_count))


def check(status: int) -> None:
    """Raises CublasLtError for what cublasStatus_t calls no success."""
    if status:
        raise CublasLtError(f"cuBLASLt gave status {status}")


def _config_type(attribute: int) -> type[c_uint16] | type[c_uint32]:
    return c_uint16 if attribute in (CONFIG_INNER_SHAPE_ID, CONFIG_CLUSTER_SHAPE_ID) else c_uint32
