"""Steps as one call of compiled code: flat arrays of scheduled chunks in, logits out, then the sampler.

It schedules nothing. Blocks keep what another owner left in them: a row reads its own tokens alone.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf

import torch

from longshore_server.native.cpu import structs
from longshore_server.native.cpu.decoder import CompiledDecoder
from longshore_server.native.model.vision import ImageFeatures
from longshore_server.native.sampler import NOT_FINITE, SampledToken, sample
from longshore_server.native.scheduler import Chunk


class CpuRunner:
    """Runs a compiled decoder over its KV cache, each step to its end. Rows never depend on one another."""

    overlaps = False

    def __init__(self, decoder: CompiledDecoder, features: ImageFeatures | None = None) -> None:
        self.decoder = decoder
        self._features = features
        self._scratch = torch.empty(0)
        self._logits = torch.empty(0, decoder.vocab_size)

    def clear_blocks(self, blocks: SequenceOf[int]) -> None:
        """Nothing to clear: what stands behind a row's context is not read."""

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

    def run(self, chunks: SequenceOf[Chunk]) -> list[SampledToken | None]:
        """Computes the chunks' KV and samples where a chunk ends its sequence; results in the chunks' order.

        Running the same chunks again gives the same result and the same cache: nothing else is changed.
        """
        sampling = [chunk.sequence for chunk in chunks if chunk.samples]
        logits, best = self._forward(chunks, len(sampling))
        if all(sequence.params.is_plain_greedy for sequence in sampling):
            tokens = [_token(token_id) for token_id in best]
        else:
            with torch.inference_mode():
                tokens = sample(logits, sampling)
        if len(sampling) == len(chunks):
            return list(tokens)
        left = iter(tokens)
        return [next(left) if chunk.samples else None for chunk in chunks]

    def _forward(self, chunks: SequenceOf[Chunk], num_samples: int) -> tuple[torch.Tensor, array[int]]:
        """Logits [sampling chunks, vocab] in the chunks' order, and the likeliest token of each, or -1.

        The logits hold until the next step.
        """
        tokens, positions, tables, blocks, samples = (array("i") for _ in range(5))
        shown: list[torch.Tensor] = []
        max_context = 0
        for chunk in chunks:
            sequence = chunk.sequence
            start, end = chunk.start, chunk.context_len
            tokens.extend(sequence.token_ids[start:end])
            if self._features is not None and sequence.images:
                self._show(self._features, chunk, tokens, shown)
            positions.extend(range(start, end))
            tables.extend([len(blocks)] * chunk.num_tokens)
            blocks.extend(sequence.block_table)
            max_context = max(max_context, end)
            if chunk.samples:
                samples.append(len(tokens) - 1)
        best = array("i", bytes(4 * num_samples))
        rotary = self.decoder.rotary
        rotary.cover(max_context)
        if num_samples > len(self._logits):
            self._logits = torch.empty(num_samples, self.decoder.vocab_size)
        features = torch.cat(shown) if shown else None  # [image rows, hidden]; alive until the step is done
        step = structs.Step(
            len(tokens),
            num_samples,
            torch.get_num_threads(),
            max_context,
            *(each.buffer_info()[0] for each in (tokens, positions, tables, blocks, samples)),
            rotary.cosines.data_ptr(),
            rotary.sines.data_ptr(),
            features=None if features is None else features.data_ptr(),
            logits=self._logits.data_ptr(),
            best=best.buffer_info()[0],
        )
        self._make_room(step)
        self.decoder.kernels.run_step(self.decoder.struct, step)
        return self._logits[:num_samples], best

    @staticmethod
    @torch.inference_mode()
    def _show(features: ImageFeatures, chunk: Chunk, tokens: array[int], shown: list[torch.Tensor]) -> None:
        """Puts -1 - n in place of the chunk's last tokens that the n-th of the shown rows stands for."""
        first = len(tokens) - chunk.num_tokens
        for row, rows in features.shown(chunk):
            number = sum(map(len, shown))
            for index in range(len(rows)):
                tokens[first + row + index] = -1 - (number + index)
            shown.append(rows)

    def _make_room(self, step: structs.Step) -> None:
        needed = self.decoder.kernels.scratch_floats(self.decoder.struct, step)
        if needed > len(self._scratch):
            self._scratch = torch.empty(needed)
        step.scratch = self._scratch.data_ptr()


def _token(token_id: int) -> SampledToken:
    return SampledToken(token_id) if token_id >= 0 else SampledToken(0, error=NOT_FINITE)
