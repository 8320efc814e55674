"""The core's Prometheus metrics: vLLM's names where vLLM has one, `longshore:` ones beside them.

Every label value comes from a closed set. With several HTTP workers each writes its own file in the folder
PROMETHEUS_MULTIPROC_DIR names, and any of them exports the sum.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector

from longshore.errors import LongshoreError
from longshore_server.engines.base import EngineStats
from longshore_server.telemetry import shared
from longshore_server.telemetry.probes import GpuProbe, HostProbe

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FINISH_REASONS = ("stop", "length")

_TTFT_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_TOKEN_S = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1,
    2.5,
    5,
    10,
)
_REQUEST_S = (
    0.01,
    0.05,
    0.1,
    0.3,
    0.5,
    0.8,
    1,
    1.5,
    2,
    2.5,
    5,
    10,
    15,
    20,
    30,
    40,
    50,
    60,
    120,
    240,
    480,
    960,
)
_ADMISSION_WAITING = "longshore:admission_waiting"


class Metrics:
    """One HTTP worker's metrics; `export` gives the text of all workers together."""

    def __init__(
        self, model_name: str, *, gpus: GpuProbe | None = None, host: HostProbe | None = None
    ) -> None:
        self._model_name = model_name
        self._gpus = gpus
        self._host = host
        folder = shared.folder_of_workers()
        self._is_shared = folder is not None
        if folder is not None:
            shared.forget_dead_workers(folder)
        self._registry = CollectorRegistry()
        self.ttft_s = self._histogram("vllm:time_to_first_token_seconds", "Arrival to first token.", _TTFT_S)
        self.inter_token_s = self._histogram(
            "vllm:inter_token_latency_seconds", "Between two tokens of one choice.", _TOKEN_S
        )
        self.time_per_token_s = self._histogram(
            "vllm:request_time_per_output_token_seconds", "Mean time per token after the first.", _TOKEN_S
        )
        self.e2e_s = self._histogram(
            "vllm:e2e_request_latency_seconds", "Arrival to the end of the answer.", _REQUEST_S
        )
        self.queue_s = self._histogram("vllm:request_queue_time_seconds", "Waiting for a turn.", _REQUEST_S)
        self.prompt_tokens = self._counter("vllm:prompt_tokens", "Prompt tokens of answered requests.")
        self.generation_tokens = self._counter("vllm:generation_tokens", "Tokens generated.")
        self._success = self._counter("vllm:request_success", "Choices that ended.", "finished_reason")
        self._errors = self._counter("longshore:errors", "Errors told to clients, by code.", "code")
        self.cancelled = self._counter("longshore:requests_cancelled", "Requests whose client left.")
        self._admission_waiting = Gauge(
            _ADMISSION_WAITING,
            "Requests that wait for a turn in front of the engine.",
            ["model_name"],
            registry=None if self._is_shared else self._registry,
            multiprocess_mode="livesum",
        ).labels(model_name)
        if self._is_shared:
            MultiProcessCollector(self._registry)

    def success(self, finish_reason: str) -> None:
        """Count the end of a choice."""
        self._success.labels(self._model_name, finish_reason).inc()

    def error(self, error: LongshoreError) -> None:
        """Count an error that a client was told; codes belong to the classes of the error tree."""
        self._errors.labels(self._model_name, error.code).inc()

    def admission_waiting(self, num_waiting: int) -> None:
        """Tell how many requests of this worker wait for a turn."""
        self._admission_waiting.set(num_waiting)

    def export(self, stats: EngineStats | None) -> bytes:
        """The exposition text; without `stats` the engine did not answer, and its figures are left out."""
        families = list(self._registry.collect())
        num_held = sum(
            sample.value
            for family in families
            if family.name == _ADMISSION_WAITING
            for sample in family.samples
        )
        families += self._engine_families(stats, int(num_held))
        families += self._machine_families()
        return generate_latest(_Fixed(families))

    # -- making metrics ------------------------------------------------------------------------

    def _histogram(self, name: str, words: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(
            name,
            words,
            ["model_name"],
            buckets=buckets,
            registry=None if self._is_shared else self._registry,
        ).labels(self._model_name)

    def _counter(self, name: str, words: str, *labels: str) -> Counter:
        counter = Counter(
            name, words, ["model_name", *labels], registry=None if self._is_shared else self._registry
        )
        return counter if labels else counter.labels(self._model_name)

    # -- what is read at the time of a scrape --------------------------------------------------

    def _engine_families(self, stats: EngineStats | None, num_held: int) -> Iterator[Metric]:
        yield self._gauge("longshore:engine_up", "1 while the engine answers.", float(stats is not None))
        if stats is None:
            return
        yield self._gauge("vllm:num_requests_running", "Sequences in the batch.", stats.num_running)
        waiting = stats.num_waiting + num_held
        yield self._gauge("vllm:num_requests_waiting", "Requests that wait, here or in the engine.", waiting)
        for name in ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"):
            yield self._gauge(name, "Share of the KV cache in use, 0 to 1.", stats.kv_usage)
        for name, words, value in (
            (
                "vllm:prefix_cache_queries",
                "Prompt tokens looked up in the cache.",
                "prefix_cache_queries",
            ),
            ("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache.", "prefix_cache_hits"),
            ("vllm:num_preemptions", "Sequences put back into the queue.", "preemptions"),
            ("longshore:kv_swaps", "Preemptions whose KV was kept elsewhere.", "num_swaps_chosen"),
            ("longshore:kv_recomputes", "Preemptions whose KV was given up.", "num_recomputes_chosen"),
            ("longshore:kv_blocks_out", "KV blocks copied off the device.", "num_blocks_swapped_out"),
            ("longshore:kv_blocks_in", "KV blocks copied back.", "num_blocks_swapped_in"),
            ("longshore:kv_swap_faults", "Copies, reads and writes that failed.", "num_swap_faults"),
            ("longshore:engine_steps", "Steps of the engine.", "num_steps"),
            (
                "longshore:engine_steps_over_target",
                "Steps with decodes that took longer than itl_target_ms.",
                "num_steps_over_target",
            ),
            ("longshore:engine_restarts", "Times that the engine process was started anew.", "num_restarts"),
            ("longshore:engine_replays", "Requests that a new engine took over.", "num_replays"),
            ("longshore:engine_failed_requests", "Requests that failed in the engine.", "num_failed"),
        ):
            yield self._total(name, words, getattr(stats, value))

    def _machine_families(self) -> Iterator[Metric]:
        if self._host is not None:
            host = self._host.read()
            yield self._gauge("longshore:host_cpu_usage_ratio", "0 to 1, over all CPUs.", host.cpu_usage)
            yield self._gauge("longshore:host_memory_used_bytes", "In use.", host.memory_used_bytes)
            yield self._gauge("longshore:host_memory_total_bytes", "Installed.", host.memory_total_bytes)
            yield self._total("longshore:host_network_sent_bytes", "All interfaces.", host.network_sent_bytes)
            yield self._total(
                "longshore:host_network_received_bytes", "All interfaces.", host.network_received_bytes
            )
        gpus = self._gpus.read() if self._gpus is not None else ()
        for name, words, field in (
            ("longshore:gpu_utilization_ratio", "0 to 1.", "utilization"),
            ("longshore:gpu_memory_used_bytes", "In use.", "memory_used_bytes"),
            ("longshore:gpu_memory_total_bytes", "Installed.", "memory_total_bytes"),
            ("longshore:gpu_temperature_celsius", "Of the die.", "temperature_celsius"),
            ("longshore:gpu_power_watts", "Drawn now.", "power_watts"),
        ):
            family = GaugeMetricFamily(name, words, labels=["gpu"])
            for gpu in gpus:
                if (value := getattr(gpu, field)) is not None:
                    family.add_metric([str(gpu.index)], float(value))
            yield family

    def _gauge(self, name: str, words: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, words, labels=["model_name"])
        family.add_metric([self._model_name], float(value))
        return family

    def _total(self, name: str, words: str, value: float) -> Metric:
        family = CounterMetricFamily(name, words, labels=["model_name"])
        family.add_metric([self._model_name], float(value))
        return family


class _Fixed:
    """A registry, as far as `generate_latest` needs one, of families that were collected already."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> Any:
        return self._families
