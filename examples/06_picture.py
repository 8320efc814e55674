"""Ask about a picture on the device, and see at which size it was read and why.

LONGSHORE_BUNDLE is the folder of an exported student that sees (examples/models/shop-vision).
"""

import os
from random import Random

from longshore import Client
from shop.picture_questions import ask, picture_messages
from shop.pictures import draw_photo, make_photo

rng = Random(1)
photo = make_photo(rng, "heldout")
question = ask(rng, photo, "price")
picture = {"type": "image", "image": draw_photo(photo)}  # a path, or a file's bytes, would do as well

with Client(device=os.environ["LONGSHORE_BUNDLE"], mode="device-only") as client:
    answer = client.chat.completions.create(
        model="shop-vision", messages=picture_messages(question, picture), temperature=0, max_tokens=40
    )

print(f"{question.text} {answer.choices[0].message.content}")
for use in answer.longshore.images:
    print(f"read at {use.width_px} x {use.height_px} pixels ({use.why}), {use.num_tokens} tokens")
print(f"{answer.usage.prompt_tokens} tokens of prompt, served by {answer.longshore.served_by}")
