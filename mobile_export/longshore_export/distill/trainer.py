"""The training loop of a distillation, on one device or on several through accelerate.

Owns steps, optimiser, checkpoints and the curve. Batches and losses are functions of the step alone, so that
a resumed run is the run that was cut off.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel

from longshore.errors import ConfigError
from longshore_export.distill import curves
from longshore_export.distill.checkpoint import load_checkpoint, read_meta, save_checkpoint
from longshore_export.distill.examples import Ahead, Examples
from longshore_export.distill.losses import Distiller
from longshore_export.distill.on_policy import Rows, write_rows
from longshore_export.distill.pair import load_pair
from longshore_export.distill.settings import DistillSettings
from longshore_export.distill.vocabulary import read_tokenizer, vocabulary_map

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json",
    "generation_config.json",
)  # fmt: skip
ADAM_BETAS = (0.9, 0.95)
MAX_GRADIENT_NORM = 1.0
Progress = Callable[[int, dict[str, float]], None]


class Lesson(nn.Module):
    """Student and losses as one module, so that gradients of both are averaged over the processes."""

    def __init__(self, student: PreTrainedModel, distiller: Distiller) -> None:
        super().__init__()
        self.student = student
        self.distiller = distiller

    def forward(
        self, input_ids: Tensor | None, labels: Tensor | None, progress: float, rows: Rows | None = None
    ) -> dict[str, Tensor]:
        """Losses of a batch, or of what the student wrote."""
        if rows is not None:
            return self.distiller.grade(rows)
        losses: dict[str, Tensor] = self.distiller(input_ids, None, labels, progress)
        return losses


class Trainer:
    """One run; raises ConfigError or UnsupportedModelError, in one line, before the first step."""

    def __init__(self, settings: DistillSettings, *, cpu: bool = False) -> None:
        # the maps of the hidden states get no gradient once their weight has fallen to nothing
        unused = DistributedDataParallelKwargs(find_unused_parameters=True)
        self.accelerator = Accelerator(cpu=cpu, kwargs_handlers=[unused])
        self.settings = settings
        self.step = 0
        self._device = self.accelerator.device
        dtype = torch.bfloat16 if self._device.type == "cuda" else torch.float32
        pair = load_pair(settings, dtype)
        self._tokenizer_folder = pair.tokenizer_folder
        self.student = pair.student.to(self._device)
        self._lesson = Lesson(self.student, self._distiller(pair.teacher))
        tokenizer = AutoTokenizer.from_pretrained(pair.tokenizer_folder, local_files_only=True)
        if tokenizer.eos_token_id is None:
            raise ConfigError(f"the tokenizer in {pair.tokenizer_folder} names no end-of-text token")
        self._end_id: int = tokenizer.eos_token_id
        self._pad_id: int = self._end_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        examples = Examples(settings.data, tokenizer, self._max_tokens())
        rank, num_ranks = self.accelerator.process_index, self.accelerator.num_processes
        self._batches = Ahead(examples, rank, num_ranks, settings.num_rows, settings.seed)
        optimiser = torch.optim.AdamW(self._lesson.parameters(), lr=settings.learning_rate, betas=ADAM_BETAS)
        self._wrapped, self._optimiser = self.accelerator.prepare(self._lesson, optimiser)
        settings.out.mkdir(parents=True, exist_ok=True)

    def _distiller(self, teacher: PreTrainedModel) -> Distiller:
        settings = self.settings
        ours, theirs = read_tokenizer(self._tokenizer_folder), read_tokenizer(settings.teacher)
        mapped = vocabulary_map(ours, theirs, self.student.config.vocab_size)
        try:
            distiller = Distiller(self.student, teacher.to(self._device), settings.weights, mapped)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        return distiller.to(self._device)

    def _max_tokens(self) -> int:
        teacher, student = self._lesson.distiller._teacher[0], self.student
        return min(
            self.settings.max_tokens,
            teacher.config.max_position_embeddings,
            student.config.max_position_embeddings,
        )

    # -- steps -------------------------------------------------------------------------------------

    def train(self, on_progress: Progress | None = None) -> Path:
        """Run to the end, from the checkpoint if there is one; returns the folder of the finished student."""
        self._resume()
        try:
            while self.step < self.settings.num_steps:
                losses = self._train_step()
                self._note(losses, on_progress)
                if self.step % self.settings.checkpoint_every == 0 or self.step == self.settings.num_steps:
                    self._checkpoint()
        finally:
            self._batches.close()
        return self._finish()

    def close(self) -> None:
        """Ends the process group, where there is one; no step can follow.

        A group that is left open can abort the exit by its threads. The reducer over it goes first: a group's
        last owner waits for those threads, a reducer with the interpreter's lock held, which they may need.
        """
        self._wrapped, self._optimiser = self.accelerator.free_memory(self._wrapped, self._optimiser)
        self.accelerator.end_training()

    def _train_step(self) -> dict[str, Tensor]:
        for group in self._optimiser.param_groups:
            group["lr"] = self.settings.learning_rate * self._rate()
        progress = self.step / self.settings.num_steps
        with self.accelerator.autocast():
            losses: dict[str, Tensor] = self._wrapped(*self._batch(), progress, self._rows())
        if not torch.isfinite(losses["total"]):
            raise ConfigError(
                f"the loss is {float(losses['total'])} in step {self.step}: lower learning_rate"
            )
        self.accelerator.backward(losses["total"])
        self.accelerator.clip_grad_norm_(self._lesson.parameters(), MAX_GRADIENT_NORM)
        self._optimiser.step()
        self._optimiser.zero_grad(set_to_none=True)
        self.step += 1
        return {name: loss.detach() for name, loss in losses.items()}

    def _rate(self) -> float:
        """Warm-up in a line, then down in a line to a tenth."""
        settings = self.settings
        if self.step < settings.warmup_steps:
            return (self.step + 1) / settings.warmup_steps
        rest = max(1, settings.num_steps - settings.warmup_steps)
        return 1.0 - 0.9 * (self.step - settings.warmup_steps) / rest

    def _batch(self) -> tuple[Tensor | None, Tensor | None]:
        if self._is_on_policy():
            return None, None
        batch = self._batches.batch(self.step)
        return batch.input_ids.to(self._device), batch.labels.to(self._device)

    def _rows(self) -> Rows | None:
        if not self._is_on_policy():
            return None
        prompts = self._batches.batch(self.step).prompts
        room = self.student.config.max_position_embeddings - max(map(len, prompts))
        num_new_tokens = max(1, min(self.settings.on_policy_tokens, room))
        seed = (self.settings.seed * 1_000_003 + self.step) * 1_009 + self.accelerator.process_index
        return write_rows(self.student, prompts, num_new_tokens, self._pad_id, self._end_id, seed % 2**63)

    def _is_on_policy(self) -> bool:
        """The same on every process, and the same when the step comes again after a resume."""
        settings = self.settings
        if self.step < settings.on_policy_from * settings.num_steps:
            return False
        share = settings.on_policy_share
        return int((self.step + 1) * share) > int(self.step * share)

    # -- what is kept ------------------------------------------------------------------------------

    @property
    def _checkpoint_path(self) -> Path:
        return self.settings.out / "checkpoint.safetensors"

    def _modules(self) -> dict[str, nn.Module]:
        return {"student": self.student, "maps": self._lesson.distiller}

    def _inner_optimiser(self) -> Any:
        return self._optimiser.optimizer

    def _note(self, losses: dict[str, Tensor], on_progress: Progress | None) -> None:
        if self.step % self.settings.log_every and self.step != self.settings.num_steps:
            return
        values = {name: float(self.accelerator.reduce(loss, "mean")) for name, loss in losses.items()}
        if not self.accelerator.is_main_process:
            return
        curves.append(self.settings.out / "curve.jsonl", {"step": self.step, "loss": values})
        if on_progress is not None:
            on_progress(self.step, values)

    def _checkpoint(self) -> None:
        if self.accelerator.is_main_process:
            meta = {"step": str(self.step), "settings": self._settings_digest()}
            save_checkpoint(self._checkpoint_path, self._modules(), [self._inner_optimiser()], meta)
        self.accelerator.wait_for_everyone()

    def _settings_digest(self) -> str:
        return f"{self.settings.digest}-{self.accelerator.num_processes}"

    def _resume(self) -> None:
        path = self._checkpoint_path
        if not path.exists():
            curves.cut(self.settings.out / "curve.jsonl", 0)
            return
        meta = read_meta(path)
        if meta.get("settings") != self._settings_digest():
            raise ConfigError(f"{path} is of a run with other settings: choose another --out, or remove it")
        load_checkpoint(path, self._modules(), [self._inner_optimiser()], str(self._device))
        self.step = int(meta["step"])
        if self.accelerator.is_main_process:
            curves.cut(self.settings.out / "curve.jsonl", self.step)

    def _finish(self) -> Path:
        folder = self.settings.out / "model"
        if self.accelerator.is_main_process:
            self.student.save_pretrained(folder)
            for name in TOKENIZER_FILES:
                if (self._tokenizer_folder / name).is_file():
                    shutil.copy(self._tokenizer_folder / name, folder / name)
            curves.draw(self.settings.out / "curve.jsonl", self.settings.out / "curve.svg")
        self.accelerator.wait_for_everyone()
        return folder
