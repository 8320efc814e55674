"""One forward pass: makes flat tensors of scheduled chunks, runs the model, samples. It schedules nothing."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from typing import Protocol

import torch
from transformers import PreTrainedModel

from longshore_server.native.attention.backend import MakeContext
from longshore_server.native.attention.interface import CONTEXT_KEYWORD
from longshore_server.native.attention.kv_cache import PagedKVCache
from longshore_server.native.attention.layout import BatchLayout, Span
from longshore_server.native.attention.sparsity import Sparsity
from longshore_server.native.model.vision import ImageFeatures, model_inputs
from longshore_server.native.pieces import cut_sparse_rows, tokens_of_chunks
from longshore_server.native.sampler import SampledToken, sample
from longshore_server.native.scheduler import Chunk


class Runner(Protocol):
    """What the engine needs of a runner."""

    @property
    def overlaps(self) -> bool: ...  # whether a step may be launched before the one before it is read

    def clear_blocks(self, blocks: SequenceOf[int]) -> None: ...

    def launch(self, chunks: SequenceOf[Chunk]) -> Callable[[], list[SampledToken | None]]: ...

    def prepare(self) -> bool: ...  # goes on with work for later steps, beside them; whether there is more

    def settle(self) -> None: ...  # waits for work that goes on beside the steps

    def close(self) -> None: ...  # after it, no step is launched


class ModelRunner:
    """Runs a model over a paged KV cache, each step to its end."""

    overlaps = False

    def __init__(
        self,
        model: PreTrainedModel,
        cache: PagedKVCache,
        device: torch.device,
        make_context: MakeContext,
        features: ImageFeatures | None = None,
        sparsity: Sparsity | None = None,
    ) -> None:
        self.model = model
        self._make_context = make_context
        self._sparsity = sparsity
        self.cache = cache
        self.device = device
        self._features = features

    @torch.inference_mode()
    def clear_blocks(self, blocks: SequenceOf[int]) -> None:
        """Zeroes blocks that change owner; call before run()."""
        self.cache.clear_blocks(blocks)

    def prepare(self) -> bool:
        """Nothing: each step has what it needs."""
        return False

    def settle(self) -> None:
        """Nothing: no work goes on beside the steps."""

    def close(self) -> None:
        """Nothing: each step has ended."""

    def launch(self, chunks: SequenceOf[Chunk]) -> Callable[[], list[SampledToken | None]]:
        """Runs the chunks; the results are what the callable gives."""
        results = self.run(chunks)
        return lambda: results

    @torch.inference_mode()
    def run(self, chunks: SequenceOf[Chunk]) -> list[SampledToken | None]:
        """Computes the chunks' KV and samples where a chunk ends its sequence; results in the chunks' order.

        Running the same chunks again gives the same result and the same cache: nothing else is changed.
        """
        pieces = self._ordered_pieces(chunks)
        logits = self._forward([piece for _, piece in pieces])
        sampling = [piece.sequence for _, piece in pieces if piece.samples]
        sampled = [] if logits is None else sample(logits, sampling)
        return tokens_of_chunks(pieces, sampled, len(chunks))

    @torch.inference_mode()
    def run_without_sampling(self, chunks: SequenceOf[Chunk]) -> None:
        """The forward pass of run() alone, for a rank that does not sample."""
        self._forward([piece for _, piece in self._ordered_pieces(chunks)])

    def _ordered_pieces(self, chunks: SequenceOf[Chunk]) -> list[tuple[int, Chunk]]:
        """In row order, each with the index of its chunk: single tokens by context length, longer ones."""
        pieces = cut_sparse_rows(chunks, self._sparsity)
        return sorted(pieces, key=lambda each: (each[1].num_tokens > 1, each[1].start))

    def _forward(self, chunks: SequenceOf[Chunk]) -> torch.Tensor | None:
        """Logits [rows, vocab] of the chunks that sample, in order; None when none does."""
        token_ids: list[int] = []
        positions: list[int] = []
        sampling_rows: list[int] = []
        for chunk in chunks:
            token_ids += chunk.sequence.token_ids[chunk.start : chunk.context_len]
            positions += range(chunk.start, chunk.context_len)
            if chunk.samples:
                sampling_rows.append(len(token_ids) - 1)
        context = self._make_context(self.cache, batch_layout(chunks, self.cache.block_size))
        output = self.model(
            **model_inputs(self.model, self._features, self._tensor(token_ids), chunks),  # [1, tokens, ...]
            position_ids=self._tensor(positions)[None],
            use_cache=False,
            logits_to_keep=self._tensor(sampling_rows or [len(token_ids) - 1]),
            **{CONTEXT_KEYWORD: context},
        )
        return output.logits[0] if sampling_rows else None

    def _tensor(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.device)


def batch_layout(chunks: SequenceOf[Chunk], block_size: int) -> BatchLayout:
    """Spans of chunks that are in row order already: single tokens by context length, then longer chunks."""
    decodes: list[Span] = []
    prefills: list[Span] = []
    first_row = 0
    for chunk in chunks:
        sequence = chunk.sequence
        span = Span(
            first_row, chunk.num_tokens, chunk.context_len, sequence.block_table, sequence.num_prompt_tokens
        )
        (decodes if chunk.num_tokens == 1 else prefills).append(span)
        first_row += chunk.num_tokens
    return BatchLayout(decodes, prefills, block_size)
