"""One step's attention on a GPU: which tokens go where, and the kernels that serve its decodes and prefills.

Its tensors are on the device already; it copies nothing from the host, so a captured graph can hold it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

from longshore_server.native.attention.interface import (
    DecodeRows,
    FusedContext,
    QkvProduct,
    SampledRows,
)
from longshore_server.native.attention.kv_cache import KVTarget, PagedKVCache
from longshore_server.native.attention.layout import BatchLayout, Span, cut_tiles
from longshore_server.native.attention.triton_decode import decode_attention
from longshore_server.native.attention.triton_extend import (
    MAX_TILE_ROWS,
    ExtendSpans,
    extend_attention,
    tile_rows,
)
from longshore_server.native.attention.triton_pages import PagePicker
from longshore_server.native.attention.triton_parts import MAX_ROWS, cut_contexts
from longshore_server.native.attention.triton_write import write_kv
from longshore_server.native.gpu.gluon import has_gluon

# From this many rows on, a prompt with no cached prefix goes to torch's attention kernels, which are faster.
# Shorter ones, which come in numbers, are attended over their pages all at once.
MIN_FLASH_ROWS = 1536
# cuDNN is the fastest of them on Hopper but plans some 40 ms for each length it has not met: prompts are
# padded to a multiple of this, and a padded length goes to cuDNN from its second prompt on.
CUDNN_ROWS_STEP = 512
SHORT_DTYPES = (torch.bfloat16, torch.float16)
MAX_FLASH_DIM = 256
# Of the one tile that the batch-invariant mode has for chunks and single rows: what 4 warps multiply at once.
INVARIANT_TILE_ROWS = 64


@dataclass(frozen=True, slots=True)
class StepTables:
    """A step's rows over the cache: `num_decodes` single rows first, then the rows of prefill chunks."""

    slots: torch.Tensor  # [rows] int64: place of each row's token, negative for none
    block_tables: torch.Tensor  # [table rows, blocks] int32
    num_decodes: int
    decodes: DecodeRows
    spans: ExtendSpans | None = None  # the prefill chunks
    fresh: tuple[slice, ...] = ()  # rows of long prompts that are whole here, so they need no pages
    spans_beside_fresh: ExtendSpans | None = None
    sampled: SampledRows | None = None  # the rows whose logits are wanted, where that is not every row
    arrivals: torch.Tensor | None = None  # see decode_attention


class TritonContext(FusedContext):
    """An attention context over a PagedKVCache for one step, in Triton kernels."""

    most_tile_rows: ClassVar[int] = MAX_TILE_ROWS  # by which ExtendSpans are cut, see cache_tile_rows
    # Up to so many decodes a product is attended as it is; more of them gain nothing by it.
    max_product_rows: ClassVar[int] = MAX_ROWS

    def __init__(self, cache: PagedKVCache, tables: StepTables, picker: PagePicker | None = None) -> None:
        """With a `picker` decodes are sparse."""
        self.cache = cache
        self.tables = tables
        self._picker = picker
        # Made before the model's first kernel, which waits for it: later ones may read it before they wait.
        self._parts: torch.Tensor | None = None
        if self._may_take_products():
            num_kv_heads = max(pages.shape[2] for pages in cache.keys)
            self._parts = cut_contexts(tables.decodes.context_lens, num_kv_heads)

    def _may_take_products(self) -> bool:
        """Sparse rows may be of one sequence and see each other's tokens, so only dense ones."""
        tables = self.tables
        return (
            tables.spans is None
            and 0 < tables.num_decodes <= self.max_product_rows
            and self._picker is None
            and tables.arrivals is not None
            and self.cache.dtype in SHORT_DTYPES  # FP8 and float32 have no such kernel
            and has_gluon(self.cache.device)
        )

    def check_arguments(self, arguments: dict[str, Any], attention_mask: torch.Tensor | None) -> None:
        """Nothing to check: the probe has seen this model's arguments."""

    @property
    def sampled(self) -> SampledRows | None:
        return self.tables.sampled

    @property
    def reads_rows(self) -> bool:
        return bool(self.tables.fresh)

    def kv_target(self, layer_index: int) -> KVTarget:
        cache = self.cache
        return KVTarget(
            cache.keys[layer_index], cache.values[layer_index], cache.scales[layer_index], self.tables.slots
        )

    def attend(
        self,
        layer_index: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        """Writes the rows' keys and values, then attends; shapes as in AttentionContext."""
        target = self.kv_target(layer_index)
        write_kv(key, value, target.keys, target.values, target.slots, target.scales)
        return self.attend_written(layer_index, query, key, value, scale, window)

    def attend_sampled(
        self, layer_index: int, query: torch.Tensor, scale: float, window: int | None
    ) -> torch.Tensor:
        """As decodes: each is the last row of its sequence, so its whole context stands in pages by now."""
        sampled = self.tables.sampled
        assert sampled is not None
        self._note_written(layer_index)
        output = query.new_empty(*query.shape[:2], self.cache.values[layer_index].shape[3])
        self._decode(layer_index, query, sampled.decodes, scale, window, output)
        return output

    def _note_written(self, layer_index: int) -> None:
        if self._picker is not None:
            self._picker.note_written(layer_index, self.tables.slots)

    def _decode(
        self,
        layer_index: int,
        query: torch.Tensor,
        rows: DecodeRows,
        scale: float,
        window: int | None,
        output: torch.Tensor,
    ) -> None:
        picked = None
        if self._picker is not None:
            tables = self.tables.block_tables
            picked = self._picker.pick(layer_index, query, tables, rows, scale, window)
        decode_attention(
            query,
            *self._pages(layer_index),
            rows.table_rows,
            rows.context_lens,
            self.cache.scales[layer_index],
            scale,
            window,
            output,
            self.tables.arrivals,
            picked,
        )

    def _extend(
        self,
        layer_index: int,
        query: torch.Tensor,
        spans: ExtendSpans,
        scale: float,
        window: int | None,
        output: torch.Tensor,
    ) -> None:
        pages, scales = self._pages(layer_index), self.cache.scales[layer_index]
        extend_attention(query, *pages, spans, scales, scale, window, output, self.most_tile_rows)

    def _pages(self, layer_index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A layer's keys and values, and the tables of who has which."""
        return self.cache.keys[layer_index], self.cache.values[layer_index], self.tables.block_tables

    def takes(self, layer_index: int, product: QkvProduct) -> bool:
        if self._parts is None:
            return False
        from longshore_server.native.attention.gluon_decode import can_attend  # needs its Triton

        return can_attend(self.kv_target(layer_index), product.cos.dtype, product.num_heads)

    def attend_product(
        self, layer_index: int, product: QkvProduct, scale: float, window: int | None
    ) -> torch.Tensor:
        """Of a step of decodes alone, whose older tokens earlier steps have written."""
        from longshore_server.native.attention.gluon_decode import attend_product

        assert self._parts is not None and self.tables.arrivals is not None
        return attend_product(
            product,
            self.kv_target(layer_index),
            self.tables.block_tables,
            self.tables.decodes,
            self._parts,
            scale,
            window,
            self.tables.arrivals,
        )

    def attend_written(
        self,
        layer_index: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        """Attends rows whose keys and values a fused kernel has put into `tables.slots` already."""
        cache, tables = self.cache, self.tables
        self._note_written(layer_index)
        fresh = tables.fresh if window is None else ()
        if len(fresh) == 1 and fresh[0] == slice(0, query.shape[0]):
            return fresh_attention(query, key, value, scale)
        output = query.new_empty(*query.shape[:2], cache.values[layer_index].shape[3])
        if num := tables.num_decodes:
            self._decode(layer_index, query[:num], tables.decodes, scale, window, output[:num])
        spans = tables.spans_beside_fresh if fresh else tables.spans
        if spans is not None:
            self._extend(layer_index, query, spans, scale, window, output)
        for prompt in fresh:
            output[prompt] = fresh_attention(query[prompt], key[prompt], value[prompt], scale)
        return output


class InvariantContext(TritonContext):
    """The same to the last bit for a row in every step: single rows are spans of one row for the one kernel.

    The step's tables must name no fresh prompts.
    """

    most_tile_rows: ClassVar[int] = INVARIANT_TILE_ROWS
    max_product_rows: ClassVar[int] = 0

    def __init__(self, cache: PagedKVCache, tables: StepTables, picker: PagePicker | None = None) -> None:
        super().__init__(cache, tables)
        assert not tables.fresh and picker is None
        num_sampled = 0 if tables.sampled is None else len(tables.sampled.rows)
        self._places = torch.arange(max(tables.num_decodes, num_sampled), device=cache.device)
        self._ones, self._zeros = torch.ones_like(self._places), torch.zeros_like(self._places)

    def _decode(
        self,
        layer_index: int,
        query: torch.Tensor,
        rows: DecodeRows,
        scale: float,
        window: int | None,
        output: torch.Tensor,
    ) -> None:
        num_rows = len(rows.table_rows)
        places, ones, zeros = (each[:num_rows] for each in (self._places, self._ones, self._zeros))
        spans = ExtendSpans(places, ones, rows.context_lens, rows.table_rows, places, zeros)
        self._extend(layer_index, query, spans, scale, window, output)


def context_type(batch_invariant: bool) -> type[TritonContext]:
    return InvariantContext if batch_invariant else TritonContext


_met_shapes: set[tuple[int, ...]] = set()  # those that cuDNN has a plan for, or gets one at the next prompt


def fresh_attention(
    query: torch.Tensor,  # [rows, num_heads, head_dim]
    key: torch.Tensor,  # [rows, num_kv_heads, head_dim]
    value: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Causal attention of a prompt that stands whole in these rows: [rows, num_heads, head_dim]."""
    num_rows = query.shape[0]
    num_padding = -num_rows % CUDNN_ROWS_STEP
    shape = (num_rows + num_padding, query.shape[1], key.shape[1], query.shape[2])
    if shape not in _met_shapes:
        _met_shapes.add(shape)
        return _causal(SDPBackend.FLASH_ATTENTION, query, key, value, scale)
    if num_padding:  # behind every row, so no row sees it
        query, key, value = (pad(each, (0, 0, 0, 0, 0, num_padding)) for each in (query, key, value))
    backends = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
    return _causal(backends, query, key, value, scale)[:num_rows]


def _causal(
    backends: SDPBackend | list[SDPBackend],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    with sdpa_kernel(backends, set_priority=isinstance(backends, list)):
        output = scaled_dot_product_attention(
            query.transpose(0, 1)[None],
            key.transpose(0, 1)[None],
            value.transpose(0, 1)[None],
            is_causal=True,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    return output[0].transpose(0, 1)


def may_flash(cache: PagedKVCache, model_dtype: torch.dtype) -> bool:
    """Whether whole prompts of this cache's shape may go to flash attention."""
    dims = {pages.shape[3] for pages in (*cache.keys, *cache.values)}
    is_even = len(dims) == 1 and max(dims) <= MAX_FLASH_DIM
    return is_even and model_dtype in SHORT_DTYPES and cache.device.type == "cuda"


def cache_tile_rows(cache: PagedKVCache, dtype: torch.dtype, most: int = MAX_TILE_ROWS) -> int:
    """Query rows per prefill tile over all layers of this cache."""
    return min(
        tile_rows(max(keys.shape[3], values.shape[3]), dtype, most)
        for keys, values in zip(cache.keys, cache.values, strict=True)
    )


def make_context(
    cache: PagedKVCache,
    layout: BatchLayout,
    make: type[TritonContext] = TritonContext,
    picker: PagePicker | None = None,
) -> TritonContext:
    """A context from a plain layout, with block tables of its own: for tests and for steps one by one."""
    spans = [*layout.decodes, *layout.prefills]
    width = max(len(span.block_table) for span in spans)

    def tensor(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=cache.device)

    block_tables = torch.tensor(
        [list(s.block_table) + [0] * (width - len(s.block_table)) for s in spans],
        dtype=torch.int32,
        device=cache.device,
    )
    num_decodes = len(layout.decodes)
    tile = cache_tile_rows(cache, cache.dtype, make.most_tile_rows)
    return make(
        cache,
        StepTables(
            slots=tensor(layout.slots()),
            block_tables=block_tables,
            num_decodes=num_decodes,
            decodes=DecodeRows(
                tensor(list(range(num_decodes))),
                tensor([span.context_len for span in layout.decodes]),
                tensor([span.num_prompt_tokens for span in layout.decodes]),
            ),
            spans=_extend_spans(layout.prefills, num_decodes, tile, tensor) if layout.prefills else None,
        ),
        picker,
    )


def _extend_spans(prefills: list[Span], first_table_row: int, tile: int, tensor: Any) -> ExtendSpans:
    tile_spans, tile_offsets = cut_tiles([span.num_rows for span in prefills], tile)
    return ExtendSpans(
        first_rows=tensor([span.first_row for span in prefills]),
        num_rows=tensor([span.num_rows for span in prefills]),
        context_lens=tensor([span.context_len for span in prefills]),
        table_rows=tensor([first_table_row + index for index in range(len(prefills))]),
        tile_spans=tensor(tile_spans),
        tile_offsets=tensor(tile_offsets),
    )
