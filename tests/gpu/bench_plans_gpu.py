"""First tokens with and without the table of measured products: PYTHONPATH=server:sdk_python python3 FILE.

One engine with random weights takes both ways in turns, so that neither has the chip to itself while it is
cool: prompts of 4,096 tokens one after the other, then each after a second of idling. Steps so long are
launched, not captured, so the way may change between two of them.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

from longshore_server.native.bench.drive import drive
from longshore_server.native.bench.models import BUILT_IN, write_config
from longshore_server.native.bench.prompts import first_token_request
from longshore_server.native.bench.rows import FirstToken
from longshore_server.native.config import EngineConfig
from longshore_server.native.engine import NativeEngine
from longshore_server.native.gemm.multiply import GpuGemm

PROMPT_TOKENS = 4096
IDLE_S = 1.0
ROW = FirstToken(PROMPT_TOKENS)


class Bench:
    def __init__(self, model: str, quantization: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            write_config(model, Path(folder))
            config = EngineConfig(
                model=folder, load_format="random", device="cuda", quantization=quantization,
                max_num_seqs=8, max_model_len=PROMPT_TOKENS + 4, num_kv_blocks=2000,
            )  # fmt: skip
            self._engine = NativeEngine(config)
        self._gemm: GpuGemm = self._engine._runner.model.lm_head.gemm
        self._tables = self._gemm._tables
        self._seed = 0

    def first_token_ms(self, *, with_table: bool, idle_s: float) -> float:
        self._gemm._tables = self._tables if with_table else ()
        self._seed += 1
        requests = first_token_request(ROW, self._engine.vocab_size, self._seed)
        time.sleep(idle_s)
        run = drive(self._engine, requests)
        self._engine.settle()
        return 1e3 * run.times[0].ttft_s

    def turns(self, idle_s: float, num_turns: int, num_prompts: int) -> dict[bool, list[float]]:
        """Of each turn's prompts the first counts only where it had a pause."""
        times: dict[bool, list[float]] = {True: [], False: []}
        for turn in range(num_turns):
            for with_table in (True, False) if turn % 2 else (False, True):
                taken = [
                    self.first_token_ms(with_table=with_table, idle_s=idle_s) for _ in range(num_prompts)
                ]
                times[with_table] += taken if idle_s else taken[1:]
        return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=list(BUILT_IN), default="llama-8b")
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--turns", type=int, default=8)
    args = parser.parse_args()
    bench = Bench(args.model, args.quantization)
    bench.turns(0.0, 2, 3)  # warms up
    for idle_s, num_prompts in ((0.0, 3), (IDLE_S, 1)):
        for with_table, times in bench.turns(idle_s, args.turns, num_prompts).items():
            way = "by the table" if with_table else "as torch chooses"
            shown = f"{median(times):.1f} ms, {min(times):.1f} to {max(times):.1f} of {len(times)}"
            print(f"{args.model} after {idle_s:g} s, {way}: {shown}", flush=True)


if __name__ == "__main__":
    main()
