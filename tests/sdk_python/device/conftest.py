"""A real bundle of a random model, and a student that runs it, for all tests of the device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from longshore.device import DeviceSettings, Student
from longshore_export.bundle import export_student
from tiny_models import config_of, write_model
from vision_bundle import make_vision_bundle


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), config_of("llama-tied"), seed=1)


@pytest.fixture(scope="session")
def bundle_dir(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundle") / "student"
    return export_student(model_dir, out).path


@pytest.fixture(scope="session")
def vision_dir(bundle_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model, with eyes."""
    out = tmp_path_factory.mktemp("seeing") / "student"
    make_vision_bundle(bundle_dir, out)
    return out


@pytest.fixture(scope="session")
def student(bundle_dir: Path) -> Iterator[Student]:
    """Shared by tests that leave it as they found it."""
    with Student(bundle_dir, settings=DeviceSettings(calibration_s=0.01)) as running:
        yield running


@pytest.fixture
def own_student(bundle_dir: Path) -> Iterator[Student]:
    """For tests that break it."""
    settings = DeviceSettings(calibration_s=0.0, max_waiting=2, prefill_chunk_tokens=16)
    with Student(bundle_dir, settings=settings) as running:
        yield running
