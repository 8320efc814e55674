"""The core's benchmark: rows, requests, percentiles, failures, and the command on a bare install."""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longshore_server.native.bench.command import add_arguments, main
from longshore_server.native.bench.drive import Run, drive
from longshore_server.native.bench.engine_settings import engine_config
from longshore_server.native.bench.measure import Bench, Settings
from longshore_server.native.bench.models import BUILT_IN, model_cost, write_config
from longshore_server.native.bench.percentiles import percentile
from longshore_server.native.bench.prompts import BenchRequest, poisson_requests, prefix_requests
from longshore_server.native.bench.report import JsonFile, line_of
from longshore_server.native.bench.rows import Decode, FirstToken, Mixed, Poisson, parse_row
from longshore_server.native.errors import ConfigError, QueueFullError
from longshore_server.native.outputs import TokenOutput

ROOT = Path(__file__).resolve().parents[3]


# --- rows and requests ---


def test_rows_are_written_as_the_help_says() -> None:
    assert parse_row("decode:32") == Decode(32, 128, 256)
    assert parse_row("decode:8:64:16") == Decode(8, 64, 16)
    assert parse_row("ttft:4096") == FirstToken(4096)
    assert parse_row("ttft:4096:1000") == FirstToken(4096, idle_ms=1000)
    assert parse_row("mixed:256") == Mixed(256, 100, 1024)
    assert parse_row("poisson:1.5") == Poisson(1.5, 512, 384, 64)
    assert parse_row("poisson-search:64:32:8") == Poisson(None, 64, 32, 8)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "decode",
        "decode:x",
        "decode:0",
        "ttft:1:-1",
        "ttft:1:60001",
        "ttft:1:2:3",
        "mixed:4:9:3",
        "poisson:nan",
        "poisson:8:64:64:8",
    ],
)
def test_a_row_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="rows"):
        parse_row(text)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1), st.floats(0.1, 100))
def test_a_percentile_is_a_measured_value_with_its_share_below(values: list[float], percent: float) -> None:
    found = percentile(values, percent)
    assert found in values
    num_needed = len(values) * percent / 100 - 1e-9
    assert sum(value <= found for value in values) >= num_needed
    assert sum(value < found for value in values) < max(num_needed, 1)


def test_the_99th_of_a_hundred_leaves_one_above() -> None:
    assert percentile(range(100), 99) == 98 and percentile(range(100), 50) == 49


def test_arrivals_are_poisson_shared_and_the_same_for_a_seed() -> None:
    row = Poisson(20.0, 16, 12, 4)
    requests = poisson_requests(row, 20.0, 2000, 500, seed=3)
    assert requests == poisson_requests(row, 20.0, 2000, 500, seed=3)
    assert requests != poisson_requests(row, 20.0, 2000, 500, seed=4)
    assert requests[-1].arrival_s == pytest.approx(100, rel=0.1)
    gaps = [b.arrival_s - a.arrival_s for a, b in pairwise(requests)]
    assert sum(gap > 0.05 for gap in gaps) / len(gaps) == pytest.approx(math.exp(-1), abs=0.05)
    prefixes = {tuple(request.prompt_token_ids[:12]) for request in requests}
    assert len(prefixes) == 4 and all(len(request.prompt_token_ids) == 16 for request in requests)
    assert {tuple(r.prompt_token_ids[:12]) for r in prefix_requests(requests, row)} == prefixes


# --- driving ---


class SlowEngine:
    """Takes `step_s` of the given clock for each step and one token of every request in it."""

    vocab_size = 50

    def __init__(self, step_s: float, *, room: int = 10_000, broken: frozenset[str] = frozenset()) -> None:
        self.now_s = 0.0
        self._step_s, self._room, self._broken = step_s, room, broken
        self._left: dict[str, int] = {}
        self._offsets: dict[str, int] = {}

    def clock(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds + 1e-6  # past the moment, whatever rounding does

    def add_request(self, request_id: str, prompt_token_ids: Any, params: Any) -> None:
        if len(self._left) >= self._room:
            raise QueueFullError(self._room)
        self._left[request_id] = params.max_tokens
        self._offsets[request_id] = 0

    def settle(self) -> None:
        """Nothing goes on beside its steps."""

    def has_unfinished(self) -> bool:
        return bool(self._left)

    def step(self) -> list[TokenOutput]:
        self.now_s += self._step_s
        return [self._advance(request_id) for request_id in list(self._left)]

    def _advance(self, request_id: str) -> TokenOutput:
        offset = self._offsets[request_id]
        self._offsets[request_id] += 1
        self._left[request_id] -= 1
        if request_id in self._broken:
            del self._left[request_id]
            return TokenOutput(request_id, None, offset, finish_reason="error", error="it broke")
        if not self._left[request_id]:
            del self._left[request_id]
            return TokenOutput(request_id, 7, offset, finish_reason="length")
        return TokenOutput(request_id, 7, offset)


def run_on(engine: SlowEngine, requests: list[BenchRequest]) -> Run:
    return drive(engine, requests, clock=engine.clock, sleep=engine.sleep)


def test_waiting_for_a_busy_engine_counts_from_the_moment_a_request_was_due() -> None:
    requests = [
        BenchRequest("a", [1], 1, 0.0),
        BenchRequest("b", [1], 2, 0.25),
        BenchRequest("c", [1], 1, 9.0),
    ]
    run = run_on(SlowEngine(step_s=1.0), requests)
    assert [times.ttft_s for times in run.times] == pytest.approx([1.0, 1.75, 1.0], abs=1e-4)
    assert run.times[1].gaps_s == [1.0]
    assert run.wall_s == pytest.approx(10.0, abs=1e-4) and run.num_tokens == 4 and not run.failures


def test_refused_and_broken_requests_are_told_and_counted() -> None:
    engine = SlowEngine(step_s=1.0, room=2, broken=frozenset({"b"}))
    run = run_on(engine, [BenchRequest(name, [1], 2) for name in "abc"])
    assert run.failures == ["b: it broke", "c: 2 requests are already waiting"]
    assert [times.ttft_s for times in run.times] == [1.0, math.inf, math.inf]


def test_an_answer_that_ends_early_is_a_failure() -> None:
    class Stopping(SlowEngine):
        def step(self) -> list[TokenOutput]:
            outputs = super().step()
            self._left.clear()
            return [TokenOutput(o.request_id, 7, o.offset, finish_reason="stop") for o in outputs]

    assert run_on(Stopping(1.0), [BenchRequest("a", [1], 5)]).failures == ["a: ended (stop) after 1 tokens"]


# --- figures ---


def bench_over(engine: SlowEngine, **settings: Any) -> Bench:
    return Bench(engine, Settings(**settings), None, None, engine.clock, sleep=engine.sleep)


def test_decode_counts_the_whole_time_and_the_steps_apart() -> None:
    (result,) = bench_over(SlowEngine(step_s=0.01)).measure(Decode(4, 8, 21))
    assert result.figures["step_ms"] == pytest.approx(10)
    assert result.figures["decode_tokens_per_s"] == pytest.approx(400)
    assert result.figures["tokens_per_s"] == pytest.approx(400)
    assert len(result.rounds) == 3


def test_a_pause_comes_before_each_prompt_and_counts_for_none() -> None:
    engine = SlowEngine(step_s=0.01)
    (result,) = bench_over(engine, rounds=4).measure(FirstToken(8, idle_ms=500))
    assert result.row == "ttft 8 in after 500 ms idle"
    assert result.figures["ttft_ms"] == pytest.approx(10)
    assert engine.now_s == pytest.approx(4 * 0.5 + 6 * 0.01, abs=1e-3)  # two more prompts warm it up


def test_no_round_finds_another_ones_prompts_in_a_cache() -> None:
    class Noting(SlowEngine):
        def add_request(self, request_id: str, prompt_token_ids: Any, params: Any) -> None:
            prompts.append(tuple(prompt_token_ids))
            super().add_request(request_id, prompt_token_ids, params)

    for row in (Decode(3, 8, 4), FirstToken(8), Mixed(5, 6, 40)):
        prompts: list[tuple[int, ...]] = []
        list(bench_over(Noting(step_s=0.01), rounds=2).measure(row))
        num_requests = len(prompts) // 4  # two rounds warm up
        assert len(set(prompts)) == len(prompts) == 4 * num_requests
        lengths = [len(prompt) for prompt in prompts]
        assert lengths == lengths[:num_requests] * 4


def test_a_failure_shows_in_the_line_and_the_report(tmp_path: Path) -> None:
    row = Poisson(50.0, 8, 4, 2)
    engine = SlowEngine(step_s=0.01, broken=frozenset({"poisson-3"}))
    (result,) = bench_over(engine, min_poisson_requests=20, poisson_s=0.1).measure(row)
    assert result.figures["requests"] == 20 and result.failures == ["poisson-3: it broke"]
    assert result.figures["ttft_p99_ms"] == math.inf
    assert "FAILED poisson-3: it broke" in line_of(result)
    JsonFile(tmp_path / "report.json", {"settings": {}}).add(result)
    (shown,) = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert shown["failures"] == result.failures and shown["figures"]["ttft_p99_ms"] is None


class SaturatingEngine(SlowEngine):
    """One request a step, first come first served: it keeps up with 1 / step_s requests a second."""

    def step(self) -> list[TokenOutput]:
        self.now_s += self._step_s
        return [self._advance(next(iter(self._left)))]


def test_the_search_finds_the_rate_that_an_engine_keeps_up_with() -> None:
    engine = SaturatingEngine(step_s=0.05)  # 20 a second, one token each
    results = list(
        bench_over(engine, min_poisson_requests=400, max_p99_ttft_s=0.5).measure(Poisson(None, 8, 4, 1))
    )
    found = results[-1].figures["offered_per_s"]
    within = [r.figures["offered_per_s"] for r in results[:-1] if r.figures["ttft_p99_ms"] <= 500]
    assert found == max(within) and 10 < found <= 20
    assert any(r.figures["ttft_p99_ms"] > 500 for r in results[:-1])


def test_no_request_beyond_the_bound_gives_no_rate() -> None:
    engine = SaturatingEngine(step_s=1.0)
    *_, last = bench_over(engine, min_poisson_requests=20, max_p99_ttft_s=0.5).measure(Poisson(None, 8, 4, 1))
    assert last.figures == {"offered_per_s": 0.0}


# --- costs and settings ---


def test_costs_of_the_built_in_models_are_the_published_sizes(tmp_path: Path) -> None:
    folder = str(write_config("llama-8b", tmp_path))
    cost = model_cost(folder, torch.bfloat16, quantization="", kv_cache_dtype="")
    assert cost is not None
    assert cost.layer_params + 2 * cost.other_params == pytest.approx(8.03e9, rel=0.001)
    assert cost.kv_elements * cost.kv_bytes == 131072  # 128 KiB a token
    small = model_cost(folder, torch.bfloat16, quantization="fp8", kv_cache_dtype="fp8")
    assert small is not None and small.weight_bytes == cost.layer_params + 2 * cost.other_params
    assert small.kv_bytes == 1
    assert set(BUILT_IN) == {"llama-8b", "llama-70b"}


def parsed(*flags: str) -> Any:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(["--model", "folder", *flags])


def test_the_engine_is_made_large_enough_for_the_rows() -> None:
    config = engine_config(parsed(), [Decode(32), FirstToken(700)], "auto")
    assert (config.max_num_seqs, config.max_model_len) == (32, 704)
    assert config.num_kv_blocks is not None and config.num_kv_blocks * config.block_size >= 32 * 384
    config = engine_config(
        parsed("--set", "batch_invariant=false", "--set", "block_size=32"), [Decode(1)], "auto"
    )
    assert config.batch_invariant is False and config.block_size == 32
    with pytest.raises(ConfigError, match="wings"):
        engine_config(parsed("--set", "wings=2"), [Decode(1)], "auto")


# --- the command ---


def test_the_command_runs_without_the_rest_of_longshore(
    model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """Only server and sdk_python on the path, and no web framework to be had."""
    (tmp_path / "fastapi.py").write_text("raise ImportError('no FastAPI here')\n")
    path = os.pathsep.join(str(part) for part in (tmp_path, ROOT / "server", ROOT / "sdk_python"))
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "longshore_server.native.bench", "--model", str(model_folder("llama"))]
    rows = ["--rows", "decode:2:9:6", "ttft:20", "mixed:3:4:9", "poisson:200:16:8:2"]
    options = ["--rounds", "1", "--threads", "1", "--poisson-requests", "10", "--poisson-s", "0.01"]
    done = subprocess.run(
        [*command, *rows, *options, "--json", str(report)],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    written = json.loads(report.read_text())
    assert [row["row"].split()[0] for row in written["rows"]] == ["decode", "ttft", "mixed", "poisson"]
    figures = {name: value for row in written["rows"] for name, value in row["figures"].items()}
    assert all(value is not None and value > 0 for value in figures.values())
    assert {"tokens_per_s", "step_ms", "share_of_copy", "share_of_gemm", "ttft_p99_ms"} <= figures.keys()
    assert written["startup"]["first_token_s"] > written["startup"]["engine_s"] > 0
    assert written["ceilings"]["gemm"] == "float32"
    assert len(done.stdout.splitlines()) == 2 + 4


def test_what_stops_the_start_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", str(tmp_path), "--rows", "decode:1"]) == 2
    assert main(["--model", str(tmp_path), "--rows", "dance:1"]) == 2
    assert main(["--model", str(tmp_path), "--clock", "cpu", "--rows", "poisson:1"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and "config.json" in lines[0] and "dance" in lines[1] and "clock" in lines[2]
