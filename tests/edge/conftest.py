"""Two fixture cores and an edge before them, shared by the tests that leave them well."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import pytest

from edge.harness import CoreProcess, edge_toml, session_to, start_core, start_edge
from longshore.tier_process import TierProcess


@pytest.fixture(scope="session")
def core() -> Iterator[CoreProcess]:
    with start_core("core-a") as process:
        yield process


@pytest.fixture(scope="session")
def edge(core: CoreProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TierProcess]:
    folder: Path = tmp_path_factory.mktemp("edge")
    with start_edge(folder, edge_toml([core], "failure_threshold = 100")) as process:
        yield process


@pytest.fixture
async def session(edge: TierProcess, core: CoreProcess) -> AsyncIterator[aiohttp.ClientSession]:
    await core.set()
    async with session_to(edge) as session:
        yield session
