"""Speeds with and without the table of measured products: PYTHONPATH=server:sdk_python python3 FILE.

Both ways take turns, so that neither has the chip to itself while it is cool. First tokens of 4,096-token
prompts come from one engine with random weights, one after the other, then each after a second's pause. Steps
so long are launched, not captured, so the way may change between two of them. With `--decode` two engines
stand side by side, which an 8B model has room for, and answer so many streams at once (128 in, 256 out).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

from longshore_server.native.bench.drive import drive
from longshore_server.native.bench.models import BUILT_IN, write_config
from longshore_server.native.bench.prompts import decode_requests, first_token_request
from longshore_server.native.bench.rows import Decode, FirstToken
from longshore_server.native.config import EngineConfig
from longshore_server.native.engine import NativeEngine

PROMPT_TOKENS = 4096
IDLE_S = 1.0
WAYS = {True: "by the table", False: "as torch chooses"}


def make_engine(arguments: argparse.Namespace, **settings: Any) -> NativeEngine:
    common = {"device": arguments.device, "quantization": arguments.quantization}
    if arguments.model not in BUILT_IN:
        return NativeEngine(EngineConfig(model=arguments.model, **common, **settings))
    with tempfile.TemporaryDirectory() as folder:
        write_config(arguments.model, Path(folder))
        return NativeEngine(EngineConfig(model=folder, load_format="random", **common, **settings))


class FirstTokens:
    """Milliseconds by one engine, whose way of multiplying is changed between its prompts."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._engine = make_engine(
            arguments, max_num_seqs=8, max_model_len=PROMPT_TOKENS + 4, num_kv_blocks=2000
        )
        self._gemm = self._engine._runner.model.lm_head.gemm
        self._tables = self._gemm._tables
        self._seeds = count()

    def measure(self, with_table: bool, idle_s: float) -> float:
        self._gemm._tables = self._tables if with_table else ()
        row = FirstToken(PROMPT_TOKENS)
        requests = first_token_request(row, self._engine.vocab_size, next(self._seeds))
        time.sleep(idle_s)
        run = drive(self._engine, requests)
        self._engine.settle()
        return 1e3 * run.times[0].ttft_s

    def turns(self, idle_s: float, num_turns: int, num_prompts: int) -> dict[bool, list[float]]:
        """Of each turn's prompts the first counts only where it had a pause."""
        times: dict[bool, list[float]] = {True: [], False: []}
        for turn in range(num_turns):
            for with_table in (True, False) if turn % 2 else (False, True):
                taken = [self.measure(with_table, idle_s) for _ in range(num_prompts)]
                times[with_table] += taken if idle_s else taken[1:]
        return times


class Decodes:
    """Tokens per second by two engines."""

    def __init__(self, arguments: argparse.Namespace, max_streams: int) -> None:
        row = Decode(max_streams)
        num_blocks = max_streams * (row.max_tokens // 16 + 1)
        settings = {"max_num_seqs": max_streams, "max_model_len": row.max_tokens, "num_kv_blocks": num_blocks}
        self._engines = {way: make_engine(arguments, gemm_plans=way, **settings) for way in WAYS}
        self._seeds = count()

    def turns(self, num_streams: int, num_turns: int) -> dict[bool, list[float]]:
        rates: dict[bool, list[float]] = {True: [], False: []}
        for turn in range(-2, num_turns):  # two to capture its steps
            for way in (True, False) if turn % 2 else (False, True):
                engine = self._engines[way]
                requests = decode_requests(Decode(num_streams), engine.vocab_size, next(self._seeds))
                run = drive(engine, requests)
                engine.settle()
                if turn >= 0:
                    rates[way].append(run.num_tokens / run.wall_s)
        return rates


def show(what: str, unit: str, figures: dict[bool, list[float]]) -> None:
    for way, values in figures.items():
        spread = f"{min(values):.1f} to {max(values):.1f} of {len(values)}"
        print(f"{what}, {WAYS[way]}: {median(values):.1f} {unit}, {spread}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="llama-8b", help=f"a folder, or {' or '.join(BUILT_IN)}")
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--decode", type=int, nargs="+", metavar="STREAMS", help="instead of first tokens")
    arguments = parser.parse_args()
    if arguments.decode:
        decodes = Decodes(arguments, max(arguments.decode))
        for num_streams in arguments.decode:
            figures = decodes.turns(num_streams, arguments.turns)
            show(f"{num_streams} streams", "tok/s", figures)
        return
    first = FirstTokens(arguments)
    first.turns(0.0, 2, 3)  # warms up
    for idle_s, num_prompts in ((0.0, 3), (IDLE_S, 1)):
        show(f"first token after {idle_s:g} s", "ms", first.turns(idle_s, arguments.turns, num_prompts))


if __name__ == "__main__":
    main()
