"""The same call with and without a network: where no server answers, the device does.

LONGSHORE_BUNDLE is an exported student (see 05_export_student.py).
"""

import os

import shop
from longshore import Client

UNREACHABLE = "http://127.0.0.1:9"  # the discard port: nothing listens there

rng = shop.split_rng("heldout", 2)
sheet = shop.make_sheet(rng, 3, "heldout")
question = shop.make_question(rng, sheet, "price")

with Client(edge_url=UNREACHABLE, device=os.environ["LONGSHORE_BUNDLE"], api_key="unused") as client:
    answer = client.chat.completions.create(
        model="shop", messages=shop.messages(sheet, question), temperature=0, mode="prefer-core"
    )

text = answer.choices[0].message.content
print(f"{question.text} -> {text} (right: {question.is_correct(text)})")
print(f"served by {answer.longshore.served_by}; tried:")
for attempt in answer.longshore.attempts:
    print(f"  {attempt.tier}: {attempt.outcome}, {attempt.reason}")
