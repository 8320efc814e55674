"""Speed of the engine by itself: `python -m longshore_server.native.bench --model FOLDER`.

Greedy answers of fixed length to random token-id prompts, at several numbers of streams, and the same model
under `transformers.generate` for comparison. Times are CPU time on a CPU (other load on the machine counts
less) and wall-clock time elsewhere. It measures; it serves nobody.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from transformers import AutoModelForCausalLM

from longshore_server.native.config import EngineConfig
from longshore_server.native.engine import NativeEngine
from longshore_server.native.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class Measurement:
    """Tokens per second over all streams: of prompts until each has its first token, then of answers."""

    what: str
    num_streams: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float


def measure_engine(
    engine: NativeEngine, num_streams: int, num_prompt: int, num_answer: int, clock: Callable[[], float]
) -> Measurement:
    """One round on an idle engine; prompts are fresh each time, so nothing comes from the prefix cache."""
    params = SamplingParams(max_tokens=num_answer, temperature=0.0, ignore_eos=True)
    for index in range(num_streams):
        engine.add_request(f"bench-{index}", _random_prompt(num_prompt, engine.vocab_size), params)
    num_started = 0
    start_s = clock()
    while num_started < num_streams:
        num_started += sum(output.offset == 0 for output in engine.step())
    middle_s = clock()
    before = engine.stats().num_generated_tokens
    while engine.has_unfinished():
        engine.step()
    num_decoded = engine.stats().num_generated_tokens - before
    end_s = clock()
    prefill = num_streams * num_prompt / (middle_s - start_s)
    return Measurement("native engine", num_streams, prefill, num_decoded / (end_s - middle_s))


@torch.inference_mode()
def measure_transformers(
    config: EngineConfig, num_prompt: int, num_answer: int, clock: Callable[[], float]
) -> Measurement:
    """The same folder under `generate` with SDPA attention, one stream."""
    model = AutoModelForCausalLM.from_pretrained(config.model, local_files_only=True, dtype=torch.float32)
    model.to(config.device).train(False)
    ids = torch.tensor([_random_prompt(num_prompt, model.config.vocab_size)], device=config.device)

    def seconds(num_tokens: int) -> float:
        start_s = clock()
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        return clock() - start_s

    seconds(2)  # warm
    first_s, whole_s = seconds(1), seconds(num_answer)
    return Measurement(
        "transformers.generate", 1, num_prompt / first_s, (num_answer - 1) / (whole_s - first_s)
    )


def _random_prompt(num_tokens: int, vocab_size: int) -> list[int]:
    return [random.randrange(vocab_size) for _ in range(num_tokens)]


def _clock(device: str) -> Callable[[], float]:
    return time.process_time if device == "cpu" else time.perf_counter


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="longshore_server.native.bench", description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="model folder")
    parser.add_argument("--load-format", default="auto", choices=("auto", "random"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--answer-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3, help="the best of so many rounds is shown")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def main() -> None:
    args = _parse()
    torch.set_num_threads(args.threads)
    config = EngineConfig(
        model=args.model, load_format=args.load_format, device=args.device, max_num_seqs=max(args.streams)
    )
    clock = _clock(args.device)
    engine = NativeEngine(config)
    sizes = (args.prompt_tokens, args.answer_tokens)
    measure_engine(engine, min(args.streams), *sizes, clock)  # warm
    rounds = [[measure_engine(engine, n, *sizes, clock) for _ in range(args.rounds)] for n in args.streams]
    if args.load_format == "auto":
        rounds.append([measure_transformers(config, *sizes, clock) for _ in range(args.rounds)])
    best = [max(each, key=lambda m: m.decode_tokens_per_s) for each in rounds]
    if args.json:
        print(json.dumps([asdict(measurement) for measurement in best]))
        return
    print(f"{'':24}{'streams':>8}{'prefill tok/s':>16}{'decode tok/s':>16}")
    for m in best:
        print(f"{m.what:24}{m.num_streams:8}{m.prefill_tokens_per_s:16.0f}{m.decode_tokens_per_s:16.0f}")


if __name__ == "__main__":
    main()
