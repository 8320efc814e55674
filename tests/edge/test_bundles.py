"""Bundles over HTTP: Range, If-Range, ETag, HEAD; only what the manifest lists; damaged ones stop a start."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from yarl import URL

from bundles import FILES, write_plain
from edge.harness import CoreProcess, edge_toml, session_to, start_edge
from longshore.bundle import install
from longshore.errors import ConfigError
from longshore.tier_process import TierProcess
from longshore_edge.bundles import BundleShelf, byte_range
from longshore_edge.config import BundleSettings

MODEL = FILES["model.onnx"]
BIG = bytes(range(256)) * 4096


@pytest.fixture(scope="module")
def edge_with_bundles(core: CoreProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TierProcess]:
    folder = tmp_path_factory.mktemp("bundles")
    (folder / "plain").mkdir()
    write_plain(folder / "plain")
    (folder / "big").mkdir()
    write_plain(folder / "big", name="big", files=FILES | {"model.onnx": BIG})
    install(folder / "big", folder / "store")
    tables = f'[[bundles]]\npath = "{folder}/plain"\n[[bundles]]\npath = "{folder}/store/big"\n'
    with start_edge(folder / "edge", edge_toml([core], tables=tables)) as process:
        yield process


@pytest.fixture
async def http(edge_with_bundles: TierProcess) -> AsyncIterator[aiohttp.ClientSession]:
    async with session_to(edge_with_bundles) as session:
        yield session


async def get(http: aiohttp.ClientSession, path: str, method: str = "GET", **headers: str):
    async with http.request(
        method, path, headers={k.replace("_", "-"): v for k, v in headers.items()}
    ) as response:
        return response.status, await response.read(), response.headers


async def test_whole_files(http: aiohttp.ClientSession) -> None:
    status, body, headers = await get(http, "/bundles/plain/model.onnx")
    assert (status, body) == (200, MODEL)
    assert headers["accept-ranges"] == "bytes"
    assert (await get(http, "/bundles/plain/extra/words.txt"))[1] == FILES["extra/words.txt"]
    status, body, headers = await get(http, "/bundles/plain/manifest.json")
    assert status == 200 and b'"plain"' in body and headers["content-type"] == "application/json"
    assert (await get(http, "/bundles/big/model.onnx"))[1] == BIG  # from a store


async def test_ranges(http: aiohttp.ClientSession) -> None:
    for header, first, end in (
        ("bytes=5-9", 5, 10),
        ("bytes=470-", 470, 480),
        ("bytes=-3", 477, 480),
        ("bytes=0-9999", 0, 480),
    ):
        status, body, headers = await get(http, "/bundles/plain/model.onnx", Range=header)
        assert (status, body) == (206, MODEL[first:end])
        assert headers["content-range"] == f"bytes {first}-{end - 1}/480"
    status, _, headers = await get(http, "/bundles/plain/model.onnx", Range="bytes=480-")
    assert (status, headers["content-range"]) == (416, "bytes */480")
    assert (await get(http, "/bundles/plain/model.onnx", Range="bytes=0-1,4-5"))[0] == 200


async def test_a_broken_download_goes_on(http: aiohttp.ClientSession) -> None:
    _, part, headers = await get(http, "/bundles/big/model.onnx", Range="bytes=0-99999")
    tag = headers["etag"]
    status, rest, _ = await get(http, "/bundles/big/model.onnx", Range="bytes=100000-", If_Range=tag)
    assert (status, part + rest) == (206, BIG)
    status, body, _ = await get(http, "/bundles/big/model.onnx", Range="bytes=100000-", If_Range='"other"')
    assert (status, body) == (200, BIG)


async def test_not_modified_and_head(http: aiohttp.ClientSession) -> None:
    _, _, headers = await get(http, "/bundles/plain/model.onnx")
    assert (await get(http, "/bundles/plain/model.onnx", If_None_Match=headers["etag"]))[0] == 304
    status, body, head = await get(http, "/bundles/plain/model.onnx", "HEAD")
    assert (status, body, head["content-length"], head["etag"]) == (200, b"", "480", headers["etag"])


@pytest.mark.parametrize(
    "path",
    [
        "plain/none",
        "none/manifest.json",
        "plain",
        "",
        "plain/",
        "plain/..%2f..%2fedge.toml",
        "plain/%2e%2e/plain/model.onnx",
    ],
)
async def test_nothing_else_is_served(http: aiohttp.ClientSession, path: str) -> None:
    base = str(http._base_url).rstrip("/")
    async with http.get(URL(f"{base}/bundles/{path}", encoded=True)) as response:
        assert response.status == 404


async def test_a_key_is_needed(http: aiohttp.ClientSession) -> None:
    assert (await get(http, "/bundles/plain/manifest.json", Authorization="x"))[0] == 401
    assert (await get(http, "/bundles/plain/manifest.json", "POST"))[0] == 405


def test_a_damaged_bundle_stops_the_start(tmp_path: Path) -> None:
    write_plain(tmp_path)
    (tmp_path / "model.onnx").write_bytes(MODEL[:-1] + b"?")
    with pytest.raises(ConfigError, match=r"model\.onnx is damaged"):
        BundleShelf((BundleSettings(str(tmp_path)),))


@given(st.text() | st.from_regex(r"bytes=\d{0,4}-\d{0,4}", fullmatch=True), st.integers(0, 2000))
def test_ranges_lie_within_the_file(header: str, size_bytes: int) -> None:
    found = byte_range(header, size_bytes)
    if isinstance(found, tuple):
        assert 0 <= found[0] < found[1] <= size_bytes
