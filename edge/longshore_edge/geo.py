"""From a client's address to a place on the globe, and distances between places.

Reads MaxMind City databases through geoip2 and flat records (DB-IP Lite's shape) through maxminddb.
Never decides where a request goes.
"""

from __future__ import annotations

import ipaddress
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from longshore.errors import ConfigError

EARTH_RADIUS_KM = 6371.0088
_NUM_CACHED_ADDRESSES = 4096


@dataclass(frozen=True, slots=True)
class Place:
    """Degrees north and east."""

    latitude: float
    longitude: float


def distance_km(a: Place, b: Place) -> float:
    """Great-circle distance by the haversine formula, in km."""
    phi_a, phi_b = math.radians(a.latitude), math.radians(b.latitude)
    half_phi = (phi_b - phi_a) / 2
    half_lambda = math.radians(b.longitude - a.longitude) / 2
    h = math.sin(half_phi) ** 2 + math.cos(phi_a) * math.cos(phi_b) * math.sin(half_lambda) ** 2
    return 2 * EARTH_RADIUS_KM * math.asin(math.sqrt(min(1.0, h)))


class GeoDatabase:
    """An mmdb file. Raises ConfigError when it can't be opened; an unknown address is None."""

    def __init__(self, path: Path) -> None:
        import maxminddb

        try:
            self._reader = maxminddb.open_database(path, maxminddb.MODE_AUTO)
        except (OSError, maxminddb.InvalidDatabaseError) as error:
            raise ConfigError(f"geo_db: {path} can't be read: {error}") from None
        self._city_reader = _open_city_reader(path, self._reader.metadata().database_type)
        self._damaged: type[Exception] = maxminddb.InvalidDatabaseError
        self.locate = lru_cache(_NUM_CACHED_ADDRESSES)(self._locate)

    def close(self) -> None:
        """Release the file."""
        self._reader.close()
        if self._city_reader is not None:
            self._city_reader.close()

    def _locate(self, address: str) -> Place | None:
        """Where `address` is, or None: not an address, not in the database, or no coordinates."""
        try:
            ip = ipaddress.ip_address(address)
            return self._from_city(ip) if self._city_reader is not None else self._from_flat(ip)
        except (ValueError, self._damaged):
            return None

    def _from_city(self, ip: Any) -> Place | None:
        from geoip2.errors import AddressNotFoundError

        assert self._city_reader is not None
        try:
            location = self._city_reader.city(ip).location
        except AddressNotFoundError:
            return None
        except (TypeError, AttributeError):  # flat records in a database that calls itself a City one
            return self._from_flat(ip)
        return _place(location.latitude, location.longitude)

    def _from_flat(self, ip: Any) -> Place | None:
        record = self._reader.get(ip)
        if not isinstance(record, dict):
            return None
        location = record.get("location")
        fields = location if isinstance(location, dict) else record
        return _place(fields.get("latitude"), fields.get("longitude"))


def _open_city_reader(path: Path, database_type: str) -> Any:
    """geoip2's reader where the database is of a kind that its `city` method takes, else None."""
    if not database_type.endswith(("City", "Enterprise")):
        return None
    from geoip2.database import Reader

    return Reader(path)


def _place(latitude: object, longitude: object) -> Place | None:
    """A place from numbers or numbers as text; None for anything out of range."""
    try:
        place = Place(float(latitude), float(longitude))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    in_range = abs(place.latitude) <= 90 and abs(place.longitude) <= 180
    return place if in_range else None


class TrustedProxies:
    """Which peers may say in X-Forwarded-For whom they speak for."""

    def __init__(self, networks: tuple[str, ...]) -> None:
        self._networks = [ipaddress.ip_network(network, strict=False) for network in networks]

    def client_address(self, peer: str, forwarded_for: str | None) -> str:
        """The client's address: the peer's, or the last one in the header that is not itself trusted."""
        if not forwarded_for or not self._is_trusted(peer):
            return peer
        for hop in reversed(forwarded_for.split(",")):
            address = hop.strip()
            if not self._is_trusted(address):
                return address if _is_address(address) else peer
        return peer

    def _is_trusted(self, address: str) -> bool:
        if not self._networks or not _is_address(address):
            return False
        ip = ipaddress.ip_address(address)
        return any(ip in network for network in self._networks)


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
