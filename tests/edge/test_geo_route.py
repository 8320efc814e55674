"""From the client's address over a real mmdb file to the nearest cores, through a running edge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mmdb_writer import MMDBWriter
from netaddr import IPSet

from edge.harness import ask, chat, edge_toml, session_to, start_core, start_edge
from longshore.errors import ConfigError
from longshore_edge.geo import GeoDatabase, Place, TrustedProxies

PARIS, SYDNEY = Place(48.85, 2.35), Place(-33.87, 151.21)


def city_record(place: Place) -> dict[str, Any]:
    return {
        "city": {"names": {"en": "Somewhere"}},
        "country": {"iso_code": "FR", "names": {"en": "France"}},
        "location": {"latitude": place.latitude, "longitude": place.longitude, "time_zone": "Europe/Paris"},
    }


def flat_record(place: Place) -> dict[str, Any]:
    return {"city": "Somewhere", "country": "FR", "latitude": place.latitude, "longitude": place.longitude}


def write_mmdb(path: Path, database_type: str, record: Any) -> Path:
    writer = MMDBWriter(ip_version=6, ipv4_compatible=True, database_type=database_type)
    writer.insert_network(IPSet(["2.2.2.0/24"]), record(PARIS))
    writer.insert_network(IPSet(["1.1.1.0/24", "2001:db8::/32"]), record(SYDNEY))
    writer.insert_network(
        IPSet(["9.9.9.0/24"]), {"city": "no place"} if record is flat_record else {"city": {}}
    )
    writer.to_db_file(str(path))
    return path


@pytest.mark.parametrize(
    ("database_type", "record"),
    [
        ("GeoLite2-City", city_record),
        ("GeoIP2-Enterprise", city_record),
        ("DBIP-City-Lite", flat_record),
        ("DBIP-City", flat_record),  # geoip2 takes this name and stumbles over the records
    ],
)
def test_both_shapes(tmp_path: Path, database_type: str, record: Any) -> None:
    database = GeoDatabase(write_mmdb(tmp_path / "geo.mmdb", database_type, record))
    for _ in range(2):  # the second time from the memo
        assert database.locate("2.2.2.7") == PARIS
        assert database.locate("1.1.1.1") == SYDNEY
        assert database.locate("2001:db8::1") == SYDNEY
        for unknown in ("8.8.8.8", "9.9.9.9", "::1", "junk", "", "1.1.1.1.1"):
            assert database.locate(unknown) is None
    database.close()


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    path = tmp_path / "geo.mmdb"
    path.write_bytes(b"not a database")
    for candidate in (path, tmp_path / "missing.mmdb"):
        with pytest.raises(ConfigError, match=str(candidate)):
            GeoDatabase(candidate)


def test_only_trusted_proxies_are_believed() -> None:
    proxies = TrustedProxies(("10.0.0.0/8", "::1/128"))
    assert proxies.client_address("5.5.5.5", "1.1.1.1") == "5.5.5.5"
    assert proxies.client_address("10.0.0.1", "1.1.1.1") == "1.1.1.1"
    assert proxies.client_address("10.0.0.1", "6.6.6.6, 1.1.1.1, 10.2.3.4") == "1.1.1.1"
    assert proxies.client_address("10.0.0.1", "10.0.0.2") == "10.0.0.1"
    assert proxies.client_address("10.0.0.1", "junk") == "10.0.0.1"
    assert proxies.client_address("10.0.0.1", None) == "10.0.0.1"


async def test_the_nearest_core_is_asked(tmp_path: Path) -> None:
    mmdb = write_mmdb(tmp_path / "geo.mmdb", "GeoLite2-City", city_record)
    with start_core("paris") as paris, start_core("sydney") as sydney:
        toml = edge_toml([], f'geo_db = "{mmdb}"\nnum_candidates = 1\ntrusted_proxies = ["127.0.0.0/8"]')
        for core, place in ((paris, PARIS), (sydney, SYDNEY)):
            toml += f'[[cores]]\nname = "{core.name}"\nurl = "{core.url}"\n'
            toml += f"latitude = {place.latitude}\nlongitude = {place.longitude}\n"
        with start_edge(tmp_path, toml) as edge:
            async with session_to(edge) as session:
                for address, node in (("2.2.2.9", "paris"), ("1.1.1.9", "sydney")):
                    for _ in range(4):
                        _, body, _ = await ask(session, chat(), **{"x-forwarded-for": address})
                        assert body["longshore"]["node"] == node
                paris.kill()  # the next nearest takes over, at once
                status, body, _ = await ask(session, chat(), **{"x-forwarded-for": "2.2.2.9"})
                assert (status, body["longshore"]["node"]) == (200, "sydney")
