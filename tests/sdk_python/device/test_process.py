"""The model process: its death, its limits, its parent's death; it takes no app with it and outlives none."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longshore.bundle import load_bundle
from longshore.device import DeviceSettings, Student
from longshore.device.frames import MAX_FRAME_BYTES, read_frame, write_frame
from longshore.errors import (
    BundleDamagedError,
    BundleIncompatibleError,
    ConfigError,
    DeviceError,
    LongshoreError,
    MalformedBodyError,
)
from longshore.wire import BundleFile, decode_completion_request, dump_json, encode
from longshore_export.bundle import export_student
from tiny_models import config_of, write_model

WAIT_S = 20.0
MIB = 1024 * 1024
REQUEST = decode_completion_request({"model": "s", "prompt": [5, 6], "max_tokens": 200, "ignore_eos": True})
SHORT = decode_completion_request({"model": "s", "prompt": [5, 6], "max_tokens": 3, "ignore_eos": True})
MANY = decode_completion_request(
    {"model": "s", "prompt": [5, 6], "max_tokens": 200, "ignore_eos": True, "n": 16}
)


def until(condition: Callable[[], object]) -> None:
    end_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.005)


def is_running(pid: int) -> bool:
    """False too for a process that has ended and was not waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def kill(student: Student) -> None:
    assert student.process_id is not None
    os.kill(student.process_id, signal.SIGKILL)


# -- death -------------------------------------------------------------------------------------


def test_a_death_midway_is_a_typed_error_and_the_next_call_works(own_student: Student) -> None:
    events = own_student.stream(MANY)
    next(events)
    kill(own_student)
    with pytest.raises(DeviceError, match="signal 9") as caught:
        list(events)
    assert caught.value.tokens_delivered and caught.value.request_id
    assert not own_student.is_busy
    assert len(list(own_student.stream(SHORT))) == 4


def test_a_death_between_calls_is_not_noticed(own_student: Student) -> None:
    kill(own_student)
    until(lambda: own_student.process_id is None)
    assert len(list(own_student.stream(SHORT))) == 4


def test_a_process_that_stalls_is_ended_after_its_grace(bundle_dir: Path) -> None:
    with Student(bundle_dir, settings=DeviceSettings(calibration_s=0, cancel_grace_s=0.3)) as student:
        events = student.stream(MANY)
        next(events)
        pid = student.process_id
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        begin_s = time.monotonic()
        events.close()
        assert 0.2 < time.monotonic() - begin_s < 5
        until(lambda: not is_running(pid))
        assert len(list(student.stream(SHORT))) == 4


def test_a_model_that_fails_is_a_typed_error_each_time(bundle_dir: Path, tmp_path: Path) -> None:
    """A weight that is not a number: found at the first token, told, and the process started anew."""
    folder = Path(shutil.copytree(bundle_dir, tmp_path / "bundle"))
    model = onnx.load(folder / "model.onnx")
    norm = next(item for item in model.graph.initializer if item.name == "model.norm.weight")
    norm.raw_data = np.full(norm.dims[0], np.nan, np.float32).tobytes()
    data = model.SerializeToString()
    manifest = load_bundle(folder)
    (folder / "model.onnx").write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    files = [BundleFile("model.onnx", len(data), digest), *manifest.files[1:]]
    body = dump_json(encode(dataclasses.replace(manifest, files=tuple(files))))
    (folder / "manifest.json").write_bytes(body)
    with Student(folder, settings=DeviceSettings(calibration_s=0)) as student:
        for _ in range(3):
            with pytest.raises(DeviceError, match="not finite"):
                list(student.stream(SHORT))


def test_a_closed_student_answers_with_a_typed_error(own_student: Student) -> None:
    pid = own_student.process_id
    own_student.close()
    own_student.close()
    assert pid is not None and not is_running(pid)
    with pytest.raises(DeviceError, match="closed"):
        list(own_student.stream(SHORT))


def test_a_forgotten_student_leaves_no_process(bundle_dir: Path) -> None:
    student = Student(bundle_dir, settings=DeviceSettings(calibration_s=0))
    student.start()
    pid = student.process_id
    del student
    assert pid is not None
    until(lambda: not is_running(pid))


@pytest.mark.parametrize("how", ["exits", "is killed", "is killed, its pipe kept open by another"])
def test_the_process_never_outlives_its_parent(bundle_dir: Path, how: str) -> None:
    code = (
        "import os, subprocess, sys, time\n"
        "from longshore.device import Student\n"
        "student = Student(sys.argv[1]); student.start()\n"
        "sink = student._process._sink.fileno()\n"
        "heir = subprocess.Popen(['sleep', '30'], pass_fds=[sink]) if 'another' in sys.argv[2] else None\n"
        "print(student.process_id, heir.pid if heir else 0, flush=True)\n"
        "time.sleep(0 if sys.argv[2] == 'exits' else 60)\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, str(bundle_dir), how]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid, heir = map(int, parent.stdout.readline().split())
        try:
            if how != "exits":
                parent.kill()
            parent.wait(WAIT_S)
            until(lambda: not is_running(pid))
        finally:
            if heir:
                os.kill(heir, signal.SIGKILL)


# -- limits ------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is the Linux kernel's")
def test_the_memory_limit_holds_and_ends_in_a_typed_error(tmp_path: Path) -> None:
    """A KV buffer of 256 MiB, beside some 100 MiB of the rest."""
    config = config_of("llama")
    config.max_position_embeddings = 2**19
    bundle = export_student(write_model(tmp_path / "long", config), tmp_path / "bundle").path
    with Student(bundle, settings=DeviceSettings(memory_limit_bytes=768 * MIB, calibration_s=0)) as enough:
        assert len(list(enough.stream(SHORT))) == 4
    little = Student(bundle, settings=DeviceSettings(memory_limit_bytes=256 * MIB, calibration_s=0))
    with pytest.raises(DeviceError, match="memory limit"):
        little.start()
    assert little.process_id is None
    little.close()


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is the Linux kernel's")
@pytest.mark.parametrize("limit_mib", [1, 40, 60, 80, 90, 95, 100])
def test_any_memory_limit_gives_an_answer_or_a_typed_error(bundle_dir: Path, limit_mib: int) -> None:
    settings = DeviceSettings(memory_limit_bytes=limit_mib * MIB, calibration_s=0, start_timeout_s=20)
    with_little = Student(bundle_dir, settings=settings)
    try:
        assert len(list(with_little.stream(SHORT))) == 4
    except DeviceError as error:
        assert error.message
    finally:
        with_little.close()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_limit_counts_what_the_process_uses(own_student: Student) -> None:
    limits = Path(f"/proc/{own_student.process_id}/limits").read_text()
    data = next(line for line in limits.splitlines() if line.startswith("Max data size"))
    assert data.split()[3] == str(DeviceSettings().memory_limit_bytes)
    core = next(line for line in limits.splitlines() if line.startswith("Max core file size"))
    assert core.split()[4] == "0"


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_threads", -1), ("max_waiting", -1), ("memory_limit_bytes", 5), ("cancel_grace_s", 0)],
)
def test_settings_are_bounded(name: str, value: int) -> None:
    with pytest.raises(ConfigError, match=name):
        DeviceSettings(**{name: value})  # type: ignore[arg-type]


# -- bundles -----------------------------------------------------------------------------------


def test_a_damaged_bundle_does_not_start(bundle_dir: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bundle_dir, tmp_path / "bundle"))
    data = bytearray((folder / "model.onnx").read_bytes())
    data[1000] ^= 1
    (folder / "model.onnx").write_bytes(bytes(data))
    student = Student(folder)
    with pytest.raises(BundleDamagedError):
        student.start()
    with pytest.raises(BundleDamagedError):
        list(student.stream(SHORT))
    student.close()


def test_a_variant_that_is_not_there_is_named(bundle_dir: Path) -> None:
    with pytest.raises(BundleIncompatibleError, match="int4"):
        Student(bundle_dir, settings=DeviceSettings(variant="int4"))
    with pytest.raises(BundleDamagedError, match="no bundle"):
        Student(bundle_dir / "nowhere")


def test_a_start_that_takes_too_long_is_a_typed_error(bundle_dir: Path) -> None:
    student = Student(bundle_dir, settings=DeviceSettings(calibration_s=5, start_timeout_s=0.2))
    with pytest.raises(DeviceError, match=r"within 0\.2 s"):
        student.start()
    assert student.process_id is None
    student.close()


def test_closing_ends_a_start_that_is_under_way(bundle_dir: Path) -> None:
    student = Student(bundle_dir, settings=DeviceSettings(calibration_s=10))
    errors: list[LongshoreError] = []

    def start() -> None:
        try:
            student.start()
        except DeviceError as error:
            errors.append(error)

    thread = threading.Thread(target=start)
    thread.start()
    until(lambda: student._starting is not None)
    student.close()
    thread.join(5)
    assert not thread.is_alive() and len(errors) == 1


def test_calibration_is_measured(own_student: Student) -> None:
    calibration = own_student.start()
    assert calibration is own_student.calibration
    assert calibration.load_s > 0
    assert calibration.prefill_tokens_per_s > calibration.decode_tokens_per_s > 0
    assert calibration.expected_total_s(100, 10) > calibration.expected_ttft_s(100) > 0


def test_importing_the_device_brings_in_no_runtime(bundle_dir: Path) -> None:
    code = (
        "import sys; from longshore.device import Student\n"
        "heavy = {'numpy', 'onnxruntime', 'tokenizers', 'httpx2'}\n"
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()\n"
        "student = Student(sys.argv[1]); assert not heavy & sys.modules.keys()\n"
        "student.start(); assert not {'numpy', 'onnxruntime'} & sys.modules.keys()\n"
        "student.close()\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code, str(bundle_dir)], check=True, timeout=WAIT_S)


# -- frames ------------------------------------------------------------------------------------


@given(st.binary(max_size=64))
def test_any_bytes_are_a_frame_or_an_end_or_a_typed_error(data: bytes) -> None:
    try:
        frame = read_frame(io.BytesIO(data))
    except LongshoreError as error:
        assert isinstance(error, DeviceError | MalformedBodyError)
    else:
        assert frame is None or isinstance(frame, dict)


def test_frames_come_back_as_they_went() -> None:
    stream = io.BytesIO()
    frames = [{"type": "token", "id": 1, "logprob": -1.5}, {"text": "茶\n"}, {}]
    for frame in frames:
        write_frame(stream, frame)
    stream.seek(0)
    assert [read_frame(stream) for _ in frames] == frames
    assert read_frame(stream) is None
    with pytest.raises(DeviceError, match="over the limit"):
        write_frame(stream, {"text": "x" * MAX_FRAME_BYTES})
