"""Chat messages to prompt text by the manifest's prefix and suffix table. Runs no template code."""

from __future__ import annotations

from collections.abc import Sequence

from longshore.errors import InvalidRequestError
from longshore.prompt_text import ForeignText
from longshore.wire import ChatTemplate, Message

# A role that the table does not hold is written as another that means the same.
_STAND_IN = {"developer": "system"}


def render_chat(
    template: ChatTemplate, messages: Sequence[Message], foreign: ForeignText, image: str = ""
) -> str:
    """The prompt up to where the answer begins, its messages guarded, `image` in place of each picture.

    Raises InvalidRequestError naming a role that the model doesn't know.
    """
    parts = [template.start]
    for index, message in enumerate(messages):
        role = message.role if message.role in template.roles else _STAND_IN.get(message.role, message.role)
        affixes = template.roles.get(role)
        if affixes is None:
            raise InvalidRequestError(
                f"this model knows no role {message.role!r}", param=f"messages[{index}].role"
            )
        parts += [affixes.prefix, _content(message, foreign, image), affixes.suffix]
    return "".join(parts) + template.generation_prompt


def _content(message: Message, foreign: ForeignText, image: str) -> str:
    """Texts next to each other are guarded as one, since a control token may be spelt across them."""
    if isinstance(message.content, str):
        return foreign.guard(message.content)
    pieces = [""]
    for part in message.content:
        if part.text is None:
            pieces += [image, ""]
        else:
            pieces[-1] += part.text
    return "".join(piece if index % 2 else foreign.guard(piece) for index, piece in enumerate(pieces))
