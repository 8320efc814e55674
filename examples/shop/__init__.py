"""Shop: questions about a product sheet that stands in the prompt, so that every answer can be checked.

Importing it needs the standard library alone; models, training and evaluation are modules of their own.
"""

from pathlib import Path

from shop.chat import messages, render
from shop.question import KINDS, Kind, Question, chance_level, facts, make_question
from shop.sheet import COLOURS, NAMES, Item, Sheet, Split, make_sheet, split_rng

__all__ = [
    "COLOURS",
    "KINDS",
    "NAMES",
    "Item",
    "Kind",
    "Question",
    "Sheet",
    "Split",
    "chance_level",
    "facts",
    "make_question",
    "make_sheet",
    "messages",
    "random_model",
    "render",
    "split_rng",
]


def random_model(path: Path | str, which: str = "student", seed: int = 0) -> Path:
    """Write a whole model folder with random weights and the Shop tokenizer; needs torch and transformers."""
    from shop.models import random_model as write

    return write(Path(path), which, seed)
