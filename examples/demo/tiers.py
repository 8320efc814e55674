"""The demo's own core, edge and bundle: real processes on free ports of this machine."""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx2

from longshore.signing import PrivateKey
from longshore.tier_process import TierProcess

MODELS = Path(__file__).resolve().parent.parent / "models"
MODEL_NAME = "shop"
STUDENT = "shop-student"
PHOTO_MODEL = "shop-vision"


@dataclass(frozen=True, slots=True)
class Keys:
    """The secrets of one demo: the client's API key and the edge's signing key."""

    api_key: str
    edge_key: PrivateKey

    @classmethod
    def generate(cls) -> Keys:
        """Fresh ones for each run."""
        return cls("ls-" + secrets.token_hex(16), PrivateKey.generate())

    @property
    def key_sha256(self) -> str:
        """What a tier stores of the API key."""
        return hashlib.sha256(self.api_key.encode()).hexdigest()


def export_bundles(folder: Path, names: tuple[str, ...] = (STUDENT, PHOTO_MODEL)) -> dict[str, Path]:
    """Export and sign the students with the commands that an operator would type; the key lasts a day."""
    key = folder / "operator.key"
    _longshore("bundle", "keygen", str(key), "--key-id", "demo", "--days", "1")
    _longshore("bundle", "trust", "add", str(trust_store(folder)), f"{key}.pub")
    bundles = {name: folder / name for name in names}
    with ThreadPoolExecutor() as pool:
        for done in [pool.submit(_export, bundle, key) for bundle in bundles.values()]:
            done.result()
    return bundles


def _export(bundle: Path, key: Path) -> None:
    model = str(MODELS / bundle.name)
    _longshore("export", "student", "--model", model, "--out", str(bundle), "--sign-key", str(key))


def trust_store(folder: Path) -> Path:
    """The public keys that the demo's device believes."""
    return folder / "trust.json"


def _longshore(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "longshore.cli", *arguments], check=True, timeout=300)


def core(folder: Path, keys: Keys) -> TierProcess:
    """The core with the teacher, not yet started."""
    config = folder / "core.toml"
    config.write_text(
        f"""\
model = {json.dumps(str(MODELS / "shop-teacher"))}
served_model_name = "{MODEL_NAME}"
node = "core-1"
host = "127.0.0.1"
port = 0

[[keys]]
tenant = "demo"
key_sha256 = "{keys.key_sha256}"
best_lane = "vip"

[[edges]]
issuer = "edge-1"
public_key = "{keys.edge_key.public_key.text}"
"""
    )
    return TierProcess(["serve", "--config", str(config)])


def photo_core(keys: Keys) -> TierProcess:
    """A core with the model that sees, not yet started."""
    flags = ["--model", str(MODELS / PHOTO_MODEL), "--port", "0"]
    return TierProcess(["serve", *flags], environment={"LONGSHORE_API_KEY": keys.api_key})


async def core_is_back(edge_url: str, timeout_s: float = 30.0) -> None:
    """Wait until the edge's own checks find the core ready again, after its engine was restarted."""
    async with asyncio.timeout(timeout_s), httpx2.AsyncClient() as client:
        while (await client.get(f"{edge_url}/readyz")).json().get("cores") != {"core-1": "ready"}:
            await asyncio.sleep(0.2)


def edge(folder: Path, keys: Keys, core_url: str, bundle: Path) -> TierProcess:
    """The edge in front of `core_url` with the student as its last resort, not yet started."""
    config = folder / "edge.toml"
    config.write_text(
        f"""\
node = "edge-1"
host = "127.0.0.1"
port = 0
signing_key = "{keys.edge_key.text}"
student_bundle = {json.dumps(str(bundle))}
student_model_name = "{MODEL_NAME}"
cache_path = {json.dumps(str(folder / "cache.sqlite"))}

[[cores]]
name = "core-1"
url = "{core_url}"

[[keys]]
tenant = "demo"
key_sha256 = "{keys.key_sha256}"
best_lane = "vip"
"""
    )
    config.chmod(0o600)
    return TierProcess(["edge", "--config", str(config)])
