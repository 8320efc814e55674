"""Edges that lie, and networks that break: each download is refused in time, and the old version stays."""

from __future__ import annotations

import itertools
import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from attacks.lying_edge import Answer, Lie, LyingEdge
from attacks.victim import FILES, Device
from bundles import snapshot
from certificates import write_certificate
from longshore.bundle import Download, DownloadLimits, install_from_edge
from longshore.bundle import fetch as fetch_module
from longshore.errors import (
    BundleDamagedError,
    BundleError,
    BundleIncompatibleError,
    BundleRollbackError,
    ConfigError,
    ConnectionFailedError,
    DeadlineExceededError,
    LongshoreError,
    NotFoundError,
    ProtocolError,
    UpstreamError,
)

MODEL = "model.onnx"
LIMITS = DownloadLimits(time_limit_s=20, num_failures=3)
CHUNK = 4096
BAD_URLS = ["ftp://a/bundles/plain", "http://", "http://a/", "http://a/bundles/..", "http://a/b/pl%61in"]
BAD_URLS += ["http://a/b/plain?x", "http://a/b/plain#x", "http://u:p@a/b/plain", "http://a:x/b/plain"]
NEW_MODEL = bytes(reversed(range(256))) * 64


@pytest.fixture
def offer(device: Device) -> Path:
    """Version 6 with another model, of four chunks."""
    return device.write(device.offer, version=6, files=FILES | {MODEL: NEW_MODEL})


def download(device: Device, url: str, **options: Any) -> Download:
    options = {"limits": LIMITS, "sleep": lambda pause_s: None, "onnxruntime_version": "1.24"} | options
    return install_from_edge(url, device.store, trusted_keys=device.trust, **options)


def refused(device: Device, lie: Lie, error: type[LongshoreError], **options: Any) -> str:
    with LyingEdge(device.offer, "plain", lie) as edge:
        return device.refuses(lambda: download(device, edge.url, **options), error)


def on(path: str, lie: Lie) -> Lie:
    return lambda answer: lie(answer) if answer.path == path else None


def test_an_honest_edge_is_believed(device: Device, offer: Path) -> None:
    with LyingEdge(offer, "plain") as edge:
        done = download(device, edge.url)
        assert snapshot(done.path) == snapshot(offer)
        assert done.num_fetched_bytes == len(NEW_MODEL), "the other files were here already"
        assert edge.num_connections == 1
        assert download(device, edge.url).num_fetched_bytes == 0
    assert not (device.store / "plain" / ".partial").exists()


# -- what is sent --------------------------------------------------------------------------------


def other_bytes(answer: Answer) -> None:
    answer.body = iter([bytes(len(answer.whole))])


def one_more_byte(answer: Answer) -> None:
    answer.headers["Content-Length"] = str(answer.end - answer.first + 1)


def endless(answer: Answer) -> None:
    del answer.headers["Content-Length"]
    answer.body = itertools.repeat(b"x" * 65536)


def longer_than_said(answer: Answer) -> None:
    del answer.headers["Content-Length"]
    answer.body = iter([answer.whole, b"and more"])


def another_range(answer: Answer) -> None:
    answer.headers["Content-Range"] = f"bytes 1-{len(answer.whole)}/{len(answer.whole) + 1}"


def no_range(answer: Answer) -> None:
    del answer.headers["Content-Range"]


def squeezed(answer: Answer) -> None:
    answer.headers["Content-Encoding"] = "gzip"


def redirect(answer: Answer) -> None:
    answer.status, answer.body = 302, None
    answer.headers = {"Location": f"http://127.0.0.1:9/{answer.path}", "Content-Length": "0"}


def another_tag(answer: Answer) -> None:
    answer.headers["ETag"] = '"other"'


def headers_for_ever(answer: Answer) -> None:
    answer.headers |= {f"X-{number}": "x" * 1000 for number in range(200)}


@pytest.mark.parametrize(
    ("lie", "error"),
    [
        (other_bytes, BundleDamagedError),
        (one_more_byte, BundleDamagedError),
        (endless, BundleDamagedError),
        (longer_than_said, BundleDamagedError),
        (another_range, ProtocolError),
        (no_range, ProtocolError),
        (squeezed, ProtocolError),
        (redirect, ProtocolError),
        (another_tag, UpstreamError),
        (headers_for_ever, UpstreamError),
    ],
)
def test_a_lie_about_a_file(device: Device, offer: Path, lie: Lie, error: type[LongshoreError]) -> None:
    refused(device, on(MODEL, lie), error)


@pytest.mark.parametrize("name", ["manifest.json", "manifest.sig"])
@pytest.mark.parametrize("lie", [other_bytes, endless, redirect, squeezed])
def test_a_lie_about_the_manifest(device: Device, offer: Path, name: str, lie: Lie) -> None:
    refused(device, on(name, lie), LongshoreError)


def test_a_file_that_is_not_there(device: Device, offer: Path) -> None:
    (offer / MODEL).unlink()
    refused(device, lambda answer: None, NotFoundError)


def test_a_signature_that_is_not_there(device: Device, offer: Path) -> None:
    (offer / "manifest.sig").unlink()
    refused(device, lambda answer: None, BundleError)


def test_a_manifest_that_breaks_off(device: Device, offer: Path) -> None:
    def lie(answer: Answer) -> None:
        answer.body = iter([answer.whole[:-1]])

    refused(device, closing(on("manifest.json", lie)), UpstreamError)


def test_another_bundle_than_the_one_asked_for(device: Device) -> None:
    device.write(device.offer, version=6, name="other")
    assert "other came" in refused(device, lambda answer: None, BundleError)


def test_an_older_version(device: Device) -> None:
    device.write(device.offer, version=4)
    refused(device, lambda answer: None, BundleRollbackError)


def test_a_bundle_for_a_newer_runtime(device: Device) -> None:
    device.write(device.offer, version=6, min_onnxruntime="1.99")
    refused(device, lambda answer: None, BundleIncompatibleError)


def test_a_bundle_that_is_too_large(device: Device, offer: Path) -> None:
    limits = DownloadLimits(max_total_bytes=1000)
    assert "more than" in refused(device, lambda answer: None, BundleError, limits=limits)


def test_chunks_that_are_right_while_the_file_is_not(device: Device) -> None:
    """An operator's own mistake, rightly signed."""
    from attacks.test_bundle_folder import signed_anew

    device.write(device.offer, version=6, files=FILES | {MODEL: NEW_MODEL})
    signed_anew(device.offer, lambda fields: fields["files"][0].update(sha256="0" * 64))
    refused(device, lambda answer: answer.headers.pop("ETag"), BundleDamagedError)


# -- time ----------------------------------------------------------------------------------------


def silence(answer: Answer) -> None:
    def body() -> Iterator[bytes]:
        yield answer.whole[:100]
        time.sleep(1.5)

    answer.body = body()


def trickle(answer: Answer) -> None:
    def body() -> Iterator[bytes]:
        for byte in answer.whole:
            yield bytes([byte])
            time.sleep(0.05)

    answer.body = body()


@pytest.mark.parametrize("lie", [silence, trickle])
def test_bytes_that_do_not_come(
    device: Device, offer: Path, lie: Lie, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch_module, "STALL_TIMEOUT_S", 0.3)
    refused(device, on(MODEL, lie), UpstreamError, limits=DownloadLimits(num_failures=2))


@pytest.mark.parametrize("name", ["manifest.json", MODEL])
def test_the_time_limit_holds_for_a_trickle(device: Device, offer: Path, name: str) -> None:
    refused(device, on(name, trickle), DeadlineExceededError, limits=DownloadLimits(time_limit_s=0.5))


def test_nobody_listens(device: Device) -> None:
    with LyingEdge(device.offer, "plain") as edge:
        url = edge.url
    pauses: list[float] = []
    device.refuses(lambda: download(device, url, sleep=pauses.append), ConnectionFailedError)
    assert pauses == [0.2, 0.4]


@pytest.mark.parametrize("url", BAD_URLS)
def test_addresses_that_are_no_bundle(device: Device, url: str) -> None:
    device.refuses(lambda: download(device, url), ConfigError)


def test_tls_is_checked_and_its_trickle_ends(device: Device, offer: Path) -> None:
    certificate = write_certificate(device.folder / "both.pem")
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate)
    knowing = ssl.create_default_context(cafile=certificate)
    with LyingEdge(offer, "plain", on(MODEL, trickle), tls) as edge:
        device.refuses(lambda: download(device, edge.url), ProtocolError)
        brief = DownloadLimits(time_limit_s=0.7)
        attack = lambda: download(device, edge.url, ssl_context=knowing, limits=brief)  # noqa: E731
        device.refuses(attack, DeadlineExceededError)
        edge.lie = lambda answer: None
        assert snapshot(download(device, edge.url, ssl_context=knowing).path) == snapshot(offer)


# -- going on ------------------------------------------------------------------------------------


def test_a_broken_connection_is_taken_up_at_the_last_good_chunk(device: Device, offer: Path) -> None:
    breaks = iter([1.5, 1.2])  # chunks that come before the connection goes

    def lie(answer: Answer) -> None:
        num_chunks = next(breaks, None)
        if num_chunks is not None:
            answer.body = iter([answer.whole[answer.first :][: int(num_chunks * CHUNK)]])
            answer.headers |= {"Connection": "close"}

    with LyingEdge(offer, "plain", on(MODEL, lie)) as edge:
        edge.lie = closing(edge.lie)
        done = download(device, edge.url)
        firsts = [first for path, first, _ in edge.asked if path == MODEL]
    assert firsts == [0, CHUNK, 2 * CHUNK] and done.num_fetched_bytes == len(NEW_MODEL)


def closing(lie: Lie) -> Lie:
    """End the connection where the body ends early; without it the reader waits for the rest."""

    def both(answer: Answer) -> None:
        lie(answer)
        body = b"".join(answer.body or ())
        answer.body = ended(body) if len(body) < answer.end - answer.first else iter([body])

    def ended(body: bytes) -> Iterator[bytes]:
        yield body
        raise ConnectionAbortedError

    return both


def test_bad_bytes_are_asked_for_again_the_next_time(device: Device, offer: Path) -> None:
    def third_chunk_is_wrong(answer: Answer) -> None:
        at = 2 * CHUNK + 7
        answer.body = iter([answer.whole[:at] + b"?" + answer.whole[at + 1 :]])

    assert "bytes 8192 to 12288" in refused(device, on(MODEL, third_chunk_is_wrong), BundleDamagedError)
    with LyingEdge(offer, "plain") as edge:
        done = download(device, edge.url)
        assert [asked for asked in edge.asked if asked[0] == MODEL] == [(MODEL, 2 * CHUNK, 4 * CHUNK)]
    assert done.num_fetched_bytes == 2 * CHUNK and snapshot(done.path) == snapshot(offer)


def test_an_edge_without_ranges_still_serves(device: Device, offer: Path) -> None:
    def whole(answer: Answer) -> None:
        answer.status, answer.first, answer.end = 200, 0, len(answer.whole)
        answer.set_default()

    part = device.store / "plain" / ".partial"
    refused(device, on(MODEL, endless), BundleDamagedError)
    assert part.is_dir()
    with LyingEdge(offer, "plain", whole) as edge:
        assert snapshot(download(device, edge.url).path) == snapshot(offer)


def test_only_changed_chunks_are_fetched(device: Device) -> None:
    changed = FILES[MODEL][: 2 * CHUNK] + b"changed!" * 512 + FILES[MODEL][3 * CHUNK :]
    offer = device.write(device.offer, version=6, files=FILES | {MODEL: changed})
    with LyingEdge(offer, "plain") as edge:
        done = download(device, edge.url)
        asked = [asked for asked in edge.asked if not asked[0].startswith("manifest")]
    assert asked == [(MODEL, 2 * CHUNK, 3 * CHUNK)] and snapshot(done.path) == snapshot(offer)
    assert (done.num_fetched_bytes, done.num_kept_bytes) == (
        CHUNK,
        sum(map(len, FILES.values())) - CHUNK,
    )


def test_a_damaged_installed_file_is_no_donor(device: Device) -> None:
    device.write(device.offer, version=6)
    (device.store / "plain" / "5" / MODEL).write_bytes(b"?" + FILES[MODEL][1:])
    with LyingEdge(device.offer, "plain") as edge:
        done = download(device, edge.url)
    assert snapshot(done.path) == snapshot(device.offer)
    assert done.num_fetched_bytes in (0, CHUNK), "the four chunks are alike; one is enough, if it is whole"
