"""Chooses the attention for a device: the one place where a new kernel is named. It attends nothing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from longshore_server.native.attention.fp8_reference import Fp8Context
from longshore_server.native.attention.interface import AttentionContext
from longshore_server.native.attention.invariant import plan_invariant_passes
from longshore_server.native.attention.kv_cache import PagedKVCache
from longshore_server.native.attention.layout import BatchLayout
from longshore_server.native.attention.page_bounds import PageBounds
from longshore_server.native.attention.reference import ReferenceContext, plan_passes
from longshore_server.native.attention.sparse import SparseContext
from longshore_server.native.attention.sparsity import Sparsity

MakeContext = Callable[[PagedKVCache, BatchLayout], AttentionContext]


def select_attention(
    device: torch.device,
    *,
    batch_invariant: bool,
    sparsity: Sparsity | None = None,
    bounds: PageBounds | None = None,
    fp8_cache: bool = False,
) -> MakeContext:
    """A maker of one step's context: Triton kernels on CUDA, the torch reference everywhere else."""
    if device.type == "cuda":
        # triton is on GPUs only
        from longshore_server.native.attention.triton_context import make_context
        from longshore_server.native.attention.triton_pages import page_picker

        return partial(make_context, picker=page_picker(sparsity, bounds))
    dense = partial(Fp8Context if fp8_cache else ReferenceContext, plan=plan_passes)
    if sparsity is not None and bounds is not None:
        return partial(SparseContext, make_dense=dense, sparsity=sparsity, bounds=bounds)
    if fp8_cache:
        return dense
    return partial(ReferenceContext, plan=plan_invariant_passes if batch_invariant else plan_passes)
