"""The training of the Shop models: `python -m shop.train {tokenizer,teacher,student,compare,evaluate}`.

Runs on a GPU or, at toy size, on a CPU. Owns the models' losses and checkpoints; the distillation losses
come from longshore_export. Checkpoints are safetensors and JSON, never pickles.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from longshore_export.distill import Distiller, DistillWeights, hidden_states
from longshore_export.distill.checkpoint import load_checkpoint, read_meta, save_checkpoint
from shop.batches import Batch, Batches, Markers
from shop.chat import END, PREFIX
from shop.evaluate import QuickEvaluation, evaluate_folder
from shop.models import build_model, num_parameters, save_model
from shop.optim import make_optimisers
from shop.tokenizer import FOLDER, MAX_MODEL_TOKENS, write_tokenizer
from shop.training_loop import STEPS_AT_ONCE, TrainingLoop


@dataclass(frozen=True, slots=True)
class Run:
    """One training run; it ends at `num_steps` or `max_seconds`, its schedule following the nearer one."""

    which: str
    data: Path
    out: Path
    seed: int = 0
    num_steps: int = 5000
    max_seconds: float = 1e9
    num_shards: int = 32
    rows: int = 64
    muon_lr: float = 0.006
    adam_lr: float = 3e-3
    warmup_steps: int = 200
    decay_fraction: float = 0.4
    teacher: Path | None = None
    eval_every: int = 250
    eval_per_kind: int = 84
    checkpoint_every: int = 0
    compile: bool = False


class Trainer(TrainingLoop[Run]):
    """A run of the Shop's language models."""

    untimed_steps = 3

    def __init__(self, run: Run, device: str):
        super().__init__(run, device)
        self.tokenizer = AutoTokenizer.from_pretrained(FOLDER)
        to_id: Callable[[str], int] = self.tokenizer.convert_tokens_to_ids
        markers = Markers(
            to_id(END), to_id(PREFIX["assistant"]), (to_id(PREFIX["system"]), to_id(PREFIX["user"]))
        )
        self.batches = Batches(
            run.data, run.num_shards, run.rows, markers, MAX_MODEL_TOKENS, run.seed, device
        )
        self.model = build_model(run.which, run.seed).to(device)
        self.distiller = self._distiller(run.teacher) if run.teacher else None
        self.optimisers = make_optimisers(
            [self.model, *([self.distiller] if self.distiller else [])], run.muon_lr, run.adam_lr
        )
        self.quick = QuickEvaluation(self.tokenizer, run.eval_per_kind, device)
        if run.compile:
            _compile_layers(self.model)

    def _distiller(self, path: Path) -> Distiller:
        teacher = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).to(self.device)
        if self.run.compile:
            _compile_layers(teacher)
        return Distiller(self.model, teacher, DistillWeights()).to(self.device)

    def next_losses(self) -> dict[str, Tensor]:
        return self.losses(self.batches(self.step))

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        if self.distiller:
            return self.distiller(batch.input_ids, batch.position_ids, batch.labels, self.progress)
        chosen = batch.labels.flatten().ge(0).nonzero().squeeze(-1)
        states = hidden_states(self.model, batch.input_ids, batch.position_ids)[-1]
        logits = self.model.lm_head(states.flatten(0, 1)[chosen])
        return {"total": F.cross_entropy(logits.float(), batch.labels.flatten()[chosen])}

    def train(self) -> dict[str, Any]:
        """Train to the end; returns the last line of the curve."""
        self.resume()
        line: dict[str, Any] = {}
        while self.progress < 1.0:
            losses = self.advance()
            finished = self.progress >= 1.0
            if finished or self.step % self.run.eval_every < STEPS_AT_ONCE:
                line = self._log(losses)
            if self.run.checkpoint_every and (
                finished or self.step % self.run.checkpoint_every < STEPS_AT_ONCE
            ):
                self.checkpoint()
        save_model(self.model, self.run.out / "model")
        return line

    def _log(self, losses: dict[str, Tensor]) -> dict[str, Any]:
        with self.autocast(), torch.compiler.set_stance("force_eager"):
            scores = self.quick(self.model)
        return self.write_line({"run": self.run.out.name}, losses, scores)

    def checkpoint(self) -> None:
        """Write what the rest of the run needs; the old checkpoint stands until the new one is whole."""
        meta = {"step": str(self.step), "train_s": str(self.train_s)}
        save_checkpoint(self._checkpoint_path, self._modules(), self.optimisers, meta)

    def resume(self) -> None:
        """Go on from the checkpoint in the run's folder, if there is one."""
        if not self._checkpoint_path.exists():
            return
        load_checkpoint(self._checkpoint_path, self._modules(), self.optimisers, self.device)
        meta = read_meta(self._checkpoint_path)
        self.step, self.train_s = int(meta["step"]), float(meta["train_s"])

    @property
    def _checkpoint_path(self) -> Path:
        return self.run.out / "checkpoint.safetensors"

    def _modules(self) -> dict[str, nn.Module]:
        return {"model": self.model} | ({"maps": self.distiller} if self.distiller else {})


def _compile_layers(model: LlamaForCausalLM) -> None:
    """Compile layer by layer: all layers of a model share one compilation."""
    torch._dynamo.config.recompile_limit = 64
    for layer in model.model.layers:
        layer.compile(dynamic=False)


def train_model(run: Run, device: str) -> dict[str, Any]:
    trainer = Trainer(run, device)
    print(json.dumps({"run": run.out.name, "parameters": num_parameters(trainer.model)}), flush=True)
    return trainer.train()


def compare(run: Run, seeds: list[int], device: str) -> None:
    """Per seed: a distilled student, and two from scratch, one for as many steps and one for as long."""
    for seed in seeds:
        distilled = replace(run, seed=seed, out=run.out / f"distilled-{seed}")
        seconds = train_model(distilled, device)["train_s"]
        same_steps = replace(run, seed=seed, teacher=None, out=run.out / f"scratch-steps-{seed}")
        train_model(same_steps, device)
        same_time = replace(
            same_steps, num_steps=10**6, max_seconds=seconds, out=run.out / f"scratch-time-{seed}"
        )
        train_model(same_time, device)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="shop.train", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("tokenizer", help="train the tokenizer into examples/shop/tokenizer")
    for name in ("teacher", "student", "compare"):
        _add_run_arguments(commands.add_parser(name))
    scores = commands.add_parser("evaluate", help="score a model folder on held-out sheets")
    scores.add_argument("--model", type=Path, required=True)
    scores.add_argument("--per-kind", type=int, default=504)
    scores.add_argument("--seed", type=int, default=0)
    return parser


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--which", help="another shape than the command's own")
    parser.add_argument("--teacher", type=Path, help="distil from this folder; from scratch without it")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of compare")
    parser.add_argument("--compile", action="store_true")
    for name, field in Run.__dataclass_fields__.items():
        if type(field.default) in (int, float):
            parser.add_argument(
                "--" + name.replace("_", "-"), type=type(field.default), default=field.default
            )


def _run_of(arguments: argparse.Namespace) -> Run:
    values = {name: getattr(arguments, name) for name in Run.__dataclass_fields__}
    values["which"] = arguments.which or ("teacher" if arguments.command == "teacher" else "student")
    return Run(**values)


def main(argv: list[str] | None = None) -> None:
    arguments = _parser().parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")
    if arguments.command == "tokenizer":
        write_tokenizer()
    elif arguments.command == "evaluate":
        a = arguments
        print(json.dumps(evaluate_folder(a.model, a.per_kind, a.seed, device)), flush=True)
    elif arguments.command == "compare":
        compare(_run_of(arguments), arguments.seeds, device)
    else:
        run = _run_of(arguments)
        print(json.dumps({name: str(value) for name, value in asdict(run).items()}), flush=True)
        train_model(run, device)


if __name__ == "__main__":
    main()
