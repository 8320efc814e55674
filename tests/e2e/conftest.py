"""Whole tiers as real processes, started once for all end-to-end tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from demo import tiers
from longshore.tier_process import TierProcess


@pytest.fixture(scope="session")
def keys() -> tiers.Keys:
    return tiers.Keys.generate()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiers")


@pytest.fixture(scope="session")
def bundle(folder: Path) -> Path:
    """The trained student, exported as a user would."""
    return tiers.export_bundles(folder, (tiers.STUDENT,))[tiers.STUDENT]


@pytest.fixture(scope="session")
def core(folder: Path, keys: tiers.Keys) -> Iterator[TierProcess]:
    with tiers.core(folder, keys) as process:
        yield process


@pytest.fixture(scope="session")
def edge(folder: Path, keys: tiers.Keys, core: TierProcess, bundle: Path) -> Iterator[TierProcess]:
    with tiers.edge(folder, keys, core.url, bundle) as process:
        yield process
