"""`longshore export student --gate`: its arguments, the candidates, and the table that it prints."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longshore.errors import ConfigError

if TYPE_CHECKING:
    from longshore_export.checkpoint import AnyCheckpoint, Checkpoint
    from longshore_export.gate import Candidate, Verdict
    from longshore_export.task import Example

MAX_CALIBRATION_EXAMPLES = 256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the gate needs beside the export's own arguments."""
    parser.add_argument(
        "--gate",
        type=float,
        metavar="POINTS",
        help="take the smallest variant that loses at most so many percent points on the task",
    )
    parser.add_argument("--task", type=Path, help="held-out JSONL of prompt or messages, and expected answer")
    parser.add_argument(
        "--calibrate", type=Path, metavar="FILE", help="JSONL of the same form, not held out, for GPTQ"
    )


def choose(args: argparse.Namespace) -> Verdict | None:
    """Run the gate and print its table, or None where `--gate` was not given."""
    if args.gate is None:
        return None
    if args.task is None:
        raise ConfigError("--gate needs --task, the examples to judge by")
    from longshore_export.chat_table import read_chat_template
    from longshore_export.checkpoint import open_checkpoint
    from longshore_export.gate import pass_gate
    from longshore_export.task import load_task

    checkpoint = open_checkpoint(args.model, args.max_tokens, args.graph)
    template = read_chat_template(args.model)
    tokenizer = _tokenizer(args.model)
    vision = checkpoint.vision.shape if checkpoint.vision else None
    task = load_task(args.task, tokenizer, template, vision)
    known = load_task(args.calibrate, tokenizer, template, vision) if args.calibrate else []
    with tempfile.TemporaryDirectory(prefix="longshore-gate-") as work:
        candidates = _candidates(checkpoint, tokenizer, known)
        verdict = pass_gate(checkpoint, tokenizer, task, candidates, args.gate, Path(work))
    print(verdict.table())
    return verdict


def _candidates(checkpoint: AnyCheckpoint, tokenizer: Any, known: list[Example]) -> list[Candidate]:
    """Every variant rounded plainly, and by calibration where there is any; fp32 first."""
    from longshore_export.checkpoint import TracedCheckpoint
    from longshore_export.gate import Candidate
    from longshore_export.graph import round_plainly
    from longshore_export.quantize_gptq import GptqRounding, measure_moments
    from longshore_export.quantize_mixed import mixed_by_layer
    from longshore_export.quantize_recipe import RECIPES

    if isinstance(checkpoint, TracedCheckpoint):
        if known:
            raise ConfigError("--calibrate is for built graphs alone; this model's is traced")
        return [Candidate(name, "rtn", round_plainly) for name, it in RECIPES.items() if not it.has_prefill]
    out = [Candidate(name, "rtn", round_plainly) for name in RECIPES]
    if known:
        texts = [
            _calibration_text(checkpoint, tokenizer, example) for example in known[:MAX_CALIBRATION_EXAMPLES]
        ]
        gptq = GptqRounding(measure_moments(checkpoint.model, texts))
        mixed = mixed_by_layer(checkpoint.model, texts, gptq)
        out += [
            Candidate(name, "gptq", gptq) for name, recipe in RECIPES.items() if recipe.precision == "int4"
        ]
        out.append(Candidate(mixed.name, "gptq", gptq, mixed))
    return out


def _calibration_text(checkpoint: Checkpoint, tokenizer: Any, example: Example) -> Any:
    """Prompt and answer as token ids; as embeddings, where there are pictures."""
    from longshore_export.vision.task import embedded

    ids = [*example.prompt, *tokenizer.encode(example.expected, add_special_tokens=False).ids]
    if checkpoint.vision is None or not example.pictures:
        return ids
    return embedded(checkpoint.vision, ids, example.pictures)


def _tokenizer(model_dir: Path) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(model_dir / "tokenizer.json"))
