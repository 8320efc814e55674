"""The last scene: photos, shown to a model that sees, on a core and on the device."""

from __future__ import annotations

from pathlib import Path
from random import Random

from demo import tiers
from demo.claims import Claims
from demo.questions import photo_case
from demo.scenes import PATIENT, ask
from demo.table import Table
from longshore import AsyncClient
from longshore.device import DeviceSettings
from shop.picture_questions import PictureKind

KINDS: tuple[PictureKind, ...] = ("product", "colour", "price")
MODES = {"core": PATIENT, "device": {"mode": "device-only"}}
LEAST_RIGHT = 4  # of six answers: the model is wrong on some prices


async def show_photos(core_url: str, keys: tiers.Keys, bundle: Path, claims: Claims, rng: Random) -> None:
    """Fresh photos, each on the core and on the device, by one call that holds the picture itself."""
    print("\n7. Photos, to a model that sees: on a core of its own, and on the device")
    table, rows = Table(), []
    settings = DeviceSettings(trust=tiers.trust_store(bundle.parent))
    async with AsyncClient(
        core_url=core_url, api_key=keys.api_key, device=bundle, device_settings=settings
    ) as client:
        table.head()
        for kind in KINDS:
            asked = photo_case(rng, kind)
            for tier, mode in MODES.items():
                row = await ask(client, asked, model=tiers.PHOTO_MODEL, **mode)
                table.add(row)
                rows.append((tier, row))
    num_right = sum(row.is_correct for _, row in rows)
    claims.check(
        all(row.report.served_by == tier and row.report.images for tier, row in rows),
        "core and device each read the photos",
        ", ".join(
            sorted({f"{use.width_px} x {use.height_px}" for _, row in rows for use in row.report.images})
        ),
    )
    claims.check(
        num_right >= LEAST_RIGHT,
        "what is on them, in which colour, at what price",
        f"{num_right}/{len(rows)}",
    )
