"""Measures a picture model on held-out photos at every size: exact match of the facts, by kind of question.

Photos are resized by Pillow as every tier does it. Never trains and never writes weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModelForImageTextToText, SmolVLMForConditionalGeneration

from shop.chat import END
from shop.picture_models import UNIT_PX
from shop.picture_questions import PICTURE_KINDS, PictureKind, PictureQuestion, ask, picture_prompt
from shop.pictures import Photo, draw_photo, make_photo
from shop.sheet import split_rng

MAX_ANSWER_TOKENS = 16
PATCHES_AT_ONCE = {"cuda": 400_000, "cpu": 10_000}


def heldout_photos(num_photos: int, seed: int) -> Iterator[tuple[Photo, dict[PictureKind, PictureQuestion]]]:
    """Photos whose words no training photo has, each with one question of every kind."""
    rng = split_rng("heldout", seed)
    for _ in range(num_photos):
        photo = make_photo(rng, "heldout")
        yield photo, {kind: ask(rng, photo, kind) for kind in PICTURE_KINDS}


def pixel_values(images: Sequence[Image.Image], size_px: int) -> Tensor:
    """uint8 [images, 3, size, size], squeezed into the square."""
    resized = [
        np.asarray(image.resize((size_px, size_px), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
        for image in images
    ]
    return torch.from_numpy(np.stack(resized))


def normalised(pixels: Tensor) -> Tensor:
    return pixels.float() / 127.5 - 1


def image_features(model: SmolVLMForConditionalGeneration, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """(patch states, features for the reader), [pictures, tokens, width] each, of pictures without padding.

    What the model's own get_image_features computes, less its search for empty pictures, which would stop the
    device at every step.
    """
    tower = model.model.vision_model
    rows, _, height, width = pixels.shape
    patch = tower.patch_size
    mask = torch.ones(rows, height // patch, width // patch, dtype=torch.bool, device=pixels.device)
    states = tower.embeddings(pixels.to(tower.embeddings.patch_embedding.weight.dtype), mask)
    for layer in tower.encoder.layers:
        states = layer(states, None)
    states = tower.post_layernorm(states)
    return states, model.model.connector(states)


class PictureEvaluation:
    """Exact answers under teacher forcing: greedy decoding's verdict, word for word, in one forward pass.

    A lower bound of the real score, since another wording counts as wrong.
    """

    def __init__(
        self, tokenizer: Tokenizer, sizes_px: Sequence[int], num_photos: int, device: str, seed: int = 1
    ):
        asked = list(heldout_photos(num_photos, seed))
        images = [draw_photo(photo) for photo, _ in asked]
        self.pixels = {size: pixel_values(images, size).to(device) for size in sizes_px}
        self.device = device
        self._prompts: dict[PictureKind, list[tuple[list[int], list[int]]]] = {
            kind: [_encoded(tokenizer, questions[kind]) for _, questions in asked] for kind in PICTURE_KINDS
        }

    @torch.no_grad()
    def __call__(self, model: SmolVLMForConditionalGeneration) -> dict[str, dict[str, float]]:
        """By size, then by kind and over all."""
        out = {}
        for size, pixels in self.pixels.items():
            rows = max(1, PATCHES_AT_ONCE[self.device] // (size * size // 64))
            features = torch.cat(
                [image_features(model, normalised(part))[1].float() for part in pixels.split(rows)]
            )
            exact = {kind: self._exact(model, features, kind) for kind in PICTURE_KINDS}
            mean = sum(exact.values()) / len(exact)
            out[str(size)] = {name: round(value, 4) for name, value in {"overall": mean, **exact}.items()}
        return out

    def _exact(self, model: SmolVLMForConditionalGeneration, features: Tensor, kind: PictureKind) -> float:
        longest = max(len(prompt) + len(answer) for prompt, answer in self._prompts[kind])
        ids = torch.zeros(len(features), longest, dtype=torch.long)
        in_answer = torch.zeros(len(features), longest, dtype=torch.bool)
        for row, (prompt, answer) in enumerate(self._prompts[kind]):
            ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
            in_answer[row, len(prompt) : len(prompt) + len(answer)] = True
        ids, in_answer = ids.to(self.device), in_answer.to(self.device)
        text = model.model.text_model
        embedded = text.embed_tokens(ids)  # the picture is always the second token
        embedded = torch.cat([embedded[:, :1], features.to(embedded.dtype), embedded[:, 2:]], 1)
        hidden = text(inputs_embeds=embedded, use_cache=False).last_hidden_state
        predicted = model.lm_head(hidden[:, features.shape[1] :]).argmax(-1)  # from the last picture token on
        wrong = (predicted[:, :-1] != ids[:, 2:]) & in_answer[:, 2:]
        return float((~wrong.any(1)).float().mean())


def _encoded(tokenizer: Tokenizer, question: PictureQuestion) -> tuple[list[int], list[int]]:
    prompt = tokenizer.encode(picture_prompt(question), add_special_tokens=False).ids
    return prompt, tokenizer.encode(question.answer + END, add_special_tokens=False).ids


@torch.no_grad()
def greedy_picture_answers(
    model: SmolVLMForConditionalGeneration, tokenizer: Tokenizer, pixels: Tensor,
    questions: Sequence[PictureQuestion],
) -> list[str]:  # fmt: skip
    """transformers' greedy answers, one question a picture; `pixels` uint8 [pictures, 3, height, width]."""
    num_tokens = (pixels.shape[2] // UNIT_PX) * (pixels.shape[3] // UNIT_PX)
    prompts = [
        tokenizer.encode(picture_prompt(question, num_tokens), add_special_tokens=False).ids
        for question in questions
    ]
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    output = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        pixel_values=normalised(pixels)[:, None].to(model.device),
        do_sample=False,
        max_new_tokens=MAX_ANSWER_TOKENS,
    )
    return tokenizer.decode_batch(output[:, longest:].tolist(), skip_special_tokens=True)


def evaluate_folder(
    path: Path, num_photos: int, seed: int = 0, sizes_px: Sequence[int] | None = None, device: str = "cpu"
) -> dict[str, Any]:
    """Load a model folder as anyone would, and score its greedy answers at each size, by kind."""
    warnings.filterwarnings("ignore", message=".*generation flags.*")
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype).to(device).eval()
    asked = list(heldout_photos(num_photos, seed))
    images = [draw_photo(photo) for photo, _ in asked]
    scores: dict[str, Any] = {}
    for size in sizes_px or bucket_widths(path):
        pixels = pixel_values(images, size)
        rows = max(1, PATCHES_AT_ONCE[device] // (size * size // 64))
        counts = dict.fromkeys(PICTURE_KINDS, 0)
        for kind in PICTURE_KINDS:
            questions = [questions[kind] for _, questions in asked]
            for first in range(0, num_photos, rows):
                part = questions[first : first + rows]
                answers = greedy_picture_answers(model, tokenizer, pixels[first : first + rows], part)
                counts[kind] += sum(q.is_correct(a) for q, a in zip(part, answers, strict=True))
        overall = sum(counts.values()) / (num_photos * len(counts))
        scores[str(size)] = {"overall": round(overall, 4), "correct": counts, "of_each": num_photos}
    return scores


def bucket_widths(path: Path) -> list[int]:
    import json

    config = json.loads((path / "preprocessor_config.json").read_text(encoding="utf-8"))
    return [width for width, _, _ in config["buckets"]]
