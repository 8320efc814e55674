"""Measures cuBLASLt's algorithms for one product after the other, torch's choice among them.

What counts is a chip as it serves: weights come from memory, not from the cache, launches are captured, few
rows come from the kernel that stands before a product in a step, and those that may win take turns until the
chip runs at the clock that its power limit leaves it. On a cool chip another algorithm is often the fastest.
Imported on CUDA only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from itertools import product as combinations
from statistics import median

import torch

from longshore_server.native.gemm.cublaslt import CublasLt, CublasLtError, Matmul, guesses
from longshore_server.native.gemm.multiply import few_rows_kernel, multiply_by_torch
from longshore_server.native.gemm.plans import Algorithm, Plan, Product
from longshore_server.native.model.fp8 import FP8_DTYPE, Fp8Rows, ScaledOutput
from longshore_server.native.model.fused_ops import add_rms_norm, quantize_rows

# A plan holds for the rows up to one of these and above the one before: the sizes of captured decode steps,
# then those between which tiles fill a chip differently.
LAST_ROWS = (8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
FIRST_LONG_ROWS = 384  # from here on a plan must hold in the middle of its range, too
MAX_GUESSES = 32
NUM_VARIED = 4  # of the best guesses other clusters and orders of tiles are tried
CLUSTER_SHAPES = range(2, 10)  # 1x1 to 2x4 programs
NUM_FINALISTS = 4
RING_BYTES = 256 * 1024 * 1024  # five times an H200's L2 cache
NUM_TURNS = 3
TURN_MS, LONG_TURN_MS = 15.0, 50.0
LEAST_GAIN = 0.01  # what is nearer to torch's choice than this is noise
MAX_ERROR = 1e-2  # of a result's norm
EPS = 1e-5  # of the norm that makes rows


@dataclass
class _Trial:
    """One way to multiply a number of rows, as a captured run over all weights of the ring."""

    algorithm: Algorithm | None  # None is torch's choice
    graph: torch.cuda.CUDAGraph
    num_calls: int
    short_us: float = 0.0  # of a product in the first, short run
    times_us: list[float] = field(default_factory=list)

    def run_us(self, num_replays: int) -> float:
        """Microseconds of one product."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(num_replays):
            self.graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / num_replays / self.num_calls * 1e3  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Tuned:
    """What one range of rows gave; `algorithm` None leaves the product to torch."""

    first_row: int
    last_row: int
    algorithm: Algorithm | None
    torch_us: float
    best_us: float


class ProductTuner:
    """Random operands of one product, and the trials over them."""

    def __init__(self, lt: CublasLt, product: Product, device: torch.device, max_rows: int) -> None:
        self._lt, self._product, self._device = lt, product, device
        dtype = getattr(torch, product.dtype)
        self._is_fp8 = dtype == FP8_DTYPE
        self._dtype = torch.bfloat16 if self._is_fp8 else dtype
        size_bytes = product.num_outputs * product.width * dtype.itemsize
        num_weights = max(2, -(-RING_BYTES // size_bytes))
        self._weights = [self._draw(product.num_outputs, 0.02) for _ in range(num_weights)]
        self._rows = self._draw(max_rows, 1.0)
        self._hidden = torch.randn(FIRST_LONG_ROWS, product.width, dtype=self._dtype, device=device)
        self._gain = torch.ones(product.width, dtype=self._dtype, device=device)
        # Trials' results are not read, so they share memory, which lives as long as one captured run does.
        self._anchor = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._anchor):
            torch.zeros(1, device=device)  # an empty graph would be warned of

    def _draw(self, height: int, deviation: float) -> torch.Tensor:
        drawn = torch.empty(height, self._product.width, dtype=self._dtype, device=self._device)
        drawn.normal_(std=deviation)
        return quantize_rows(drawn).values if self._is_fp8 else drawn

    def tune(self, last_rows: Sequence[int]) -> Iterator[Tuned]:
        """One result for each range, in order, but for those that a kernel of our own takes."""
        before, own = 0, few_rows_kernel()
        for last_row in last_rows:
            if own is None or not own.can_multiply(self._rows[:last_row], self._weights[0]):
                yield self._tune_range(before + 1, last_row)
            before = last_row

    def _tune_range(self, first_row: int, last_row: int) -> Tuned:
        right = (trial for trial in self._ranked(last_row) if self._is_right(trial, first_row, last_row))
        finalists = list(islice(right, NUM_FINALISTS))
        own = self._trial(None, last_row)
        _take_turns([own, *finalists], last_row)
        own_us = median(own.times_us)
        shares = {trial.algorithm: [median(trial.times_us) / own_us] for trial in finalists}
        if last_row >= FIRST_LONG_ROWS:
            middle = (first_row + last_row) // 2
            others = [self._trial(algorithm, middle) for algorithm in (None, *shares)]
            _take_turns(others, middle)
            for trial in others[1:]:
                shares[trial.algorithm].append(median(trial.times_us) / median(others[0].times_us))
        good = {a: sum(each) / len(each) for a, each in shares.items() if max(each) < 1.0}
        best = min(good, key=good.__getitem__, default=None)
        if best is not None and good[best] > 1.0 - LEAST_GAIN:
            best = None
        best_us = own_us if best is None else own_us * shares[best][0]
        return Tuned(first_row, last_row, best, own_us, best_us)

    def _ranked(self, num_rows: int) -> list[_Trial]:
        """Trials of the library's guesses and of variants of the best of them, by a first short run."""
        algorithms = guesses(self._lt, self._product, num_rows, self._dtype, MAX_GUESSES)
        trials = self._short_runs(algorithms, num_rows)
        varied = (
            trial.algorithm._replace(cluster_shape=cluster, swizzle=swizzle)
            for trial in trials[:NUM_VARIED]
            for cluster, swizzle in combinations(CLUSTER_SHAPES, (0, 1))
            if trial.algorithm is not None
        )
        tried = {trial.algorithm for trial in trials}
        more = self._short_runs((each for each in varied if each not in tried), num_rows)
        return sorted(trials + more, key=lambda trial: trial.short_us)

    def _short_runs(self, algorithms: Iterable[Algorithm], num_rows: int) -> list[_Trial]:
        """The fastest first, each algorithm once; those that cannot do it are left out."""
        trials = []
        for algorithm in dict.fromkeys(algorithms):
            try:
                trial = self._trial(algorithm, num_rows)
            except CublasLtError:
                continue
            trial.short_us = min(trial.run_us(1) for _ in range(3))
            trials.append(trial)
        return sorted(trials, key=lambda trial: trial.short_us)

    def _trial(self, algorithm: Algorithm | None, num_rows: int) -> _Trial:
        multiply = self._multiply(algorithm, num_rows)
        multiply(self._made_rows(num_rows), self._weights[0])
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._anchor.pool()):
            for weight in self._weights:
                multiply(self._made_rows(num_rows), weight)
        return _Trial(algorithm, graph, len(self._weights))

    def _made_rows(self, num_rows: int) -> torch.Tensor:
        """Rows of a short step come from the kernel that makes them there, and are waited for."""
        if num_rows >= FIRST_LONG_ROWS:
            return self._rows[:num_rows]
        hidden = self._hidden[:num_rows]
        rows, _ = add_rms_norm(ScaledOutput(hidden), hidden, self._gain, EPS, self._is_fp8)
        return rows.values if isinstance(rows, Fp8Rows) else rows

    def _multiply(
        self, algorithm: Algorithm | None, num_rows: int
    ) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        if algorithm is None:
            return lambda rows, weight: multiply_by_torch(rows, weight, None, self._dtype)
        return Matmul(self._lt, self._product, num_rows, self._dtype, algorithm)

    def _is_right(self, trial: _Trial, *row_counts: int) -> bool:
        """Beside torch's result, at the first and the last number of rows, whatever memory held before."""
        weight = self._weights[0]
        for num_rows in row_counts:
            rows = self._rows[:num_rows]
            expected = self._multiply(None, num_rows)(rows, weight).float()
            try:
                multiply = self._multiply(trial.algorithm, num_rows)
            except CublasLtError:
                return False
            for num_bytes in (4, 64, 1024, 64 * 1024):  # a workspace comes from what is freed here
                torch.full((num_bytes,), 255, dtype=torch.uint8, device=self._device)
            error = (multiply(rows, weight).float() - expected).norm() / expected.norm()
            if not bool(error < MAX_ERROR):
                return False
        return True


def _take_turns(trials: list[_Trial], num_rows: int) -> None:
    """Fills `times_us`, each turn long enough for the clock to settle, its first third left out."""
    turn_ms = LONG_TURN_MS if num_rows >= FIRST_LONG_ROWS else TURN_MS
    num_replays = max(3, int(turn_ms * 1e3 / (trials[0].run_us(1) * trials[0].num_calls)))
    for _ in range(NUM_TURNS):
        for trial in trials:
            trial.run_us(max(1, num_replays // 3))
            trial.times_us.append(trial.run_us(num_replays))


def plans_of(results: list[Tuned]) -> list[Plan]:
    """Neighbouring ranges of one algorithm become one; those left to torch have no plan."""
    plans: list[Plan] = []
    for result in results:
        if result.algorithm is None:
            continue
        if plans and plans[-1].last_row == result.first_row - 1 and plans[-1].algorithm == result.algorithm:
            plans[-1] = plans[-1]._replace(last_row=result.last_row)
        else:
            plans.append(Plan(result.first_row, result.last_row, result.algorithm))
    return plans
