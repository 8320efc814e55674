"""Swap against recompute on a model folder: PYTHONPATH=server:sdk_python:tests python3 FILE --model FOLDER.

One request is preempted in the middle of its answer and comes back: out of host memory, out of a file, and by
computing its tokens again. Shown is the median time from the preemption to the next token, the copying out
counted, over rounds that take turns; every answer is compared with the undisturbed one.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time

import torch

from longshore_server.native import EngineConfig, NativeEngine, SamplingParams

TIERS = {"recompute": (), "host": ("host:256MiB",), "file": ("file:{}:256MiB",)}
NUM_ANSWER_TOKENS = 12


class Bench:
    """One engine per way, without a prefix cache, so that only what was swapped comes back."""

    def __init__(self, args: argparse.Namespace, folder: str) -> None:
        self.clock = time.process_time if args.device == "cpu" else time.perf_counter
        self.engines = {
            way: NativeEngine(
                EngineConfig(
                    model=args.model,
                    load_format=args.load_format,
                    device=args.device,
                    enable_prefix_cache=False,
                    max_num_seqs=4,
                    max_num_batched_tokens=args.chunk,
                    kv_swap=tuple(tier.format(folder) for tier in tiers),
                )
            )
            for way, tiers in TIERS.items()
        }

    def prompt(self, num_tokens: int) -> list[int]:
        engine = self.engines["recompute"]
        return [random.randrange(engine.vocab_size) for _ in range(num_tokens)]

    def come_back_s(self, way: str, prompt: list[int]) -> float:
        """From the preemption to the next token; checks the answer."""
        engine = self.engines[way]
        params = SamplingParams(max_tokens=NUM_ANSWER_TOKENS, temperature=0.0, ignore_eos=True)
        calm = engine.generate([prompt], params)[0]
        engine.add_request("r", prompt, params)
        tokens: list[int | None] = []
        while len(tokens) < NUM_ANSWER_TOKENS // 2:
            tokens += [output.token_id for output in engine.step()]
        start_s, before = self.clock(), len(tokens)
        engine.preempt("r")
        while len(tokens) == before:
            tokens += [output.token_id for output in engine.step()]
        elapsed_s = self.clock() - start_s
        while engine.has_unfinished():
            tokens += [output.token_id for output in engine.step()]
        assert tokens == calm, f"{way}: the answer changed"
        return elapsed_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--load-format", default="auto", choices=("auto", "random"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256, 512, 960])
    parser.add_argument("--chunk", type=int, default=512, help="tokens of a prefill step")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, folder)
        for num_tokens in args.tokens:
            times: dict[str, list[float]] = {way: [] for way in TIERS}
            for _ in range(args.rounds):
                prompt = bench.prompt(num_tokens)
                for way in TIERS:
                    times[way].append(bench.come_back_s(way, prompt))
            medians = {way: statistics.median(each) * 1e3 for way, each in times.items()}
            if args.json:
                print(json.dumps({"tokens": num_tokens, **medians}))
                continue
            line = "".join(f"{way} {ms:8.2f} ms   " for way, ms in medians.items())
            print(f"{num_tokens:5} tokens   {line}x{medians['recompute'] / medians['host']:.1f}", flush=True)
        chosen = {way: engine.stats().num_swaps_chosen for way, engine in bench.engines.items()}
        given_up = {way: engine.stats().num_recomputes_chosen for way, engine in bench.engines.items()}
        print(f"swaps chosen {chosen}, recomputes chosen {given_up}")


if __name__ == "__main__":
    main()
