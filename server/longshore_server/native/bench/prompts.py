"""The requests of a row: token ids and arrival times, all from a seed. It knows no engine."""

from __future__ import annotations

import random
from dataclasses import dataclass

from longshore_server.native.bench.rows import Decode, FirstToken, Mixed, Poisson

NUM_PREFIXES = 4


@dataclass(frozen=True, slots=True)
class BenchRequest:
    """`arrival_s` counts from the start of the run."""

    request_id: str
    prompt_token_ids: list[int]
    num_answer: int
    arrival_s: float = 0.0


def decode_requests(row: Decode, vocab_size: int, seed: int) -> list[BenchRequest]:
    draw = random.Random(seed)
    return [
        BenchRequest(f"decode-{n}", _tokens(draw, row.num_prompt, vocab_size), row.num_answer)
        for n in range(row.num_streams)
    ]


def first_token_request(row: FirstToken, vocab_size: int, seed: int) -> list[BenchRequest]:
    return [BenchRequest("ttft", _tokens(random.Random(seed), row.num_prompt, vocab_size), 1)]


def mixed_requests(row: Mixed, vocab_size: int, seed: int, length_seed: int) -> list[BenchRequest]:
    """Two seeds, since rounds of the same lengths must not find each other's prompts in a cache."""
    draw = random.Random(length_seed)
    lengths = [
        (draw.randint(row.low, row.high), draw.randint(row.low, row.high)) for _ in range(row.num_requests)
    ]
    draw = random.Random(seed)
    return [
        BenchRequest(f"mixed-{n}", _tokens(draw, num_prompt, vocab_size), num_answer)
        for n, (num_prompt, num_answer) in enumerate(lengths)
    ]


def poisson_requests(
    row: Poisson, rate_per_s: float, num_requests: int, vocab_size: int, seed: int
) -> list[BenchRequest]:
    """An open loop: gaps between arrivals are exponential, whatever the engine does."""
    draw = random.Random(seed)
    prefixes = [_tokens(draw, row.num_shared, vocab_size) for _ in range(NUM_PREFIXES)]
    requests, arrival_s = [], 0.0
    for n in range(num_requests):
        arrival_s += draw.expovariate(rate_per_s)
        prompt = draw.choice(prefixes) + _tokens(draw, row.num_prompt - row.num_shared, vocab_size)
        requests.append(BenchRequest(f"poisson-{n}", prompt, row.num_answer, arrival_s))
    return requests


def prefix_requests(requests: list[BenchRequest], row: Poisson) -> list[BenchRequest]:
    """One request for each shared prefix of `requests`, to have them cached before the clock runs."""
    prefixes = dict.fromkeys(tuple(request.prompt_token_ids[: row.num_shared]) for request in requests)
    return [BenchRequest(f"prefix-{n}", [*prefix, 0], 1) for n, prefix in enumerate(prefixes)]


def _tokens(draw: random.Random, num_tokens: int, vocab_size: int) -> list[int]:
    return draw.choices(range(vocab_size), k=num_tokens)
