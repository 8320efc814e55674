"""Start a core and an edge from Python, ask through both, and stop them again.

Needs `longshore[edge,server]`.
"""

from pathlib import Path

import shop
from longshore import Client
from longshore.signing import PrivateKey
from longshore.tier_process import TierProcess

MODEL = Path(__file__).parent / "models" / "shop-teacher"
KEY = {"LONGSHORE_API_KEY": "a-key-for-this-example"}

signing = PrivateKey.generate()
core_settings = ["--model", str(MODEL), "--port", "0", "--edge", f"edge-1={signing.public_key.text}"]

with TierProcess(["serve", *core_settings], environment=KEY) as core:
    edge_settings = ["--node", "edge-1", "--port", "0", "--core", f"core-1={core.url}"]
    secrets = KEY | {"LONGSHORE_EDGE_SIGNING_KEY": signing.text}
    with TierProcess(["edge", *edge_settings], environment=secrets) as edge:
        rng = shop.split_rng("heldout", 3)
        sheet = shop.make_sheet(rng, 4, "heldout")
        question = shop.make_question(rng, sheet, "cheaper")
        with Client(edge_url=edge.url, api_key=KEY["LONGSHORE_API_KEY"]) as client:
            answer = client.chat.completions.create(
                model="shop-teacher", messages=shop.messages(sheet, question), temperature=0
            )

print(f"{question.text} -> {answer.choices[0].message.content}")
print(" -> ".join(f"{hop.tier} {hop.node} {hop.total_ms:.0f} ms" for hop in answer.longshore.hops))
