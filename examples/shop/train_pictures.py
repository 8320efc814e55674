"""The training of the picture model: `python -m shop.train_pictures {train,evaluate}`.

Runs on a GPU or, at toy size, on a CPU. Owns the losses and what is saved. A second loss names the digit
under each patch; its head is dropped in the end.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import SmolVLMForConditionalGeneration

from shop.batches import IGNORED, Markers, answer_labels
from shop.chat import END, PREFIX
from shop.evaluate_pictures import PictureEvaluation, evaluate_folder, image_features
from shop.models import num_parameters
from shop.optim import make_optimisers
from shop.picture_batches import PhotoPool, PictureBatch
from shop.picture_models import (
    PATCH_PX,
    build_vision_model,
    save_vision_model,
    sizes_of,
    vision_tokenizer,
)
from shop.training_loop import TrainingLoop

MAX_ANSWERS_TOKENS = 32  # of the three answers of a chat
NUM_DIGIT_CLASSES = 21  # none, units 0 to 9, tens 0 to 9
DIGIT_WEIGHT = 0.5
LEAST_WEIGHT_OF_NONE = 0.02


@dataclass(frozen=True, slots=True)
class PictureRun:
    """One training run; it ends at `num_steps` or `max_seconds`, its schedule following the nearer one.

    A step takes photos of one size, as many as make `patches` patches, `max_rows` at most.
    """

    out: Path
    which: str = "vision"
    seed: int = 0
    num_steps: int = 4000
    max_seconds: float = 1e9
    patches: int = 300_000
    max_rows: int = 1024
    pool_photos: int = 102_400
    shard_photos: int = 256
    num_shards: int = 1_000_000
    easy_shards: int = 160
    processes: int = 14
    muon_lr: float = 0.01
    adam_lr: float = 3e-3
    warmup_steps: int = 100
    decay_fraction: float = 0.35
    eval_every: int = 250
    eval_photos: int = 128
    compile: bool = False
    start: Path | None = None


class DigitLoss(nn.Module):
    """Which digit of the price lies under a patch: a signal everywhere, long before answers are right."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.head = nn.Linear(width, NUM_DIGIT_CLASSES)

    def forward(self, states: Tensor, digits: Tensor) -> Tensor:
        """`states` [rows, patches, width] of square pictures, `digits` as in a batch."""
        labels = digit_labels(digits, round(states.shape[1] ** 0.5)).flatten()
        weights = torch.where(labels > 0, 1.0, LEAST_WEIGHT_OF_NONE)
        losses = F.cross_entropy(self.head(states).flatten(0, 1).float(), labels, reduction="none")
        return (losses * weights).sum() / weights.sum()


def digit_labels(digits: Tensor, side: int) -> Tensor:
    """[rows, side * side]: 0 for none, else 1 + class of the digit whose box holds the patch's centre.

    A box smaller than a patch counts as large as one, so that its patch is never missed.
    """
    centres = (torch.arange(side, device=digits.device) + 0.5) / side
    labels = torch.zeros(len(digits), side, side, dtype=torch.long, device=digits.device)
    for digit in digits.unbind(1):
        kind, x, y, width, height = digit.unbind(1)
        in_row = (centres - y[:, None]).abs() <= (height[:, None] / 2).clamp(min=0.5 / side)
        in_column = (centres - x[:, None]).abs() <= (width[:, None] / 2).clamp(min=0.5 / side)
        inside = in_row[:, :, None] & in_column[:, None, :] & (kind >= 0)[:, None, None]
        labels = torch.where(inside, 1 + kind.long()[:, None, None], labels)
    return labels.flatten(1)


def spread_image_tokens(tokens: Tensor, image_token_id: int, num_image_tokens: int) -> Tensor:
    """Rows with one image token each, to rows with `num_image_tokens` in its place."""
    place = (tokens == image_token_id).int().argmax(1, keepdim=True)
    index = torch.arange(tokens.shape[1] + num_image_tokens - 1, device=tokens.device)
    source = torch.where(index < place, index, (index - num_image_tokens + 1).clamp(min=0))
    source = torch.where((index >= place) & (index < place + num_image_tokens), place, source)
    return tokens.gather(1, source)


class PictureTrainer(TrainingLoop[PictureRun]):
    """A run of the picture model."""

    untimed_steps = 8

    def __init__(self, run: PictureRun, device: str):
        super().__init__(run, device)
        self.sizes_px = sizes_of(run.which).sizes_px
        tokenizer_file = run.out / "tokenizer.json"
        tokenizer = vision_tokenizer(tokenizer_file)
        self.pool = PhotoPool(
            run.pool_photos, run.shard_photos, self.sizes_px[-1], tokenizer_file,
            num_processes=run.processes, num_easy=run.easy_shards, num_shards=run.num_shards,
            seed=run.seed, device=device,
        )  # fmt: skip
        to_id = tokenizer.token_to_id
        others = (to_id(PREFIX["system"]), to_id(PREFIX["user"]))
        self.markers = Markers(to_id(END), to_id(PREFIX["assistant"]), others)
        self.model = build_vision_model(run.seed, run.which).to(device).train()
        self.digits = DigitLoss(self.model.config.vision_config.hidden_size).to(device)
        if run.start:
            self._load(run.start)
        self.optimisers = make_optimisers([self.model, self.digits], run.muon_lr, run.adam_lr)
        self.evaluation = PictureEvaluation(tokenizer, self.sizes_px, run.eval_photos, device)
        self.generator = torch.Generator(device).manual_seed(run.seed)
        self.sizes = torch.Generator().manual_seed(run.seed)
        if run.compile:
            _compile_layers(self.model)

    def next_losses(self) -> dict[str, Tensor]:
        return self.losses(self.next_batch())

    def next_batch(self) -> PictureBatch:
        size = self.sizes_px[int(torch.randint(len(self.sizes_px), (1,), generator=self.sizes))]
        rows = min(self.run.max_rows, self.run.patches // (size // PATCH_PX) ** 2)
        return self.pool.batch(rows, size, self.generator)

    def losses(self, batch: PictureBatch) -> dict[str, Tensor]:
        states, features = image_features(self.model, batch.pixels)
        input_ids = spread_image_tokens(batch.tokens, self.model.config.image_token_id, features.shape[1])
        labels = answer_labels(input_ids, self.markers)
        text = self.model.model.text_model
        embedded = text.embed_tokens(input_ids)
        is_image = (input_ids == self.model.config.image_token_id)[..., None]
        embedded = embedded.masked_scatter(is_image, features.to(embedded.dtype))
        hidden = text(inputs_embeds=embedded, use_cache=False).last_hidden_state
        # Of every row, the places that matter: a count that is known, so that nothing waits for the GPU.
        places = torch.argsort(labels.ge(0).int(), dim=1, descending=True, stable=True)
        places = places[:, :MAX_ANSWERS_TOKENS]
        states_at = hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[-1]))
        logits = self.model.lm_head(states_at).flatten(0, 1).float()
        answers = F.cross_entropy(logits, labels.gather(1, places).flatten(), ignore_index=IGNORED)
        digits = self.digits(states, batch.digits)
        return {"total": answers + DIGIT_WEIGHT * digits, "answers": answers, "digits": digits}

    def train(self) -> dict[str, Any]:
        """Train to the end and write the model; returns the last line of the curve."""
        self.pool.wait_for(min(self.run.pool_photos, 16 * self.run.shard_photos))
        line: dict[str, Any] = {}
        logged = 0
        while self.progress < 1.0:
            losses = self.advance()
            if self.progress >= 1.0 or self.step - logged >= self.run.eval_every:
                logged = self.step
                line = self._log(losses)
                self.save()
        self.pool.close()
        return line

    def _log(self, losses: dict[str, Tensor]) -> dict[str, Any]:
        with self.autocast(), torch.compiler.set_stance("force_eager"):
            exact = self.evaluation(self.model)
        line = {"last_steps_s": round(self.last_steps_s, 2), "photos_drawn": self.pool.num_drawn}
        return self.write_line(line, losses, exact)

    def save(self) -> None:
        """The model's folder, and its fp32 weights with the second loss's head, to go on from."""
        save_vision_model(self.model, self.run.out / "model", self.run.which)
        save_file(self._state(), self.run.out / "weights.safetensors")

    def _state(self) -> dict[str, Tensor]:
        named = {"model": self.model, "digits": self.digits}
        return {
            f"{part}.{name}": value.detach().cpu().contiguous()
            for part, module in named.items()
            for name, value in module.state_dict().items()
        }

    def _load(self, path: Path) -> None:
        state = load_file(path)
        for part, module in {"model": self.model, "digits": self.digits}.items():
            start = f"{part}."
            module.load_state_dict(
                {name.removeprefix(start): value for name, value in state.items() if name.startswith(start)}
            )


def _compile_layers(model: SmolVLMForConditionalGeneration) -> None:
    """Layer by layer, for every size at once: all layers of tower or reader share one compilation."""
    torch._dynamo.config.recompile_limit = 64
    for layer in (*model.model.vision_model.encoder.layers, *model.model.text_model.layers):
        layer.compile(dynamic=True)


def train_pictures(run: PictureRun, device: str) -> dict[str, Any]:
    trainer = PictureTrainer(run, device)
    print(json.dumps({"parameters": num_parameters(trainer.model)}), flush=True)
    return trainer.train()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="shop.train_pictures", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train")
    train.add_argument("--out", type=Path, required=True)
    train.add_argument("--start", type=Path, help="weights.safetensors of an earlier run to go on from")
    train.add_argument("--compile", action="store_true")
    for name, field in PictureRun.__dataclass_fields__.items():
        if type(field.default) in (int, float, str):
            train.add_argument("--" + name.replace("_", "-"), type=type(field.default), default=field.default)
    scores = commands.add_parser("evaluate", help="score a model folder on held-out photos")
    scores.add_argument("--model", type=Path, required=True)
    scores.add_argument("--photos", type=int, default=252)
    scores.add_argument("--seed", type=int, default=0)
    scores.add_argument("--sizes", type=int, nargs="*", help="widths in pixels; the model's by default")
    return parser


def main(argv: list[str] | None = None) -> None:
    arguments = _parser().parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")
    if arguments.command == "evaluate":
        a = arguments
        print(json.dumps(evaluate_folder(a.model, a.photos, a.seed, a.sizes, device)), flush=True)
        return
    run = PictureRun(**{name: getattr(arguments, name) for name in PictureRun.__dataclass_fields__})
    print(json.dumps({name: str(value) for name, value in asdict(run).items()}), flush=True)
    train_pictures(run, device)


if __name__ == "__main__":
    main()
