"""Reads the state of the host and its GPUs, one sample per call; keeps no history and exports nothing."""

from __future__ import annotations

import time
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import psutil

from longshore.errors import ConfigError


@dataclass(frozen=True, slots=True)
class HostSample:
    """The host now. `cpu_usage` is 0..1 over the time since the sample before."""

    cpu_usage: float
    load_1min: float
    memory_used_bytes: int
    memory_total_bytes: int
    process_rss_bytes: int
    network_sent_bytes: int
    network_received_bytes: int


@dataclass(frozen=True, slots=True)
class GpuSample:
    """One GPU now; a figure that the driver does not give is None."""

    index: int
    name: str
    memory_used_bytes: int
    memory_total_bytes: int
    utilization: float | None
    temperature_celsius: float | None
    power_watts: float | None


class HostProbe:
    """Samples the host through psutil."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        psutil.cpu_percent(interval=None)  # the first call only sets the start of the interval

    def read(self) -> HostSample:
        """A sample; takes well under a millisecond and never waits."""
        memory = psutil.virtual_memory()
        network = psutil.net_io_counters()
        return HostSample(
            cpu_usage=psutil.cpu_percent(interval=None) / 100.0,
            load_1min=psutil.getloadavg()[0],
            memory_used_bytes=memory.total - memory.available,
            memory_total_bytes=memory.total,
            process_rss_bytes=self._process.memory_info().rss,
            network_sent_bytes=network.bytes_sent if network else 0,
            network_received_bytes=network.bytes_recv if network else 0,
        )


class GpuProbe:
    """Samples the GPUs through NVML. On a machine without one it reads as no GPUs, without an error.

    Driver calls are cached for `min_interval_s`, so that scrapes can't load the driver.
    """

    def __init__(self, *, min_interval_s: float = 0.5) -> None:
        self._min_interval_s = min_interval_s
        self._nvml = _load_nvml()
        self._samples: tuple[GpuSample, ...] = ()
        self._sampled_s = float("-inf")

    @property
    def is_available(self) -> bool:
        """True where NVML was found and answers."""
        return self._nvml is not None

    def read(self) -> tuple[GpuSample, ...]:
        """One sample per GPU; a GPU that does not answer is left out."""
        if self._nvml is None:
            return ()
        now_s = time.monotonic()
        if now_s - self._sampled_s >= self._min_interval_s:
            self._samples = _read_gpus(self._nvml)
            self._sampled_s = now_s
        return self._samples

    def close(self) -> None:
        """Lets go of the driver; the probe reads as no GPUs from then on."""
        if self._nvml is not None:
            nvml, self._nvml = self._nvml, None
            _or_none(nvml, nvml.nvmlShutdown)


def _load_nvml() -> ModuleType | None:
    try:
        import pynvml
    except ImportError:
        raise ConfigError("GPU figures need the package nvidia-ml-py: install longshore[server]") from None
    return pynvml if _starts(pynvml) else None


def _starts(nvml: Any) -> bool:
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:  # no driver, or no GPU that this user may see
        return False
    return True


def _read_gpus(nvml: Any) -> tuple[GpuSample, ...]:
    count = _or_none(nvml, nvml.nvmlDeviceGetCount) or 0
    samples = (_or_none(nvml, _read_gpu, nvml, index) for index in range(count))
    return tuple(sample for sample in samples if sample is not None)


def _read_gpu(nvml: Any, index: int) -> GpuSample:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    rates = _or_none(nvml, nvml.nvmlDeviceGetUtilizationRates, handle)
    temperature = _or_none(nvml, nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU)
    power_mw = _or_none(nvml, nvml.nvmlDeviceGetPowerUsage, handle)
    return GpuSample(
        index=index,
        name=_text(nvml.nvmlDeviceGetName(handle)),
        memory_used_bytes=int(memory.used),
        memory_total_bytes=int(memory.total),
        utilization=None if rates is None else rates.gpu / 100.0,
        temperature_celsius=None if temperature is None else float(temperature),
        power_watts=None if power_mw is None else power_mw / 1000.0,
    )


def _or_none(nvml: Any, call: Any, *args: Any) -> Any:
    """The call's result, or None where the driver refuses it."""
    try:
        return call(*args)
    except nvml.NVMLError:
        return None


def _text(value: str | bytes) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
