"""`python -m demo`: starts core, edge and client with the demo models; shows and checks what they do."""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from pathlib import Path
from random import Random

from demo import tiers
from demo.claims import Claims
from demo.photos import show_photos
from demo.scenes import Scenes
from longshore import AsyncClient
from longshore.device import DeviceSettings
from longshore.errors import LongshoreError
from longshore.tier_process import TierProcess


def main(arguments: list[str] | None = None) -> int:
    """Run the demo; 0 only when every claim was checked and held."""
    parser = argparse.ArgumentParser(prog="longshore demo", description=__doc__)
    parser.add_argument(
        "--keep", action="store_true", help="leave the tiers running and say how to talk to them"
    )
    parser.add_argument(
        "--seed", type=int, default=None, help="draw the questions from this seed (default: fresh)"
    )
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="longshore-demo-") as folder:
        return _run(Path(folder), options)


def _run(folder: Path, options: argparse.Namespace) -> int:
    seed = options.seed if options.seed is not None else time.time_ns() % 1_000_000
    keys, claims = tiers.Keys.generate(), Claims()
    print(
        f"Longshore demo, questions from seed {seed}. Exporting the students and starting the tiers ...",
        flush=True,
    )
    bundles = tiers.export_bundles(folder)
    bundle = bundles[tiers.STUDENT]
    with tiers.core(folder, keys) as core, tiers.edge(folder, keys, core.url, bundle) as edge:
        print(f"core at {core.url}, edge at {edge.url}, student in {bundle.name}", flush=True)
        if options.keep:
            return _keep(core, edge, keys, bundle)
        asyncio.run(_play(edge.url, keys, bundle, core, edge, claims, Random(seed)))
    with tiers.photo_core(keys) as seeing:
        asyncio.run(show_photos(seeing.url, keys, bundles[tiers.PHOTO_MODEL], claims, Random(seed)))
    verdict = (
        "every claim held" if claims.all_hold else f"{len(claims.failed)} claims FAILED: {claims.failed}"
    )
    print(f"\n{claims.num_checked} claims checked: {verdict}")
    return 0 if claims.all_hold else 1


async def _play(
    edge_url: str,
    keys: tiers.Keys,
    bundle: Path,
    core: TierProcess,
    edge: TierProcess,
    claims: Claims,
    rng: Random,
) -> None:
    settings = DeviceSettings(trust=tiers.trust_store(bundle.parent))
    async with AsyncClient(
        edge_url=edge_url, api_key=keys.api_key, device=bundle, device_settings=settings
    ) as client:
        scenes = Scenes(client, core, edge, claims, rng)
        await scenes.calm()
        await scenes.rush()
        await scenes.cached()
        await scenes.dying_engine()
        await scenes.dying_core()
        await scenes.offline()


def _keep(core: TierProcess, edge: TierProcess, keys: tiers.Keys, bundle: Path) -> int:
    question = '{"role": "user", "content": "What colour is the lamp?"}'
    print(
        f"""
The tiers stay up until you press Ctrl-C. Talk to them:

  curl {edge.url}/v1/chat/completions -H "Authorization: Bearer {keys.api_key}" \\
    -H "Content-Type: application/json" -d '{{"model": "shop", "temperature": 0, "messages": [{question}]}}'

  python -c 'from openai import OpenAI
  client = OpenAI(base_url="{edge.url}/v1", api_key="{keys.api_key}")
  print(client.chat.completions.create(model="shop", messages=[{question}]).choices[0].message.content)'

  LONGSHORE_API_KEY={keys.api_key} longshore chat --model shop \\
    --edge-url {edge.url} --core-url {core.url} --device {bundle}
""",
        flush=True,
    )
    try:
        while core.is_running and edge.is_running:
            time.sleep(0.5)
    except KeyboardInterrupt:
        return 0
    print("a tier ended by itself:", core.output if not core.is_running else edge.output, file=sys.stderr)
    return 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except LongshoreError as error:
        print(f"longshore demo: {error.message}", file=sys.stderr)
        sys.exit(2)
