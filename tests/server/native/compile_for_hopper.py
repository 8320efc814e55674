"""Compiles the kernel of one FP8 row for an H200, which takes no GPU, and prints the widths of the weights.

Its assembly is not what an interpreter runs. It is a process of its own, since kernels of one that
interprets cannot be compiled.
"""

from __future__ import annotations

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from longshore_server.native.gemm import triton_gemv
from longshore_server.native.model.fp8 import FP8_DTYPE

WIDTHS = (1024, 3072, 3584, 4096, 5120, 8192, 14336, 16384, 28672)
HOPPER = GPUTarget("cuda", 90, 32)


def compile_row_kernel(width: int) -> str:
    """The PTX."""
    launch = triton_gemv._launch_of(width, FP8_DTYPE.itemsize)
    constants = {
        "BLOCK_OUTPUTS": launch.block_outputs,
        "NUM_PIECES": launch.num_pieces,
        "BLOCK": launch.block,
        "PDL": True,
    }
    types = {"row": "*fp8e4nv", "weight": "*fp8e4nv", "output": "*bf16"} | dict.fromkeys(
        constants, "constexpr"
    )
    source = ASTSource(triton_gemv._gemv_fp8_kernel, types, constants)
    options = {"num_warps": launch.num_warps, "launch_pdl": True}
    return triton.compile(source, target=HOPPER, options=options).asm["ptx"]  # type: ignore[no-any-return]


def main() -> None:
    for width in WIDTHS:
        ptx = compile_row_kernel(width)
        assert "fma.rn.f16x2" in ptx and "griddepcontrol.wait" in ptx
        print(width)


if __name__ == "__main__":
    main()
