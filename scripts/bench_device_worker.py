"""One engine of scripts/bench_device*.py in a process of its own: answers each line on stdin with JSON.

Arguments: kind (longshore, llama, genai, torch), model path, options. Each line is one prompt and one greedy
answer: `num_decode` tokens of it, or, with `stop`, the whole answer. Timed in CPU seconds of this process,
which other work on the machine disturbs least, and in wall seconds. Run by any Python that has the engine;
imports nothing of Longshore but for its own kind.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

Step = Callable[[list[int], int], int]  # tokens and how many stand before them -> the greedy next one
Answer = Callable[[list[int], list[int], int], list[int]]  # prompt, stop tokens, most tokens -> answer


def longshore(path: str, options: dict[str, Any]) -> Step:
    session = open_session(path, options)
    return lambda tokens, past: int(session.forward(tokens, past).argmax())


def open_session(path: str, options: dict[str, Any]) -> Any:
    from pathlib import Path

    from longshore.device.session import DecoderSession
    from longshore.wire import KvGeometry

    prefill = Path(options["prefill"]) if options.get("prefill") else None
    return DecoderSession(Path(path), KvGeometry(**options["kv"]), 1, prefill)


def longshore_answers(path: str, options: dict[str, Any]) -> Answer:
    """Whole answers by the device runtime's own loop; the cache starts empty."""
    from longshore.device.generate import GeneratedToken, Generator, Job
    from longshore.device.sampling import SamplingSettings
    from longshore.device.speculate import DraftModel, PromptLookup, Proposer

    session, greedy = open_session(path, options), SamplingSettings(temperature=0.0)
    draft = open_session(options["draft"]["file"], options["draft"]) if options["guess"] == "draft" else None

    def proposer() -> Proposer | None:
        if draft is not None:
            return DraftModel(draft)
        return PromptLookup() if options["guess"] else None

    def answer(prompt: list[int], stop: list[int], max_tokens: int) -> list[int]:
        generator = Generator(session, 256, proposer())
        told: list[GeneratedToken] = []
        job = Job(
            prompt=tuple(prompt),
            generated=(),
            max_tokens=max_tokens,
            stop_token_ids=tuple(stop),
            sampling=greedy,
        )
        generator.run(job, told.append, lambda: False)
        return [token.sampled.token_id for token in told]

    return answer


def answers_of(step: Step) -> Answer:
    """Whole answers one step at a time."""

    def answer(prompt: list[int], stop: list[int], max_tokens: int) -> list[int]:
        tokens = [step(prompt, 0)]
        while tokens[-1] not in stop and len(tokens) < max_tokens:
            tokens.append(step(tokens[-1:], len(prompt) + len(tokens) - 1))
        return tokens

    return answer


def llama(path: str, options: dict[str, Any]) -> Step:
    import ctypes

    import llama_cpp as lib

    options["keep"] = lib.llama_log_callback(lambda *_: None)
    lib.llama_log_set(options["keep"], ctypes.c_void_p(0))
    lib.llama_backend_init()
    model = lib.llama_model_load_from_file(path.encode(), lib.llama_model_default_params())
    params = lib.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = options["max_tokens"]
    params.n_threads = params.n_threads_batch = 1
    context = lib.llama_init_from_model(model, params)
    memory = lib.llama_get_memory(context)

    def step(tokens: list[int], past: int) -> int:
        if past == 0:
            lib.llama_memory_clear(memory, True)
        array = (lib.llama_token * len(tokens))(*tokens)
        if lib.llama_decode(context, lib.llama_batch_get_one(array, len(tokens))) != 0:
            raise RuntimeError("llama_decode failed")
        row = lib.llama_get_logits_ith(context, -1)
        return int(np.ctypeslib.as_array(row, shape=(options["vocab_size"],)).argmax())

    return step


def genai(path: str, options: dict[str, Any]) -> Step:
    import onnxruntime_genai as og

    config = og.Config(path)
    config.overlay(
        '{"model": {"decoder": {"session_options": {"intra_op_num_threads": 1, "inter_op_num_threads": 1}}}}'
    )
    model = og.Model(config)
    held: dict[str, Any] = {}

    def step(tokens: list[int], past: int) -> int:
        if past == 0:
            params = og.GeneratorParams(model)
            params.set_search_options(max_length=options["max_tokens"], do_sample=False)
            held["generator"] = og.Generator(model, params)
            held["generator"].append_tokens(tokens)
        held["generator"].generate_next_token()  # it feeds back its own token
        return int(held["generator"].get_next_tokens()[0])

    return step


def eager(path: str, options: dict[str, Any]) -> Step:
    import torch
    from transformers import AutoModelForCausalLM, StaticCache

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    held: dict[str, Any] = {}

    @torch.no_grad()
    def step(tokens: list[int], past: int) -> int:
        if past == 0:
            held["cache"] = StaticCache(config=model.config, max_cache_len=options["max_tokens"])
        positions = torch.arange(past, past + len(tokens))[None]
        out = model(
            torch.tensor([tokens]),
            past_key_values=held["cache"],
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
        )
        return int(out.logits[0, -1].argmax())

    return step


def timed(step: Step, prompt: list[int], num_decode: int) -> dict[str, Any]:
    """One prompt and `num_decode` more tokens; the first token comes with the prompt."""
    marks = [(time.process_time(), time.perf_counter())]
    tokens = [step(prompt, 0)]
    marks.append((time.process_time(), time.perf_counter()))
    for number in range(num_decode):
        tokens.append(step(tokens[-1:], len(prompt) + number))
    marks.append((time.process_time(), time.perf_counter()))
    names = ("cpu_s", "wall_s")
    return {
        "prefill": {name: marks[1][n] - marks[0][n] for n, name in enumerate(names)},
        "decode": {name: marks[2][n] - marks[1][n] for n, name in enumerate(names)},
        "tokens": tokens[:8],
    }


def timed_answer(answer: Answer, job: dict[str, Any]) -> dict[str, Any]:
    begin_cpu_s, begin_s = time.process_time(), time.perf_counter()
    tokens = answer(job["prompt"], job["stop"], job["max_tokens"])
    cpu_s = time.process_time() - begin_cpu_s
    return {"cpu_s": cpu_s, "wall_s": time.perf_counter() - begin_s, "tokens": tokens}


def main() -> None:
    kind, path, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    if "guess" in options:
        answer = longshore_answers(path, options)
    else:
        step = {"longshore": longshore, "llama": llama, "genai": genai, "torch": eager}[kind](path, options)
        answer = answers_of(step)
    for line in sys.stdin:
        job = json.loads(line)
        told = timed_answer(answer, job) if "stop" in job else timed(step, job["prompt"], job["num_decode"])
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
