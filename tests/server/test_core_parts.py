"""Small parts of the process model: restart budget, trial note, listener, handoff, model folder, probes."""

from __future__ import annotations

import json
import os
import socket
import stat
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core_processes import engine_config, tiny_model_folder
from longshore.errors import ConfigError
from longshore_server.child import ending_words
from longshore_server.config import CoreConfig
from longshore_server.handoff import HANDOFF_VARIABLE, Handoff, read_handoff, write_handoff
from longshore_server.listener import bind_listener, listener_url, local_address
from longshore_server.model_folder import check_model_folder, model_digest
from longshore_server.restarts import RestartBudget
from longshore_server.telemetry.probes import GpuProbe, GpuSample, HostProbe
from longshore_server.trial import TrialNote

# -- restarts ----------------------------------------------------------------------------------


def test_the_first_restart_is_at_once_and_later_ones_wait_longer() -> None:
    budget = RestartBudget(5, 60.0)
    delays = [budget.next_delay_s(float(now_s)) for now_s in range(6)]
    assert delays == [0.0, 0.1, 0.4, 1.6, 5.0, None]


def test_the_budget_comes_back_with_time() -> None:
    budget = RestartBudget(1, 60.0)
    assert budget.next_delay_s(0.0) == 0.0
    assert budget.next_delay_s(30.0) is None
    assert budget.next_delay_s(61.0) == 0.0


@given(st.integers(0, 8), st.lists(st.floats(0, 30), max_size=60))
def test_no_window_ever_holds_more_restarts_than_allowed(max_restarts: int, gaps_s: list[float]) -> None:
    budget, now_s, granted = RestartBudget(max_restarts, 60.0), 0.0, []
    for gap_s in gaps_s:
        now_s += gap_s
        if budget.next_delay_s(now_s) is not None:
            granted.append(now_s)
        assert sum(now_s - time_s <= 60.0 for time_s in granted) <= max_restarts


def test_an_ending_is_told_in_words() -> None:
    assert ending_words(3) == "ended with code 3"
    assert ending_words(-9) == "was ended by SIGKILL"
    assert ending_words(-250) == "was ended by signal 250"


# -- trial note --------------------------------------------------------------------------------


def test_a_note_is_found_by_the_next_engine_and_only_by_it(tmp_path: Path) -> None:
    first = TrialNote(tmp_path / "trial")
    assert first.blamed == ""
    first.write("a" * 32)
    first.write("b" * 8)
    second = TrialNote(tmp_path / "trial")
    assert second.blamed == "b" * 8
    assert TrialNote(tmp_path / "trial").blamed == ""


def test_a_cleared_note_blames_nobody(tmp_path: Path) -> None:
    note = TrialNote(tmp_path / "trial")
    note.write("a" * 5000)
    note.clear()
    assert TrialNote(tmp_path / "trial").blamed == ""
    assert stat.S_IMODE(os.stat(tmp_path / "trial").st_mode) == 0o600


# -- listener ----------------------------------------------------------------------------------


def test_a_free_port_is_taken_and_told() -> None:
    with bind_listener("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        assert listener_url(listener, "127.0.0.1") == f"http://127.0.0.1:{port}"
        assert local_address(listener) == ("127.0.0.1", port)
        with pytest.raises(ConfigError, match=f"{port} on 127.0.0.1 is taken"):
            bind_listener("127.0.0.1", port)


def test_a_socket_on_all_addresses_is_reached_on_the_loopback() -> None:
    with bind_listener("0.0.0.0", 0) as listener:
        host, port = local_address(listener)
        with socket.create_connection((host, port), timeout=5):
            assert host == "127.0.0.1"
        assert listener_url(listener, "::") == f"http://[::]:{port}"


@pytest.mark.parametrize("host", ["203.0.113.9", "no.such.host.invalid", "a" * 300])
def test_an_address_that_is_not_ours_is_one_line(host: str) -> None:
    with pytest.raises(ConfigError, match="is no address of this machine"):
        bind_listener(host, 0)


# -- handoff -----------------------------------------------------------------------------------


def test_a_handoff_is_private_and_arrives_whole(tmp_path: Path) -> None:
    handoff = Handoff(engine_config(tmp_path / "m"), "/run/engine")
    write_handoff(handoff, tmp_path / "handoff")
    assert stat.S_IMODE(os.stat(tmp_path / "handoff").st_mode) == 0o600
    assert read_handoff({HANDOFF_VARIABLE: str(tmp_path / "handoff")}) == handoff


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"config": {"port": -1}, "socket_path": "x"}'])
def test_a_damaged_handoff_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "handoff").write_text(text)
    with pytest.raises(ConfigError):
        read_handoff({HANDOFF_VARIABLE: str(tmp_path / "handoff")})


def test_a_worker_without_supervisor_says_so() -> None:
    with pytest.raises(ConfigError, match="longshore serve"):
        read_handoff({})


# -- model folder ------------------------------------------------------------------------------


def test_a_whole_folder_passes(tmp_path: Path) -> None:
    check_model_folder(engine_config(tiny_model_folder(tmp_path / "m")))


def test_each_missing_or_damaged_part_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no model is given"):
        check_model_folder(CoreConfig())
    with pytest.raises(ConfigError, match="does not exist"):
        check_model_folder(engine_config(tmp_path / "none"))
    folder = tiny_model_folder(tmp_path / "m")
    with pytest.raises(ConfigError, match="is not a folder"):
        check_model_folder(engine_config(folder / "config.json"))
    with pytest.raises(ConfigError, match=r"no \.safetensors weights"):
        check_model_folder(engine_config(folder, load_format="auto"))
    (folder / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="can't read"):
        check_model_folder(engine_config(folder))
    (folder / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="is not a JSON object"):
        check_model_folder(engine_config(folder))
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        check_model_folder(engine_config(folder))


def test_a_missing_tokenizer_is_named_and_may_lie_elsewhere(tmp_path: Path) -> None:
    folder, other = tiny_model_folder(tmp_path / "m"), tiny_model_folder(tmp_path / "t")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"has no tokenizer\.json"):
        check_model_folder(engine_config(folder))
    check_model_folder(engine_config(folder, tokenizer=str(other)))


def test_the_digest_follows_what_answers_depend_on(tmp_path: Path) -> None:
    one, same = tiny_model_folder(tmp_path / "a"), tiny_model_folder(tmp_path / "b")
    digest = model_digest(engine_config(one))
    assert model_digest(engine_config(same)) == digest
    assert len(digest) == 64
    assert model_digest(engine_config(one, seed=1)) != digest
    assert model_digest(engine_config(one, quantization="fp8")) != digest
    (same / "model.safetensors").write_bytes(b"weights")
    weights = model_digest(engine_config(same, load_format="auto"))
    (same / "model.safetensors").write_bytes(b"weightz")
    assert model_digest(engine_config(same, load_format="auto")) != weights
    config = json.loads((one / "config.json").read_text())
    (one / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    assert model_digest(engine_config(one)) != digest


def test_a_large_file_is_sampled_header_and_end_included(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("longshore.bundle.digest._WHOLE_FILE_BYTES", 1024)
    monkeypatch.setattr("longshore.bundle.digest._SAMPLE_BYTES", 64)
    folder = tiny_model_folder(tmp_path / "m")
    config, weights = engine_config(folder, load_format="auto"), folder / "model.safetensors"
    data = bytearray((100).to_bytes(8, "little") + bytes(100_000))
    digests = set()
    for place in (None, 20, len(data) - 1):
        changed = bytearray(data)
        if place is not None:
            changed[place] = 1
        weights.write_bytes(changed)
        digests.add(model_digest(config))
    assert len(digests) == 3


# -- probes ------------------------------------------------------------------------------------


def test_the_host_is_read() -> None:
    sample = HostProbe().read()
    assert 0 <= sample.cpu_usage <= 1
    assert 0 < sample.memory_used_bytes < sample.memory_total_bytes
    assert 0 < sample.process_rss_bytes < sample.memory_total_bytes
    assert min(sample.network_sent_bytes, sample.network_received_bytes) >= 0


class _Nvml(ModuleType):
    """A driver with two GPUs: one tells all but its power, the other has fallen off the bus."""

    NVML_TEMPERATURE_GPU = 0

    class NVMLError(Exception):
        pass

    def nvmlInit(self) -> None: ...

    def nvmlShutdown(self) -> None: ...

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        if index == 1:
            raise self.NVMLError("GPU is lost")
        return index

    def nvmlDeviceGetMemoryInfo(self, _: int) -> SimpleNamespace:
        return SimpleNamespace(used=3, total=4)

    def nvmlDeviceGetUtilizationRates(self, _: int) -> SimpleNamespace:
        return SimpleNamespace(gpu=50)

    def nvmlDeviceGetTemperature(self, _: int, __: int) -> int:
        return 61

    def nvmlDeviceGetPowerUsage(self, _: int) -> int:
        raise self.NVMLError("not supported")

    def nvmlDeviceGetName(self, _: int) -> bytes:
        return b"A GPU"


def test_a_gpu_that_is_lost_and_a_figure_that_is_not_told_are_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", _Nvml("pynvml"))
    assert GpuProbe().read() == (GpuSample(0, "A GPU", 3, 4, 0.5, 61.0, None),)


def test_gpus_are_read_where_there_are_any() -> None:
    probe = GpuProbe()
    samples = probe.read()
    assert probe.is_available or samples == ()
    for sample in samples:
        assert 0 < sample.memory_used_bytes <= sample.memory_total_bytes
        assert sample.temperature_celsius is None or 0 < sample.temperature_celsius < 150
    probe.close()
    assert probe.read() == ()
