"""Steps on a GPU: launched without waiting, tokens left there for the next step, decodes as CUDA graphs.

The host reads a step's tokens after it has launched the next one. It schedules nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from itertools import accumulate
from weakref import WeakMethod

import numpy as np
import torch
from transformers import PreTrainedModel

from longshore_server.native.attention.interface import CONTEXT_KEYWORD, DecodeRows, SampledRows
from longshore_server.native.attention.kv_cache import PagedKVCache
from longshore_server.native.attention.layout import cut_tiles
from longshore_server.native.attention.page_bounds import PageBounds
from longshore_server.native.attention.sparsity import Sparsity
from longshore_server.native.attention.triton_context import (
    MIN_FLASH_ROWS,
    StepTables,
    cache_tile_rows,
    context_type,
    may_flash,
)
from longshore_server.native.attention.triton_extend import ExtendSpans
from longshore_server.native.attention.triton_pages import page_picker
from longshore_server.native.gpu.graphs import (
    CAPTURE_TIMEOUT_S,
    CAPTURING,
    CaptureThread,
    Forward,
    Shape,
    StepGraphs,
    bucket_of,
    buckets_up_to,
)
from longshore_server.native.gpu.mixed_steps import (
    DECODE_BUCKETS,
    MAX_SPANS,
    NO_SLOT,
    MixedShape,
    kept_places,
    pack,
    shape_of,
    shapes_of,
)
from longshore_server.native.gpu.seats import Seats, TableUpdates
from longshore_server.native.gpu.step_inputs import (
    Packer,
    even,
    noise_keys,
    slots,
    temperature_bits,
    token_ids,
)
from longshore_server.native.gpu.triton_sampling import (
    filter_numbers,
    sample_filtered_rows,
    sample_rows,
)
from longshore_server.native.gpu.warm_kernels import KernelWarmer
from longshore_server.native.model.fuse import FusedDecoder
from longshore_server.native.model.vision import ImageFeatures, model_inputs, shows_image
from longshore_server.native.pieces import cut_sparse_rows, tokens_of_chunks
from longshore_server.native.sampler import NOT_FINITE, SampledToken, sample
from longshore_server.native.scheduler import Chunk
from longshore_server.native.sequence import Sequence, SequenceStatus

logger = logging.getLogger(__name__)

NUM_DECODE_FIELDS = 9  # of each row of a decode step, see _pack_decode
SPAN_FIELDS = ("first_rows", "num_rows", "context_lens", "table_rows", "tile_spans", "tile_offsets")

Results = list[SampledToken | None]


class GpuRunner:
    """Runs a model over a paged KV cache with Triton attention; launch() returns before the GPU is done.

    With `batch_invariant`, whose products the model must have, a row's numbers are the same in every step.
    """

    overlaps = True

    def __init__(
        self,
        model: PreTrainedModel,
        cache: PagedKVCache,
        max_num_seqs: int,
        max_model_len: int,
        features: ImageFeatures | None = None,
        *,
        on_ranks: bool = False,
        batch_invariant: bool = False,
        sparsity: Sparsity | None = None,
        bounds: PageBounds | None = None,
    ) -> None:
        """`on_ranks`: steps hold exchanges with other ranks. `bounds` come with `sparsity`."""
        self.model = model
        self.cache = cache
        self._features = features
        self.device = cache.device
        self._is_cuda = cache.device.type == "cuda"
        self.drawn: dict[Sequence, int] = {}  # the last tokens of those that the host drew for
        self._seats = Seats(max_num_seqs, -(-max_model_len // cache.block_size), cache.device)
        self._batch_invariant = batch_invariant
        self._make_context = context_type(batch_invariant)
        self._sparsity, self._picker = sparsity, page_picker(sparsity, bounds)
        self._may_flash = may_flash(cache, model.dtype) and not batch_invariant
        self._tile_rows = cache_tile_rows(cache, model.dtype, self._make_context.most_tile_rows)
        # a fused decoder keeps the sampled rows itself, from its last layer's attention on, and no state
        self._keeps_rows = any(isinstance(module, FusedDecoder) for module in model.modules())
        is_alone = self._is_cuda and self._keeps_rows and not on_ranks
        self._capture_thread = CaptureThread(cache.device) if is_alone else None
        self._may_prepare = is_alone
        self._warmer: KernelWarmer | None = None
        self._captures_ahead = False
        self._graphs = StepGraphs(_weak(self._decode_forward), cache.device, self._capture_thread)
        self._mixed_graphs = StepGraphs(_weak(self._padded_forward), cache.device, self._capture_thread)
        self._buckets = buckets_up_to(max_num_seqs)
        num_rows = max(max_num_seqs, self._buckets[-1], DECODE_BUCKETS[-1] + MAX_SPANS)
        num_kv_heads = max(pages.shape[2] for pages in cache.values)
        self._arrivals = torch.zeros(num_rows * num_kv_heads, dtype=torch.int32, device=cache.device)

    def stay_eager(self) -> None:
        """Captures no steps, and compiles none ahead: for what a graph cannot hold, and for a few steps."""
        self._may_prepare = False
        self._graphs.switch_off()
        self._mixed_graphs.switch_off()

    def settle(self) -> None:
        """Waits for captures under way and for kernels that are being compiled."""
        self._graphs.settle()
        self._mixed_graphs.settle()
        if self._warmer is not None:
            self._warmer.settle(CAPTURE_TIMEOUT_S)

    def close(self) -> None:
        """Waits for what is launched or captured, and destroys the captured steps."""
        if self._warmer is not None:
            self._warmer.close()
        self.settle()
        if self._is_cuda:
            with CAPTURING:  # another engine's, by now
                torch.cuda.synchronize(self.device)
        self._graphs.close()
        self._mixed_graphs.close()
        if self._capture_thread is not None:
            self._capture_thread.close()

    def clear_blocks(self, blocks: SequenceOf[int]) -> None:
        """Nothing: the kernels never read past a context, so what another owner left does not matter."""

    @torch.inference_mode()
    def launch(self, chunks: SequenceOf[Chunk]) -> Callable[[], Results]:
        """Starts a step; the callable waits for its results, in the chunks' order."""
        pieces = cut_sparse_rows(chunks, self._sparsity)
        pieces.sort(key=lambda each: each[1].num_tokens > 1)
        try:
            sampled = self._run([piece for _, piece in pieces])
        except Exception:
            self._seats.rewrite_all()
            raise
        self.prepare()
        return lambda: tokens_of_chunks(pieces, sampled(), len(chunks))

    @torch.inference_mode()
    def prepare(self) -> bool:
        """Goes on with what later steps need, beside them: kernels of decodes, then graphs of all shapes.

        Whether there is more to come. launch() does so, too, and idle time is better spent on it.
        """
        if not self._may_prepare:
            return False
        try:
            self._go_on()
        except RuntimeError:  # for want of memory, say: steps then do what they need
            logger.exception("later steps are not prepared for")
            self._may_prepare = False
            return False
        are_settled = self._graphs.is_settled and self._mixed_graphs.is_settled
        return not (self._captures_ahead and are_settled)

    def _go_on(self) -> None:
        if self._warmer is None:
            self._warmer = KernelWarmer(self.model, self.cache)
        elif not self._captures_ahead and self._warmer.is_done:
            self._captures_ahead = True
            self._graphs.capture_ahead({bucket: NUM_DECODE_FIELDS * even(bucket) for bucket in self._buckets})
            self._mixed_graphs.capture_ahead(
                {shape: shape.num_numbers for shape in shapes_of(self._buckets[-1], self._tile_rows)}
            )
        self._graphs.advance()
        self._mixed_graphs.advance()

    def _run(self, chunks: list[Chunk]) -> Callable[[], list[SampledToken]]:
        updates = TableUpdates()
        seats = [self._seats.place(chunk.sequence, updates) for chunk in chunks]
        self._upload(updates)
        samples = [index for index, chunk in enumerate(chunks) if chunk.samples]
        pairs = [(chunks[index].sequence, seats[index]) for index in samples]
        bucket = bucket_of(len(chunks))
        if bucket is not None and all(_is_decode(chunk) for chunk in chunks):
            logits, sampled = self._graphs.run(self._pack_decode(chunks, seats, bucket), bucket)
        elif (shape := self._shape_of(chunks)) is not None:
            logits, sampled = self._mixed_graphs.run(self._pack_mixed(shape, chunks, seats), shape)
            places = kept_places(shape, chunks)
            return self._collect(logits, sampled, pairs, [places[index] for index in samples])
        else:
            logits, sampled = self._mixed_forward(chunks, seats)
        return self._collect(logits, sampled, pairs, list(range(len(pairs))))

    def _upload(self, updates: TableUpdates) -> None:
        if updates.places:
            both = torch.tensor([updates.places, updates.blocks], pin_memory=self._is_cuda)
            places, blocks = both.to(self.device, non_blocking=True)
            self._seats.block_tables.view(-1).index_copy_(0, places, blocks.to(torch.int32))

    # --- decode steps ---

    def _pack_decode(self, chunks: list[Chunk], seats: list[int], bucket: int) -> torch.Tensor:
        """[fields * even(bucket)], for _decode_forward; padding rows have no slot and no context."""
        size = self.cache.block_size
        num_rows = len(chunks)
        sequences = [chunk.sequence for chunk in chunks]
        lens = np.array([chunk.context_len for chunk in chunks])
        tables = [chunk.sequence.block_table[chunk.start // size] for chunk in chunks]
        host = torch.zeros(NUM_DECODE_FIELDS, even(bucket), dtype=torch.int64, pin_memory=self._is_cuda)
        rows = host.numpy()
        rows[0, :] = self._seats.spare
        rows[0, :num_rows] = seats
        rows[1, :num_rows] = [token_ids(chunk)[0] for chunk in chunks]
        rows[2, :num_rows] = lens - 1
        rows[3, :] = NO_SLOT
        rows[3, :num_rows] = np.array(tables) * size + (lens - 1) % size
        rows[4, :num_rows] = lens
        rows[5, :num_rows] = temperature_bits(sequences)
        rows[6:8].reshape(-1)[: 2 * num_rows] = noise_keys(sequences)
        rows[8, :num_rows] = [sequence.num_prompt_tokens for sequence in sequences]
        return host.view(-1)

    def _decode_forward(self, inputs: torch.Tensor, bucket: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One token of each row: logits [bucket, vocab], tokens [bucket]. It can be captured."""
        rows = inputs.view(NUM_DECODE_FIELDS, even(bucket))
        seats, tokens, positions, row_slots, lens = rows[:5, :bucket]
        known = torch.where(tokens >= 0, tokens, self._seats.last_tokens[seats])
        decodes = DecodeRows(seats, lens, rows[8, :bucket])
        tables = StepTables(row_slots, self._seats.block_tables, bucket, decodes, arrivals=self._arrivals)
        logits = self._logits({"input_ids": known[None]}, positions, 0, tables)
        sampled = torch.empty_like(seats)
        temperatures = rows[5, :bucket].view(torch.float64)
        keys = rows[6:8].reshape(-1)[: 2 * bucket].view(bucket, 2)
        sample_rows(logits, temperatures, keys, seats, self._seats.last_tokens, sampled)
        return logits, sampled

    # --- steps with short prefills, in fixed shapes ---

    def _shape_of(self, chunks: list[Chunk]) -> MixedShape | None:
        """The shape for a step that a graph may hold: a fused decoder's, whose padding touches no row."""
        if not self._keeps_rows or any(shows_image(chunk) for chunk in chunks):
            return None
        return shape_of(chunks, self._tile_rows)

    def _pack_mixed(self, shape: MixedShape, chunks: list[Chunk], seats: list[int]) -> torch.Tensor:
        host = torch.empty(shape.num_numbers, dtype=torch.int64, pin_memory=self._is_cuda)
        pack(shape, chunks, seats, self._seats.spare, self.cache.block_size, host.numpy())
        return host

    def _padded_forward(self, inputs: torch.Tensor, shape: MixedShape) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [shape.num_kept, vocab] and tokens [shape.num_kept]. It can be captured."""
        of = {name: inputs[place] for name, place in shape.fields.items()}
        spans = ("first_rows", "span_rows", "span_lens", "span_seats", "tile_spans", "tile_offsets")
        tables = StepTables(
            of["slots"],
            self._seats.block_tables,
            shape.num_decodes,
            DecodeRows(of["decode_seats"], of["decode_lens"], of["decode_prompt_lens"]),
            ExtendSpans(*(of[name] for name in spans)),
            sampled=SampledRows(
                of["kept_rows"], DecodeRows(of["kept_seats"], of["kept_lens"], of["kept_prompt_lens"])
            ),
            arrivals=self._arrivals,
        )
        known = torch.where(of["tokens"] >= 0, of["tokens"], self._seats.last_tokens[of["token_seats"]])
        logits = self._logits({"input_ids": known[None]}, of["positions"], 0, tables)
        sampled = torch.empty_like(of["sample_seats"])
        temperatures, keys = of["temperatures"].view(torch.float64), of["keys"].view(-1, 2)
        sample_rows(logits, temperatures, keys, of["sample_seats"], self._seats.last_tokens, sampled)
        return logits, sampled

    # --- other steps with prefill ---

    def _mixed_forward(self, chunks: list[Chunk], seats: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        packer = Packer()
        num_decodes = sum(chunk.num_tokens == 1 for chunk in chunks)
        last_rows = [end - 1 for end in accumulate(chunk.num_tokens for chunk in chunks)]
        samples = [index for index, chunk in enumerate(chunks) if chunk.samples]
        sequences = [chunks[index].sequence for index in samples]
        packer.add("tokens", np.concatenate([token_ids(chunk) for chunk in chunks]))
        packer.add(
            "positions",
            np.concatenate([np.arange(c.start, c.context_len) for c in chunks]),
        )
        packer.add("token_seats", np.repeat(seats, [chunk.num_tokens for chunk in chunks]))
        packer.add("slots", np.concatenate([slots(chunk, self.cache.block_size) for chunk in chunks]))
        packer.add("lens", [chunk.context_len for chunk in chunks])
        packer.add("seats", seats)
        packer.add("prompt_lens", [chunk.sequence.num_prompt_tokens for chunk in chunks])
        kept = samples or [0]  # a model gives one row of logits at least
        packer.add("kept_rows", [last_rows[index] for index in kept])
        packer.add("kept_seats", [seats[index] for index in kept])
        packer.add("kept_lens", [chunks[index].context_len for index in kept])
        packer.add("kept_prompt_lens", [chunks[index].sequence.num_prompt_tokens for index in kept])
        packer.add("sample_seats", [seats[index] for index in samples])
        packer.add("temperatures", temperature_bits(sequences))
        packer.add("keys", noise_keys(sequences))
        fresh = self._pack_spans(packer, chunks, seats, num_decodes, last_rows)
        inputs = packer.packed(self._is_cuda).to(self.device, non_blocking=True)

        def of(name: str) -> torch.Tensor:
            return packer.field(inputs, name)

        kept_decodes = DecodeRows(*(of(f"kept_{name}") for name in ("seats", "lens", "prompt_lens")))
        tables = StepTables(
            of("slots"),
            self._seats.block_tables,
            num_decodes,
            DecodeRows(*(of(name)[:num_decodes] for name in ("seats", "lens", "prompt_lens"))),
            _spans(of, "all") if num_decodes < len(chunks) else None,
            tuple(slice(last_rows[i] + 1 - chunks[i].num_tokens, last_rows[i] + 1) for i in fresh),
            _spans(of, "paged") if fresh and len(fresh) < len(chunks) - num_decodes else None,
            SampledRows(of("kept_rows"), kept_decodes) if self._keeps_rows else None,
            self._arrivals,
        )
        known = torch.where(of("tokens") >= 0, of("tokens"), self._seats.last_tokens[of("token_seats")])
        rows = model_inputs(self.model, self._features, known, chunks)
        logits = self._logits(rows, of("positions"), 0 if self._keeps_rows else of("kept_rows"), tables)
        sampled = torch.empty(len(samples), dtype=torch.int64, device=self.device)
        if samples:
            temperatures = of("temperatures").view(torch.float64)
            keys = of("keys").view(-1, 2)
            sample_rows(logits, temperatures, keys, of("sample_seats"), self._seats.last_tokens, sampled)
        return logits, sampled

    def _pack_spans(
        self,
        packer: Packer,
        chunks: list[Chunk],
        seats: list[int],
        num_decodes: int,
        last_rows: list[int],
    ) -> list[int]:
        """Packs the prefill chunks, and those that are not fresh; which chunks are fresh."""
        prefills = list(range(num_decodes, len(chunks)))
        fresh = [index for index in prefills if self._is_fresh(chunks[index])]
        groups = {"all": prefills, "paged": [index for index in prefills if index not in fresh]}
        for name, group in groups.items():
            num_rows = [chunks[index].num_tokens for index in group]
            tile_spans, tile_offsets = cut_tiles(num_rows, self._tile_rows)
            columns = (
                [last_rows[index] + 1 - chunks[index].num_tokens for index in group],
                num_rows,
                [chunks[index].context_len for index in group],
                [seats[index] for index in group],
                tile_spans,
                tile_offsets,
            )
            for field, values in zip(SPAN_FIELDS, columns, strict=True):
                packer.add(f"{name}.{field}", values)
        return fresh

    def _is_fresh(self, chunk: Chunk) -> bool:
        return self._may_flash and chunk.start == 0 and chunk.num_tokens >= MIN_FLASH_ROWS

    # --- both ---

    def _logits(
        self,
        inputs: dict[str, torch.Tensor],  # [1, tokens, ...]
        positions: torch.Tensor,
        rows: torch.Tensor | int,  # 0 for all
        tables: StepTables,
    ) -> torch.Tensor:
        output = self.model(
            **inputs,
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=rows,
            **{CONTEXT_KEYWORD: self._make_context(self.cache, tables, self._picker)},
        )
        return output.logits[0]  # type: ignore[no-any-return]

    def _collect(
        self,
        logits: torch.Tensor,
        sampled: torch.Tensor,
        pairs: list[tuple[Sequence, int]],  # each sequence that samples, and its seat
        rows: list[int],  # where each stands in logits and sampled
    ) -> Callable[[], list[SampledToken]]:
        """Starts the way back of the tokens. Rows with filters are drawn again on the device; those that need
        more than that are sampled by the host, which waits for the step.
        """
        special = [row for row, (sequence, _) in enumerate(pairs) if not sequence.params.is_simple]
        self._draw_filtered(logits, sampled, pairs, rows)
        redrawn = self._sample_by_host(
            logits, [rows[row] for row in special], [pairs[row][0] for row in special]
        )
        if redrawn:
            self._note_drawn([pairs[row][0] for row in special], redrawn)
            last = torch.tensor([token.token_id for token in redrawn], device=self.device)
            places = torch.tensor([pairs[row][1] for row in special], device=self.device)
            self._seats.last_tokens[places] = last
        host = torch.empty(sampled.shape, dtype=torch.int64, pin_memory=self._is_cuda)
        host.copy_(sampled, non_blocking=True)
        done = torch.cuda.Event() if self._is_cuda else None
        if done is not None:
            done.record()

        def read() -> list[SampledToken]:
            if done is not None:
                done.synchronize()
            token_ids = host.tolist()
            tokens = [_token(token_ids[row]) for row in rows]
            for row, token in zip(special, redrawn, strict=True):
                tokens[row] = token
            return tokens

        return read

    def _sample_by_host(
        self, logits: torch.Tensor, rows: list[int], sequences: list[Sequence]
    ) -> list[SampledToken]:
        """One by one in batch-invariant mode, since torch's sums over a row depend on the number of rows."""
        if self._batch_invariant:
            pairs = zip(rows, sequences, strict=True)
            return [sample(logits[[row]], [sequence])[0] for row, sequence in pairs]
        return sample(logits[rows], sequences) if rows else []

    def _draw_filtered(
        self, logits: torch.Tensor, sampled: torch.Tensor, pairs: list[tuple[Sequence, int]], rows: list[int]
    ) -> None:
        chosen = [
            (row, seat, sequence)
            for row, (sequence, seat) in zip(rows, pairs, strict=True)
            if sequence.params.is_filtered and sequence.params.is_simple
        ]
        if chosen:
            numbers = filter_numbers(*zip(*chosen, strict=True), pinned=self._is_cuda)
            numbers = numbers.to(self.device, non_blocking=True)
            sample_filtered_rows(logits, numbers, self._seats.last_tokens, sampled)

    def _note_drawn(self, sequences: list[Sequence], tokens: list[SampledToken]) -> None:
        self.drawn = {s: token for s, token in self.drawn.items() if s.status is SequenceStatus.RUNNING}
        self.drawn |= {s: token.token_id for s, token in zip(sequences, tokens, strict=True)}


def _weak(method: Forward[Shape]) -> Forward[Shape]:
    """Calls a method of an object that it does not keep, whose memory is free once nobody else does, then."""
    reference = WeakMethod(method)

    def call(inputs: torch.Tensor, shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
        bound = reference()
        assert bound is not None
        return bound(inputs, shape)

    return call


def _is_decode(chunk: Chunk) -> bool:
    """Whether a captured graph can compute it: one known row, which shows no image."""
    return chunk.num_tokens == 1 and chunk.samples and not shows_image(chunk)


def _token(token_id: int) -> SampledToken:
    return SampledToken(token_id) if token_id >= 0 else SampledToken(0, error=NOT_FINITE)


def _spans(of: Callable[[str], torch.Tensor], group: str) -> ExtendSpans:
    return ExtendSpans(*(of(f"{group}.{field}") for field in SPAN_FIELDS))
