"""Exact match of the Shop teacher in the engine: plain, FP8 weights, FP8 weights and FP8 KV. 1 if over half a
point is lost. Runs on any device.

`PYTHONPATH=server:sdk_python:examples python3 tests/gpu/eval_fp8_shop.py --device cuda --per-kind 300`
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from typing import Any

from transformers import AutoTokenizer

from longshore_server.native import EngineConfig, NativeEngine, SamplingParams
from shop.chat import messages, render
from shop.evaluate import MAX_ANSWER_TOKENS, heldout_questions
from shop.models import MODELS

MOST_LOST = 0.005
FORMS: dict[str, dict[str, Any]] = {
    "bf16": {"dtype": "bfloat16"},
    "FP8 weights": {"dtype": "bfloat16", "quantization": "fp8"},
    "FP8 weights and KV": {"dtype": "bfloat16", "quantization": "fp8", "kv_cache_dtype": "fp8"},
}


def _answers(device: str, form: dict[str, Any], prompts: list[list[int]]) -> list[list[int]]:
    """Greedy answers of an engine whose memory is free again afterwards: each takes all that there is."""
    config = EngineConfig(model=str(MODELS / "shop-teacher"), device=device, max_num_seqs=128, **form)
    params = SamplingParams(max_tokens=MAX_ANSWER_TOKENS, temperature=0.0)
    engine = NativeEngine(config)
    try:
        return engine.generate(prompts, params)
    finally:
        engine.close()
        del engine
        gc.collect()  # captured steps hold their runner in a ring


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--per-kind", type=int, default=20, help="questions of each kind")
    parser.add_argument("--seed", type=int, default=0, help="of the held-out questions")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "shop-teacher")
    asked = list(heldout_questions(arguments.per_kind, arguments.seed))
    prompts = [list(tokenizer(render(messages(*each)), add_special_tokens=False).input_ids) for each in asked]
    shares: list[float] = []
    for name, form in FORMS.items():
        began_s = time.monotonic()
        answers = tokenizer.batch_decode(_answers(arguments.device, form, prompts), skip_special_tokens=True)
        right = sum(question.is_correct(text) for (_, question), text in zip(asked, answers, strict=True))
        shares.append(right / len(asked))
        took_s = time.monotonic() - began_s
        print(f"{name:<20} {right} of {len(asked)} ({100 * shares[-1]:.2f}%), {took_s:.1f} s", flush=True)
    lost = shares[0] - min(shares)
    print(f"most lost: {100 * lost:.2f} points, {100 * MOST_LOST} are allowed")
    return 1 if lost > MOST_LOST else 0


if __name__ == "__main__":
    sys.exit(main())
