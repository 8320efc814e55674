"""Cuts a step's chunks where rows that attend sparsely begin, and gives tokens back to the chunks.

Each such row becomes a decode of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf

from longshore_server.native.attention.sparsity import Sparsity
from longshore_server.native.sampler import SampledToken
from longshore_server.native.scheduler import Chunk


def cut_sparse_rows(chunks: SequenceOf[Chunk], sparsity: Sparsity | None) -> list[tuple[int, Chunk]]:
    """Each piece and which of `chunks` it is of, in order; a chunk's last piece samples if the chunk does.

    Generated tokens are sparse when they are computed anew, too: what a token sees is a matter of its
    position, not of the step that computes it.
    """
    pieces: list[tuple[int, Chunk]] = []
    for index, chunk in enumerate(chunks):
        num_dense = chunk.num_tokens
        if sparsity is not None:
            first_sparse = sparsity.first_position(chunk.sequence.num_prompt_tokens)
            num_dense = min(num_dense, max(0, first_sparse - chunk.start))
        if num_dense == chunk.num_tokens or chunk.num_tokens == 1:
            pieces.append((index, chunk))
            continue
        if num_dense:
            pieces.append((index, Chunk(chunk.sequence, num_dense, samples=False, offset=chunk.offset)))
        for row in range(num_dense, chunk.num_tokens):
            is_last = row == chunk.num_tokens - 1
            piece = Chunk(chunk.sequence, 1, samples=chunk.samples and is_last, offset=chunk.offset + row)
            pieces.append((index, piece))
    return pieces


def tokens_of_chunks(
    pieces: SequenceOf[tuple[int, Chunk]], sampled: Iterable[SampledToken], num_chunks: int
) -> list[SampledToken | None]:
    """The tokens of the pieces that sample, in their order, to the chunks'; None where a chunk does not."""
    tokens: list[SampledToken | None] = [None] * num_chunks
    samples = [index for index, piece in pieces if piece.samples]
    for index, token in zip(samples, sampled, strict=True):
        tokens[index] = token
    return tokens
