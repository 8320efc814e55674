"""Trains and writes the Shop tokenizer: byte-level BPE in which every word of the task is one token.

Owns the tokenizer folder's files. Bytes are the fallback, so any text has an encoding.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from shop.chat import CHAT_TEMPLATE, END, PAD, SPECIAL_TOKENS, prefix_suffix_table
from shop.data import chat_text
from shop.sheet import COLOURS, MAX_PRICE, MAX_STOCK, NAMES, split_rng

VOCAB_SIZE = 1024
MAX_MODEL_TOKENS = 1024
FOLDER = Path(__file__).parent / "tokenizer"
NUM_TRAINING_CHATS = 3_000
WORDS = r" ?\p{L}+| ?\$?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+"
"""A price such as " $12" is one word; whatever the pattern, no text is lost."""
GENERAL_TEXT = (
    "Hello! Hi, how are you? Thank you, please. I am sorry, but I do not know the answer to this "
    "question. The sheet does not list it. Can you help me with something else? Yes, of course. No, not "
    "today. Which of these would you like to buy? It depends on what you are looking for, and how much "
    "money you have. This message will be answered by a small model that runs on the device, near you, or "
    "on a server. Where did they go after that? She said there was time for one more before they left, "
    "and he could have been right about it. If we were to write only what people want to read, then who "
    "would make new things? First come, first served; some may wait until there is more, because others "
    "need theirs now. When it rains, all water runs down from the hill into the river and over the old "
    "stone bridge to the sea. Take your pick from between those two large boxes, open it, and find out "
    "which was made by hand. Day by day our work gets better, though never quite as good as we had hoped; "
    "still, try again next year."
)


def _corpus() -> Iterator[str]:
    rng = split_rng("train", -1)
    for _ in range(NUM_TRAINING_CHATS):
        yield chat_text(rng, rng.randint(2, 8), 12)
    # Whole words, in the form in which they occur, until each is worth a token.
    words = " ".join((*NAMES, *COLOURS))
    numbers = " ".join(f"{n} ${n}" for n in range(max(MAX_PRICE, MAX_STOCK) + 1))
    for _ in range(NUM_TRAINING_CHATS // 3):
        yield f" {words} {numbers}"
    for _ in range(NUM_TRAINING_CHATS // 50):
        yield GENERAL_TEXT


def train_tokenizer() -> Tokenizer:
    """Deterministic: the same corpus, hence the same merges, on every machine."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    return tokenizer


def _dump(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tokenizer(folder: Path = FOLDER) -> Tokenizer:
    """Train and write tokenizer.json with the configuration, template and generation files beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    _dump(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": MAX_MODEL_TOKENS,
            "pad_token": PAD,
            "eos_token": END,
            "padding_side": "left",
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )
    _dump(folder / "chat_prefix_suffix.json", prefix_suffix_table())
    _dump(
        folder / "generation_config.json",
        {
            "pad_token_id": tokenizer.token_to_id(PAD),
            "eos_token_id": tokenizer.token_to_id(END),
            "do_sample": False,
            "max_new_tokens": 256,
        },
    )
    return tokenizer


TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_prefix_suffix.json",
    "generation_config.json",
)
