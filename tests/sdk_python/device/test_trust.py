"""What a student refuses before its model runs: a bundle nobody trusted signed, operators nobody has."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from longshore.bundle import SigningKey, TrustStore, read_manifest, save_trust, sign_bundle, write_manifest
from longshore.device import DeviceSettings, Student
from longshore.errors import BundleDamagedError, BundleError, BundleIncompatibleError
from longshore.signing import PrivateKey

KEY = SigningKey("ops", PrivateKey.generate())


def settings(folder: Path, trust: TrustStore) -> DeviceSettings:
    save_trust(folder / "trust.json", trust)
    return DeviceSettings(calibration_s=0.0, trust=folder / "trust.json")


def test_only_a_trusted_bundle_starts(bundle_dir: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bundle_dir, tmp_path / "bundle"))
    trust = TrustStore().with_key(KEY.public)
    with pytest.raises(BundleError, match="not signed"):
        Student(folder, settings=settings(tmp_path, trust)).start()
    sign_bundle(folder, KEY)
    with pytest.raises(BundleError, match="revoked"):
        Student(folder, settings=settings(tmp_path, trust.without_key("ops"))).start()
    with Student(folder, settings=settings(tmp_path, trust)) as student:
        assert student.calibration is not None


def test_a_bundle_that_was_exchanged_after_it_was_opened(bundle_dir: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bundle_dir, tmp_path / "bundle"))
    student = Student(folder)
    sign_bundle(folder, KEY)
    assert read_manifest(folder) != student.manifest
    with pytest.raises(BundleDamagedError, match="changed after"):
        student.start()


def test_a_graph_with_operators_that_the_runtime_does_not_have(bundle_dir: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bundle_dir, tmp_path / "bundle"))
    manifest = read_manifest(folder)
    variant = replace(manifest.variants[0], required_operators=("Add", "com.example:Magic"))
    write_manifest(folder, replace(manifest, variants=(variant,)), None)
    student = Student(folder)
    with pytest.raises(BundleIncompatibleError, match=r"does not know com\.example:Magic") as caught:
        student.start()
    assert caught.value.message.startswith("this onnxruntime")
    student.close()
