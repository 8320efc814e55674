"""Steps as one call of compiled code: flat arrays of scheduled chunks in, logits out, then the sampler.

It schedules nothing. Blocks keep what another owner left in them: a row reads its own tokens alone.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf

import torch

from longshore_server.native.cpu import structs
from longshore_server.native.cpu.decoder import CompiledDecoder
from longshore_server.native.model.vision import ImageFeatures
from longshore_server.native.sampler import SampledToken, sample
from longshore_server.native.scheduler import Chunk


class CpuRunner:
    """Runs a compiled decoder over its KV cache, each step to its end. Rows never depend on one another."""

    overlaps = False

    def __init__(self, decoder: CompiledDecoder, features: ImageFeatures | None = None) -> None:
        self.decoder = decoder
        self._features = features
        self._scratch = torch.empty(0)

    def clear_blocks(self, blocks: SequenceOf[int]) -> None:
        """Nothing to clear: what stands behind a row's context is not read."""

    def launch(self, chunks: SequenceOf[Chunk]) -> Callable[[], list[SampledToken | None]]:
        """Runs the chunks; the results are what the callable gives."""
        results = self.run(chunks)
        return lambda: results

    @torch.inference_mode()
    def run(self, chunks: SequenceOf[Chunk]) -> list[SampledToken | None]:
        """Computes the chunks' KV and samples where a chunk ends its sequence; results in the chunks' order.

        Running the same chunks again gives the same result and the same cache: nothing else is changed.
        """
        logits = self._forward(chunks)
        sampling = [chunk.sequence for chunk in chunks if chunk.samples]
        if len(sampling) == len(chunks):
            return list(sample(logits, sampling))
        sampled = iter(sample(logits, sampling) if sampling else ())
        return [next(sampled) if chunk.samples else None for chunk in chunks]

    def _forward(self, chunks: SequenceOf[Chunk]) -> torch.Tensor:
        """Logits [sampling chunks, vocab], in the chunks' order."""
        tokens, positions, tables, blocks, samples = (array("i") for _ in range(5))
        shown: list[torch.Tensor] = []
        max_context = 0
        for chunk in chunks:
            sequence = chunk.sequence
            start = sequence.num_computed_tokens
            end = start + chunk.num_tokens
            tokens.extend(sequence.token_ids[start:end])
            if self._features is not None and sequence.images:
                self._show(self._features, chunk, tokens, shown)
            positions.extend(range(start, end))
            tables.extend([len(blocks)] * chunk.num_tokens)
            blocks.extend(sequence.block_table)
            max_context = max(max_context, end)
            if chunk.samples:
                samples.append(len(tokens) - 1)
        rotary = self.decoder.rotary
        rotary.cover(max_context)
        logits = torch.empty(len(samples), self.decoder.vocab_size)
        features = torch.cat(shown) if shown else None  # [image rows, hidden]; alive until the step is done
        step = structs.Step(
            len(tokens),
            len(samples),
            torch.get_num_threads(),
            max_context,
            *(each.buffer_info()[0] for each in (tokens, positions, tables, blocks, samples)),
            rotary.cosines.data_ptr(),
            rotary.sines.data_ptr(),
            features=None if features is None else features.data_ptr(),
            logits=logits.data_ptr(),
        )
        self._make_room(step)
        self.decoder.library.run_step(self.decoder.struct, step)
        return logits

    @staticmethod
    def _show(features: ImageFeatures, chunk: Chunk, tokens: array[int], shown: list[torch.Tensor]) -> None:
        """Puts -1 - n in place of the chunk's last tokens that the n-th of the shown rows stands for."""
        first = len(tokens) - chunk.num_tokens
        for row, rows in features.shown(chunk):
            number = sum(map(len, shown))
            for index in range(len(rows)):
                tokens[first + row + index] = -1 - (number + index)
            shown.append(rows)

    def _make_room(self, step: structs.Step) -> None:
        needed = self.decoder.library.scratch_floats(self.decoder.struct, ctypes.byref(step))
        if needed > self._scratch.numel():
            self._scratch = torch.empty(needed)
        step.scratch = self._scratch.data_ptr()
