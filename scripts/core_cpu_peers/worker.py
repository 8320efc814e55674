"""One engine under comparison, as a process: `python worker.py NAME MODEL THREADS`.

Reads rounds from standard input, one JSON object a line: {"prompts": [[ids]], "num_answer": n}. Answers each
with {"wall_s", "cpu_s", "answers"}: the time from the first prompt's arrival to the last answer's end.
All are greedy and ignore the end token. What an engine needs is imported when it is the one asked for.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

Generate = Callable[[list[list[int]], int], list[list[int]]]
MAX_STREAMS = 32
MAX_TOKENS = 512


def longshore(model: str, num_threads: int, *, fuse_layers: bool | None = None) -> Generate:
    import torch

    from longshore_server.native import EngineConfig, NativeEngine, SamplingParams

    torch.set_num_threads(num_threads)
    engine = NativeEngine(
        EngineConfig(model=model, max_num_seqs=MAX_STREAMS, max_model_len=MAX_TOKENS, fuse_layers=fuse_layers)
    )

    def generate(prompts: list[list[int]], num_answer: int) -> list[list[int]]:
        params = SamplingParams(max_tokens=num_answer, temperature=0.0, ignore_eos=True)
        return engine.generate(prompts, params)

    return generate


def longshore_torch(model: str, num_threads: int) -> Generate:
    """What serves where there is no C compiler."""
    return longshore(model, num_threads, fuse_layers=False)


def transformers(model: str, num_threads: int) -> Generate:
    """Its continuous batching, with one manager for all rounds."""
    import logging

    import torch
    from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(num_threads)
    loaded = AutoModelForCausalLM.from_pretrained(
        model, local_files_only=True, dtype=torch.float32, attn_implementation="sdpa"
    )
    loaded.train(False)
    manager = loaded.init_continuous_batching(
        generation_config=GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0),
        continuous_batching_config=ContinuousBatchingConfig(
            num_blocks=MAX_STREAMS * 3, max_batch_tokens=512, max_requests_per_batch=MAX_STREAMS
        ),
    )
    manager.start()

    def generate(prompts: list[list[int]], num_answer: int) -> list[list[int]]:
        ids = manager.add_requests(prompts, max_new_tokens=num_answer)
        answers: dict[str, list[int]] = {}
        while len(answers) < len(ids):
            result = manager.get_result(timeout=120)
            if result is None:
                raise RuntimeError("its continuous batching gave no result")
            if result.error is not None:
                raise RuntimeError(str(result.error))
            if result.is_finished():
                answers[result.request_id] = list(result.generated_tokens)
        return [answers[request_id] for request_id in ids]

    return generate


def llama_cpp(model: str, num_threads: int) -> Generate:
    """libllama's own batched decode, one sequence a stream: what its server's slots do, without HTTP."""
    import llama_cpp as lib

    lib.llama_backend_init()
    silence = lib.llama_log_callback(lambda *_: None)
    lib.llama_log_set(silence, None)
    loaded = lib.llama_model_load_from_file(model.encode(), lib.llama_model_default_params())
    if not loaded:
        raise RuntimeError(f"{model} cannot be loaded")
    num_vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(loaded))
    contexts: dict[int, Any] = {}

    def context_for(num_streams: int) -> Any:
        if num_streams not in contexts:
            params = lib.llama_context_default_params()
            params.n_ctx, params.n_seq_max = MAX_TOKENS * num_streams, num_streams
            params.n_threads = params.n_threads_batch = num_threads
            contexts[num_streams] = lib.llama_init_from_model(loaded, params)
        return contexts[num_streams]

    def generate(prompts: list[list[int]], num_answer: int) -> list[list[int]]:
        assert silence  # libllama calls it for as long as it lives
        context = context_for(len(prompts))
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        answers: list[list[int]] = [[] for _ in prompts]
        for stream, token in _prefill(lib, context, prompts, num_vocab):
            answers[stream].append(token)
        for index in range(num_answer - 1):
            rows = [
                (answer[-1], len(prompt) + index, stream, True)
                for stream, (answer, prompt) in enumerate(zip(answers, prompts, strict=True))
            ]
            for answer, token in zip(answers, _decode(lib, context, rows, num_vocab), strict=True):
                answer.append(token)
        return answers

    return generate


def _prefill(lib: Any, context: Any, prompts: list[list[int]], num_vocab: int) -> list[tuple[int, int]]:
    """Prompts in batches of as many tokens as the context takes at once; (stream, first token) of each."""
    rows = [
        (token, position, stream, position == len(prompt) - 1)
        for stream, prompt in enumerate(prompts)
        for position, token in enumerate(prompt)
    ]
    firsts: list[tuple[int, int]] = []
    size = lib.llama_n_batch(context)
    for start in range(0, len(rows), size):
        batch = rows[start : start + size]
        tokens = _decode(lib, context, batch, num_vocab)
        firsts += zip([stream for _, _, stream, is_last in batch if is_last], tokens, strict=True)
    return firsts


def _decode(lib: Any, context: Any, rows: list[tuple[int, int, int, bool]], num_vocab: int) -> list[int]:
    import numpy as np

    batch = lib.llama_batch_init(len(rows), 0, 1)
    batch.n_tokens = len(rows)
    for index, (token, position, stream, wants_logits) in enumerate(rows):
        batch.token[index], batch.pos[index] = token, position
        batch.n_seq_id[index], batch.seq_id[index][0] = 1, stream
        batch.logits[index] = wants_logits
    try:
        if lib.llama_decode(context, batch) != 0:
            raise RuntimeError("llama_decode failed")
    finally:
        lib.llama_batch_free(batch)
    num_outputs = sum(wants_logits for *_, wants_logits in rows)
    if num_outputs == 0:
        return []
    logits = np.ctypeslib.as_array(lib.llama_get_logits(context), (num_outputs, num_vocab))
    return logits.argmax(axis=1).tolist()


ENGINES = {
    "longshore": longshore,
    "longshore-torch": longshore_torch,
    "transformers": transformers,
    "llama.cpp": llama_cpp,
}


def main() -> None:
    name, model, num_threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
    answers_to = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever an engine prints must not mix with the answers
    generate = ENGINES[name](model, num_threads)
    for line in sys.stdin:
        job = json.loads(line)
        start_s, start_cpu_s = time.perf_counter(), time.process_time()
        answers = generate(job["prompts"], job["num_answer"])
        measured = {"wall_s": time.perf_counter() - start_s, "cpu_s": time.process_time() - start_cpu_s}
        answers_to.write(json.dumps(measured | {"answers": answers}) + "\n")
        answers_to.flush()
    os._exit(0)  # an engine's background threads may not end by themselves


if __name__ == "__main__":
    try:
        main()
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # even while an engine's background threads run
