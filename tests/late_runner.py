"""A runner whose tokens are seen a step late, as a GPU's are, over one that runs each step to its end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from longshore_server.native.sampler import SampledToken
from longshore_server.native.scheduler import Chunk


class LateRunner:
    """Runs each step at once but shows its tokens when asked, as a GPU does; unseen ones it knows itself."""

    overlaps = True

    def __init__(self, runner: Any) -> None:
        self.runner = runner
        self.unseen: dict[int, int] = {}

    def prepare(self) -> bool:
        return self.runner.prepare()

    def settle(self) -> None:
        self.runner.settle()

    def close(self) -> None:
        self.runner.close()

    def clear_blocks(self, blocks: Sequence[int]) -> None:
        self.runner.clear_blocks(blocks)

    def launch(self, chunks: Sequence[Chunk]) -> Callable[[], list[SampledToken | None]]:
        waiting = [chunk.sequence for chunk in chunks if chunk.sequence.num_inflight_tokens]
        for sequence in waiting:
            sequence.token_ids.append(self.unseen[id(sequence)])
            sequence.num_inflight_tokens = 0
        try:
            results = self.runner.run(chunks)
        finally:
            for sequence in waiting:
                sequence.token_ids.pop()
                sequence.num_inflight_tokens = 1
        for chunk, result in zip(chunks, results, strict=True):
            if result is not None:
                self.unseen[id(chunk.sequence)] = result.token_id
        return lambda: results
