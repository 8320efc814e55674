"""Compiles what cannot be interpreted for an H200, which takes no GPU: kernels of decodes.

It prints the widths and types of the weights, and the sizes of heads. It is a process of its own, since
kernels of one that interprets cannot be compiled.
"""

from __future__ import annotations

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from longshore_server.native.attention import gluon_decode, triton_parts
from longshore_server.native.gemm import gluon_few_rows, triton_gemv
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


def compile_few_rows_kernel(dtype: gl.dtype, tile_height: int, row_block: int) -> str:
    """The PTX."""
    width = gluon_few_rows.STAGE_BYTES * 8 // dtype.primitive_bitwidth

    def descriptor(height: int) -> str:
        layout = gl.NVMMASharedLayout.get_default_for([height, width], dtype)
        return f"tensordesc<{dtype.name}[{height}, {width}],{layout!r}>"

    num_warps = gluon_few_rows.NUM_WARPS
    constants = {"NUM_STEPS": 32, "NUM_SPLITS": 2, "NUM_STAGES": 3, "num_warps": num_warps}
    types = {"weight": descriptor(tile_height), "rows": descriptor(row_block), "output": "*fp32"}
    types |= {"num_rows": "i32", "num_outputs": "i32", "tiles_per_program": "i32"}
    types |= dict.fromkeys(constants, "constexpr")
    source = GluonASTSource(gluon_few_rows._few_rows_kernel, types, constants, {})
    options = {"num_warps": num_warps, "launch_pdl": True}
    return triton.compile(source, target=HOPPER, options=options).asm["ptx"]  # type: ignore[no-any-return]


def compile_product_decode_kernel(head_dim: int, group: int, has_norm: bool) -> str:
    """The PTX."""
    kernel = gluon_decode._product_decode_kernel
    num_stages, spare = gluon_decode._shared_memory(head_dim, 2)
    constants = {
        "NUM_KV_HEADS": 8,
        "GROUP": group,
        "BLOCK_GROUP": 16,
        "HEAD_DIM": head_dim,
        "PAGE": 16,
        "TILE": triton_parts.TILE_TOKENS,
        "NUM_FIELDS": triton_parts.NUM_FIELDS,
        "DTYPE": gl.bfloat16,
        "HAS_SCALES": not has_norm,
        "HAS_BIAS": has_norm,
        "HAS_NORM": has_norm,
        "NUM_PARTS": 1,
        "HAS_WINDOW": has_norm,
        "NUM_STAGES": num_stages,
        "SPARE": spare,
        "num_warps": gluon_decode.NUM_WARPS,
    }
    floats = ("row_scales", "channel_scales", "partial_output", "partial_lse")
    types = dict.fromkeys(kernel.arg_names, "*bf16") | dict.fromkeys(floats, "*fp32")
    types |= dict.fromkeys(("slots", "table_rows", "context_lens"), "*i64")
    types |= dict.fromkeys(("tables", "parts", "arrivals"), "*i32")
    types |= dict.fromkeys(("num_rows", "window", "table_stride"), "i32")
    types |= {"scale": "fp32", "eps": "fp32"} | dict.fromkeys(constants, "constexpr")
    aligned = [(kernel.arg_names.index(name),) for name in ("key_pages", "value_pages")]
    attributes = {place: [["tt.divisibility", 16]] for place in aligned}
    source = GluonASTSource(kernel, types, constants, attributes)
    options = {"num_warps": gluon_decode.NUM_WARPS, "launch_pdl": True}
    return triton.compile(source, target=HOPPER, options=options).asm["ptx"]  # type: ignore[no-any-return]


def main() -> None:
    for width in WIDTHS:
        ptx = compile_row_kernel(width)
        assert "fma.rn.f16x2" in ptx and "griddepcontrol.wait" in ptx
        print(width)
    for torch_dtype, dtype in gluon_few_rows.GLUON_DTYPES.items():
        for tile_height in gluon_few_rows.TILE_HEIGHTS:
            for row_block in gluon_few_rows.ROW_BLOCKS:
                ptx = compile_few_rows_kernel(dtype, tile_height, row_block)
                assert f"wgmma.mma_async.sync.aligned.m64n{row_block}k" in ptx
                # Weights are on their way before the kernel waits, rows not.
                before, _, after = ptx.partition("griddepcontrol.wait")
                assert before.count("cp.async.bulk.tensor") == 3 and "cp.async.bulk.tensor" in after
        print(str(torch_dtype).removeprefix("torch."))
    for head_dim in gluon_decode.HEAD_DIMS:
        for group, has_norm in ((8, False), (5, True)):
            ptx = compile_product_decode_kernel(head_dim, group, has_norm)
            # Both stages are on their way before the kernel waits, and nothing is written.
            before, _, after = ptx.partition("griddepcontrol.wait")
            assert before.count("cp.async.cg") == 32 and "st.global" not in before
            # What it reads early may stand in a stale line of the L1 cache.
            assert 0 < before.count("ld.global") == before.count("ld.global.cg")
            assert "mma.sync.aligned.m16n8k16" in after and "st.global" in after
        print(head_dim)


if __name__ == "__main__":
    main()
