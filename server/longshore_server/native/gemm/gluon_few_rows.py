"""Few rows times a weight, in Gluon for Hopper: products of a decode step, bound by reading the weight.

A program multiplies whole tiles of the weight, so nobody waits for another's sums: where there are too few
tiles for a chip, each is cut along its width, and whoever reads the product next adds the parts up. A
program fills its shared memory with weights before the rows are there, so the kernels between two products
cost little bandwidth; and one program fills a multiprocessor, or the hardware would put two on some and none
on others. Imported on CUDA only.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from longshore_server.native.gemm.cublaslt import is_aligned
from longshore_server.native.gpu.gluon import has_gluon
from longshore_server.native.gpu.triton_overlap import wait_for_previous

ROW_BLOCKS = (8, 16, 32, 64)  # rows are padded to one of them
MAX_ROWS = {1: 32, 2: 64}  # by a number's bytes; of more rows cuBLASLt's kernels are as fast or faster
TILE_HEIGHTS = (128, 64)  # outputs of a tile
STAGE_BYTES = 256  # of a row or an output in one stage of the pipeline
SHARED_BYTES = 160 * 1024  # of 228: more than half, so that one program fills a multiprocessor
SPLITS = (1, 2, 4)
ENOUGH_BUSY = 0.6  # of the multiprocessors; more of them read no faster
NUM_WARPS = 4  # one warp group
GLUON_DTYPES = {
    torch.bfloat16: gl.bfloat16,
    torch.float16: gl.float16,
    torch.float8_e4m3fn: gl.float8e4nv,
}


@gluon.jit
def _load_weight(weight, rows, stage, barrier, output, column, is_wanted):
    """Starts to load a part of the weight; the barrier then counts the rows that go with it, too."""
    num_bytes: gl.constexpr = weight.block_type.nbytes + rows.block_type.nbytes
    mbarrier.expect(barrier, num_bytes, pred=is_wanted)
    tma.async_copy_global_to_shared(weight, [output, column], barrier, stage, pred=is_wanted)


@gluon.jit(do_not_specialize=["num_rows", "tiles_per_program"])  # each form takes a while to compile
def _few_rows_kernel(
    weight, rows, output, num_rows, num_outputs, tiles_per_program,
    NUM_STEPS: gl.constexpr, NUM_SPLITS: gl.constexpr, NUM_STAGES: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Some neighbouring tiles, along one of the parts of the width, in `NUM_STEPS` each."""
    TILE: gl.constexpr = weight.block_type.shape[0]
    WIDTH: gl.constexpr = weight.block_type.shape[1]
    ROWS: gl.constexpr = rows.block_type.shape[0]
    dtype: gl.constexpr = weight.dtype
    split = gl.program_id(0) % NUM_SPLITS
    first_step = split * NUM_STEPS
    first_tile = gl.program_id(0) // NUM_SPLITS * tiles_per_program
    num_tiles = gl.minimum(tiles_per_program, num_outputs // TILE - first_tile)
    num_loads = num_tiles * NUM_STEPS
    weights = gl.allocate_shared_memory(dtype, [NUM_STAGES, TILE, WIDTH], weight.layout)
    numbers = gl.allocate_shared_memory(dtype, [NUM_STAGES, ROWS, WIDTH], rows.layout)
    loaded = gl.allocate_shared_memory(gl.int64, [NUM_STAGES, 1], mbarrier.MBarrierLayout())
    for early in gl.static_range(NUM_STAGES):
        mbarrier.init(loaded.index(early), count=1)
    fence_async_shared()
    for early in gl.static_range(NUM_STAGES):
        output_place = (first_tile + early // NUM_STEPS) * TILE
        column = (first_step + early % NUM_STEPS) * WIDTH
        _load_weight(
            weight, rows, weights.index(early), loaded.index(early), output_place, column, early < num_loads
        )
    wait_for_previous(True)
    for early in gl.static_range(NUM_STAGES):
        column = (first_step + early % NUM_STEPS) * WIDTH
        tma.async_copy_global_to_shared(
            rows, [0, column], loaded.index(early), numbers.index(early), pred=early < num_loads
        )

    K_BITS: gl.constexpr = 256  # of an operand of one tensor core instruction
    sums: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [num_warps, 1], [16, ROWS, K_BITS // dtype.primitive_bitwidth]
    )
    stored: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [TILE // 64, num_warps * 64 // TILE], [0, 1])
    channels = gl.arange(0, TILE, gl.SliceLayout(1, stored))[:, None]
    tokens = gl.arange(0, ROWS, gl.SliceLayout(0, stored))[None, :]
    places = output + (split * num_rows + tokens).to(gl.int64) * num_outputs + channels
    for tile in range(num_tiles):
        total = gl.zeros([TILE, ROWS], gl.float32, sums)
        for step in range(NUM_STEPS):
            load = tile * NUM_STEPS + step
            stage = load % NUM_STAGES
            mbarrier.wait(loaded.index(stage), load // NUM_STAGES & 1)
            total = warpgroup_mma(
                weights.index(stage), numbers.index(stage).permute((1, 0)), total, is_async=True
            )
            # The step before this one is through then, and its stage can be filled again.
            total = warpgroup_mma_wait(1, [total])
            following = load + NUM_STAGES - 1
            free = following % NUM_STAGES
            output_place = (first_tile + following // NUM_STEPS) * TILE
            column = (first_step + following % NUM_STEPS) * WIDTH
            is_wanted = (load > 0) & (following < num_loads)
            _load_weight(
                weight, rows, weights.index(free), loaded.index(free), output_place, column, is_wanted
            )
            tma.async_copy_global_to_shared(
                rows, [0, column], loaded.index(free), numbers.index(free), pred=is_wanted
            )
        total = warpgroup_mma_wait(0, [total])
        result = gl.convert_layout(total.to(output.dtype.element_ty), stored)
        gl.store(places + (first_tile + tile) * TILE, result, mask=tokens < num_rows)


@dataclass(frozen=True, slots=True)
class _Launch:
    """How a product is cut: programs, tiles of a program, and parts along the width."""

    tile_height: int
    num_splits: int
    tiles_per_program: int
    num_programs: int


def can_multiply(rows: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether multiply_few_rows() takes these: two rows or some more on Hopper, outputs in whole tiles."""
    num_outputs, width = weight.shape
    return (
        rows.is_cuda
        and 1 < rows.shape[0] <= MAX_ROWS.get(rows.element_size(), 0)
        and rows.dtype == weight.dtype
        and rows.dtype in GLUON_DTYPES
        and num_outputs % TILE_HEIGHTS[-1] == 0
        and width * rows.element_size() % STAGE_BYTES == 0
        and is_aligned(rows)
        and is_aligned(weight)
        and has_gluon(rows.device)
    )


def multiply_few_rows(
    rows: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype, may_split: bool = False
) -> torch.Tensor:
    """`rows` [n, in] times `weight` [out, in] transposed, summed in float32: [n, out] in `dtype`.

    With `may_split` it may be [parts, n, out] in float32, whose sum over the parts it is. FP8 is multiplied
    unscaled.
    """
    (num_rows, width), num_outputs = rows.shape, weight.shape[0]
    step_width = STAGE_BYTES // rows.element_size()
    num_steps = width // step_width
    row_block = next(each for each in ROW_BLOCKS if each >= num_rows)
    of = _launch_of(num_outputs, num_steps, _multiprocessors(rows.device), may_split)
    num_stages = SHARED_BYTES // ((of.tile_height + row_block) * STAGE_BYTES)
    shape = (num_rows, num_outputs) if of.num_splits == 1 else (of.num_splits, num_rows, num_outputs)
    output = torch.empty(shape, dtype=dtype if of.num_splits == 1 else torch.float32, device=rows.device)
    _few_rows_kernel[(of.num_programs,)](
        _descriptor(weight, of.tile_height, step_width), _descriptor(rows, row_block, step_width), output,
        num_rows, num_outputs, of.tiles_per_program,
        NUM_STEPS=num_steps // of.num_splits, NUM_SPLITS=of.num_splits, NUM_STAGES=num_stages,
        launch_pdl=True, num_warps=NUM_WARPS,
    )  # fmt: skip
    return output


def _descriptor(matrix: torch.Tensor, height: int, width: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(matrix, [height, width], _layout(height, width, matrix.dtype))


@functools.cache
def _layout(height: int, width: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([height, width], GLUON_DTYPES[dtype])


@functools.cache
def _launch_of(num_outputs: int, num_steps: int, num_multiprocessors: int, may_split: bool) -> _Launch:
    """The fewest parts that keep most of a chip busy; of two ways alike the larger tiles."""
    heights = [height for height in TILE_HEIGHTS if num_outputs % height == 0]
    ways = [
        max(
            (_cut(num_outputs // height, height, num_splits, num_multiprocessors) for height in heights),
            key=lambda way: way.num_programs,
        )
        for num_splits in (SPLITS if may_split else SPLITS[:1])
        if num_steps % num_splits == 0
    ]
    enough = ENOUGH_BUSY * num_multiprocessors
    busy = (way for way in ways if way.num_programs >= enough)
    return next(busy, max(ways, key=lambda way: way.num_programs))


def _cut(num_tiles: int, height: int, num_splits: int, num_multiprocessors: int) -> _Launch:
    """Every program takes as many tiles, but for the last, and all programs run at once."""
    tiles_per_program = -(-num_tiles * num_splits // num_multiprocessors)
    num_programs = -(-num_tiles // tiles_per_program) * num_splits
    return _Launch(height, num_splits, tiles_per_program, num_programs)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
