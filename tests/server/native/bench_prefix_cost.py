"""What the prefix index costs a workload that never hits it: its share of the engine thread's CPU time.

`python tests/server/native/bench_prefix_cost.py [--model FOLDER] [--device cpu]`. The time inside the index's
own functions (digests, look-ups, publishing, eviction) is taken by itself: two whole runs differ by more than
the one per cent in question. Also per 1,000 tokens, to be set against another machine's steps.
"""

from __future__ import annotations

import argparse
import functools
import random
import time
from collections.abc import Callable
from typing import Any

import torch

from longshore_server.native import EngineConfig, NativeEngine, SamplingParams
from longshore_server.native import scheduler as scheduler_module
from longshore_server.native.blocks import BlockPool
from longshore_server.native.scheduler import Scheduler


class Stopwatch:
    """CPU time of this thread inside the functions it wraps, each counted once where they nest."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.calls = 0
        self._depth = 0

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*arguments: Any, **options: Any) -> Any:
            self._depth += 1
            began_s = time.thread_time()
            try:
                return function(*arguments, **options)
            finally:
                self._depth -= 1
                self.calls += 1
                if not self._depth:
                    self.seconds += time.thread_time() - began_s

        return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="examples/models/shop-teacher")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=384)
    parser.add_argument("--answer", type=int, default=48)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    watch = Stopwatch()
    scheduler_module.find_prefix = watch.wrap(scheduler_module.find_prefix)
    Scheduler._publish_full_blocks = watch.wrap(Scheduler._publish_full_blocks)  # type: ignore[method-assign]
    BlockPool._evict = watch.wrap(BlockPool._evict)  # type: ignore[method-assign]
    length = arguments.prompt + arguments.answer
    engine = NativeEngine(
        EngineConfig(
            model=arguments.model,
            device=arguments.device,
            max_num_seqs=16,
            max_model_len=length,
            num_kv_blocks=20 * -(-length // 16),  # full of what others left, so that blocks are evicted
        )
    )
    chosen = random.Random(1)
    prompts = [
        [chosen.randrange(engine.vocab_size) for _ in range(arguments.prompt)]
        for _ in range(arguments.requests)
    ]
    engine.generate(prompts[:16], SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True))
    watch.seconds, watch.calls = 0.0, 0
    began_s = time.thread_time()
    engine.generate(
        prompts[16:], SamplingParams(max_tokens=arguments.answer, temperature=0.0, ignore_eos=True)
    )
    total_s = time.thread_time() - began_s
    num_tokens = (arguments.requests - 16) * length
    overhead_s = watch.calls * _timer_s()
    stats = engine.stats()
    print(f"{num_tokens} tokens, {stats.prefix_cache_hits} of them hits; {total_s:.2f} s of CPU")
    print(f"index: {1e3 * watch.seconds:.2f} ms, {1e3 * overhead_s:.2f} of them the timer's;", end=" ")
    print(f"{100 * watch.seconds / total_s:.2f}% of the whole,", end=" ")
    print(f"{1e9 * watch.seconds / num_tokens:.0f} us per 1,000 tokens")


def _timer_s() -> float:
    """What timing one call adds."""
    watch = Stopwatch()
    nothing = watch.wrap(lambda: None)
    for _ in range(10_000):
        nothing()
    return watch.seconds / 10_000


if __name__ == "__main__":
    main()
