"""Ask one question; whichever tier serves it best answers.

Needs a running edge or core: LONGSHORE_EDGE_URL and LONGSHORE_API_KEY say where (`longshore demo --keep`).
"""

import os

from longshore import Client

SHEET = """\
The lamp is red. The lamp costs $31. The lamp has 12 in stock.
The chair is blue. The chair costs $55. The chair has 3 in stock."""

with Client(edge_url=os.environ["LONGSHORE_EDGE_URL"]) as client:
    answer = client.chat.completions.create(
        model="shop",
        messages=[
            {"role": "system", "content": f"You answer questions about this product sheet.\n{SHEET}"},
            {"role": "user", "content": "What colour is the lamp?"},
        ],
        temperature=0,
        deadline_ms=10_000,
    )

print(answer.choices[0].message.content)
print(f"served by {answer.longshore.served_by}, {answer.usage.completion_tokens} tokens; tried:")
for attempt in answer.longshore.attempts:
    print(f"  {attempt.tier}: {attempt.outcome}, {attempt.reason}")
