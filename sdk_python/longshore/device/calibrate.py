"""How fast this device is with this model, measured at start; what routing goes by instead of a guess."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from longshore.device.resolution import VisionCalibration

if TYPE_CHECKING:
    from longshore.device.session import DecoderSession

PREFILL_TOKENS = 64
MAX_DECODE_STEPS = 64
LEAST_GAIN = 1.1


@dataclass(frozen=True, slots=True)
class Calibration:
    """Seconds to load the model, and tokens per second of reading a prompt and of writing an answer.

    `vision` is what its picture encoder takes, None for a model of text.
    """

    load_s: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    vision: VisionCalibration | None = None

    def expected_ttft_s(self, num_prompt_tokens: int) -> float:
        """Time to the first token of an idle device, in seconds."""
        return num_prompt_tokens / self.prefill_tokens_per_s

    def expected_total_s(self, num_prompt_tokens: int, num_answer_tokens: int) -> float:
        """Time for a whole answer on an idle device, in seconds."""
        return self.expected_ttft_s(num_prompt_tokens) + num_answer_tokens / self.decode_tokens_per_s


def measure(session: DecoderSession, budget_s: float) -> tuple[float, float]:
    """(prefill, decode) tokens per second, medians over about `budget_s`; the cache's content is lost."""
    num_prompt = max(1, min(PREFILL_TOKENS, session.max_tokens // 2))
    words = [token_id for token_id in range(session.vocab_size) if token_id != session.image_token_id]
    prompt = [words[number % len(words)] for number in range(num_prompt)]
    session.forward(prompt, 0)  # the first run allocates and is no measure
    prefill_s = _median_s(lambda _: session.forward(prompt, 0), budget_s / 2, 64)
    num_steps = min(MAX_DECODE_STEPS, session.max_tokens - num_prompt)
    decode_s = _median_s(lambda step: session.forward(words[:1], num_prompt + step), budget_s / 2, num_steps)
    return num_prompt / prefill_s, 1 / decode_s


def choose_threads(
    open_session: Callable[[int], DecoderSession], budget_s: float, num_cores: int
) -> DecoderSession:
    """The session with the number of threads that decodes fastest, among 1, 2, 4, ... up to the cores.

    More threads must be a tenth faster to be worth their power; the first number that is not ends the search.
    """
    best, num_threads = open_session(1), 2
    _, rate = measure(best, budget_s)
    while num_threads <= num_cores:
        tried = open_session(num_threads)
        _, tried_rate = measure(tried, budget_s)
        if tried_rate < LEAST_GAIN * rate:
            break
        best, rate, num_threads = tried, tried_rate, 2 * num_threads
    return best


def _median_s(run: Callable[[int], object], budget_s: float, max_runs: int) -> float:
    times: list[float] = []
    end_s = time.perf_counter() + budget_s
    while len(times) < 3 or (len(times) < max_runs and time.perf_counter() < end_s):
        begin_s = time.perf_counter()
        run(len(times) % max_runs)
        times.append(time.perf_counter() - begin_s)
    return max(statistics.median(times), 1e-9)
