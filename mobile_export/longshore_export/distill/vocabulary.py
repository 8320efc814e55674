"""Whether teacher and student speak in the same tokens, and how the student's map to the teacher's."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from longshore.errors import ConfigError

_NUM_NAMED = 3


def vocabulary_map(student: Tokenizer, teacher: Tokenizer, num_student_ids: int) -> Tensor | None:
    """For each of the student's ids the teacher's, [num_student_ids]; None where the two are the same.

    A student may have a part of the teacher's vocabulary, in any order, so that each of its tokens is one of
    the teacher's. Anything else has no exact soft targets and is refused with ConfigError.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    missing = sorted(token for token in ours if token not in theirs)
    if missing:
        named = ", ".join(repr(token) for token in missing[:_NUM_NAMED])
        raise ConfigError(
            f"the teacher's vocabulary lacks {len(missing)} of the student's tokens, such as {named}"
        )
    if all(theirs[token] == index for token, index in ours.items()) and len(ours) == len(theirs):
        return None
    # ids without a token (padding of the embedding) are never labels; they point at the first token
    mapped = torch.zeros(num_student_ids, dtype=torch.long)
    for token, index in ours.items():
        mapped[index] = theirs[token]
    return mapped


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer.json of a folder; ConfigError in one line."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(f"no tokenizer: {path} does not exist")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust side raises plain Exception
        raise ConfigError(f"the tokenizer {path} can't be read: {str(error).splitlines()[0]}") from None
