"""Random traffic over an engine whose KV blocks leave and come back, against the undisturbed answers."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from longshore_server.native import NativeEngine, SamplingParams
from longshore_server.native.errors import QueueFullError

MAX_LEN = 80
FEW_BLOCKS: dict[str, Any] = {
    "num_kv_blocks": 48, "max_model_len": MAX_LEN, "max_num_batched_tokens": 24, "max_num_waiting": 24,
}  # fmt: skip
NUM_LAST_STEPS = 60  # in which all that is held comes back


class SwapTraffic:
    """Six kinds of requests, each asked again and again: adds, aborts, preemptions and holds."""

    def __init__(self, chosen: random.Random) -> None:
        self._chosen = chosen
        self.prompts = [[chosen.choice([7, 8])] * chosen.randrange(1, MAX_LEN - 1) for _ in range(6)]
        self.params = [
            SamplingParams(max_tokens=chosen.randrange(1, 40), temperature=1.0, seed=n, ignore_eos=True)
            for n in range(6)
        ]
        self._live: dict[str, list[int]] = {}
        self._num_whole = 0

    def run(
        self, engine: NativeEngine, calm: list[list[int]], num_steps: int, num_added: Callable[[], int]
    ) -> None:
        """Every answer that ends by itself is the calm one, and the books are clean all the way."""
        for number in range(num_steps):
            for _ in range(num_added()):
                self._add(engine, number)
            if self._live:
                self._act(engine)
            for name in sorted(self._live) if number >= num_steps - NUM_LAST_STEPS else ():
                engine.swap_in(name)
            self._step(engine, calm)
            if number % 10 == 0:
                engine.check_integrity()
        engine.check_integrity()
        stats = engine.stats()
        assert self._num_whole > 20 and stats.num_swaps_chosen and stats.num_blocks_swapped_in
        assert stats.num_failed == 0

    def _add(self, engine: NativeEngine, number: int) -> None:
        kind = self._chosen.randrange(6)
        name = f"{kind}-{number}-{self._chosen.random()}"
        try:
            engine.add_request(name, self.prompts[kind], self.params[kind], tenant=self._chosen.choice("ab"))
            self._live[name] = []
        except QueueFullError:
            pass

    def _act(self, engine: NativeEngine) -> None:
        name = self._chosen.choice(sorted(self._live))
        act = self._chosen.choice(
            [engine.preempt, engine.swap_out, engine.swap_in, engine.swap_in, engine.abort]
        )
        if act != engine.abort or self._chosen.random() < 0.3:
            act(name)

    def _step(self, engine: NativeEngine, calm: list[list[int]]) -> None:
        for output in engine.step():
            if output.token_id is not None:
                self._live[output.request_id].append(output.token_id)
            if output.finish_reason is not None:
                answer = self._live.pop(output.request_id)
                assert output.finish_reason == "abort" or answer == calm[int(output.request_id[0])]
                self._num_whole += output.finish_reason != "abort"
