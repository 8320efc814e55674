"""Stream an answer token by token, and see at the end who gave it.

Needs a running edge or core: LONGSHORE_EDGE_URL and LONGSHORE_API_KEY say where.
"""

import asyncio
import os

import shop
from longshore import AsyncClient


async def main() -> None:
    rng = shop.split_rng("heldout", 1)
    sheet = shop.make_sheet(rng, 5, "heldout")
    question = shop.make_question(rng, sheet, "list")
    async with AsyncClient(edge_url=os.environ["LONGSHORE_EDGE_URL"]) as client:
        stream = await client.chat.completions.create(
            model="shop", messages=shop.messages(sheet, question), temperature=0, stream=True
        )
        async with stream:
            async for chunk in stream:
                if chunk.choices:
                    print(chunk.choices[0].delta.content or "", end="", flush=True)
    print(f"\nright: {question.is_correct(stream.text)}, served by {stream.report.served_by}")


asyncio.run(main())
