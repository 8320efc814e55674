"""Prometheus metrics of one worker: names, closed labels, GPU figures and the sum over processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from longshore.errors import LongshoreError, QueueFullError
from longshore_server.engines.base import EngineStats
from longshore_server.telemetry import shared
from longshore_server.telemetry.metrics import Metrics
from longshore_server.telemetry.probes import GpuSample


class _TwoGpus:
    """Stands for NVML, which a machine without a GPU does not have."""

    def read(self) -> tuple[GpuSample, ...]:
        return (
            GpuSample(0, "H", 10, 100, 0.5, 60.0, 300.0),
            GpuSample(1, "H", 20, 100, None, None, None),
        )


class _OddError(LongshoreError):
    """An error of no code of its own."""


def _values(text: bytes) -> dict[tuple[str, str], float]:
    return {
        (sample.name, ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items()) if k != "model_name")): (
            sample.value
        )
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def test_engine_and_gpu_figures() -> None:
    metrics = Metrics("m", gpus=_TwoGpus())  # type: ignore[arg-type]
    metrics.admission_waiting(2)
    stats = EngineStats(
        num_running=3, num_waiting=4, kv_usage=0.25, prefix_cache_queries=9, prefix_cache_hits=5
    )
    values = _values(metrics.export(stats))
    assert values["vllm:num_requests_running", ""] == 3
    assert values["vllm:num_requests_waiting", ""] == 6, "those in front of the engine wait too"
    assert values["vllm:kv_cache_usage_perc", ""] == values["vllm:gpu_cache_usage_perc", ""] == 0.25
    assert values["vllm:prefix_cache_hits_total", ""] == 5
    assert values["longshore:gpu_memory_used_bytes", "gpu=1"] == 20
    assert values["longshore:gpu_temperature_celsius", "gpu=0"] == 60
    assert ("longshore:gpu_temperature_celsius", "gpu=1") not in values
    assert values["longshore:engine_up", ""] == 1
    silent = _values(metrics.export(None))
    assert silent["longshore:engine_up", ""] == 0
    assert ("vllm:num_requests_running", "") not in silent


def test_errors_are_counted_by_code() -> None:
    metrics = Metrics("m")
    for error in (QueueFullError("x"), QueueFullError("y"), _OddError("z")):
        metrics.error(error)
    values = _values(metrics.export(None))
    assert values["longshore:errors_total", "code=queue_full"] == 2
    codes = {labels for name, labels in values if name == "longshore:errors_total"}
    assert codes == {"code=queue_full", "code=longshore_error"}


_WORKER = """
from longshore_server.telemetry.metrics import Metrics
metrics = Metrics("m")
metrics.generation_tokens.inc(5)
metrics.ttft_s.observe(0.02)
metrics.success("stop")
metrics.admission_waiting(7)
print(metrics.export(None).decode())
"""


def test_workers_add_up_and_a_dead_ones_present_is_forgotten(tmp_path: Path) -> None:
    environment = os.environ | shared.prepare(tmp_path)
    command = [sys.executable, "-c", _WORKER]
    for number in (1, 2, 3):
        out = subprocess.run(command, env=environment, capture_output=True, check=True, timeout=60).stdout
        values = _values(out)
        assert values["vllm:generation_tokens_total", ""] == 5 * number
        assert values["vllm:time_to_first_token_seconds_count", ""] == number
        assert values["vllm:time_to_first_token_seconds_bucket", "le=0.02"] == number
        assert values["vllm:request_success_total", "finished_reason=stop"] == number
        assert values["longshore:admission_waiting", ""] == 7, "the worker before it is gone"
