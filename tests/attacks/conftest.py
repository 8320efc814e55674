"""The device that each attack is tried on."""

from __future__ import annotations

from pathlib import Path

import pytest

from attacks.victim import Device
from longshore.bundle import install


@pytest.fixture
def device(tmp_path: Path) -> Device:
    device = Device(tmp_path)
    install(device.write(tmp_path / "five", version=5), device.store, trusted_keys=device.trust)
    device.write(device.offer, version=6)
    return device
