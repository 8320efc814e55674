"""`longshore export distill`: settings from flags, a progress bar, and where the student lies."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from pathlib import Path
from typing import Any

from longshore.errors import ConfigError

_HELP = {
    "teacher": "folder of the large model",
    "student": "the student's config.json, or a folder with one",
    "data": "training text: JSONL with text, prompt and answer, or messages",
    "out": "folder for the student, its checkpoint and its curve; a run there is resumed",
    "start": "the student's first weights: random, layer-drop or weights (default: random)",
}


def register(actions: Any) -> None:
    """Add `distill` to the actions of `longshore export`."""
    parser = actions.add_parser("distill", help="train a small student of a large teacher")
    for name, text in _HELP.items():
        flag = "--" + name
        if name == "start":
            parser.add_argument(
                flag, choices=("random", "layer-drop", "weights"), default="random", help=text
            )
        else:
            parser.add_argument(flag, type=Path, required=True, help=text)
    # the settings module needs torch, which only a run should load; so numbers pass as they are typed
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="another setting, such as num_steps=5000",
    )
    parser.add_argument("--cpu", action="store_true", help="leave an accelerator unused")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Distil; 0 when the student is written."""
    try:
        from longshore_export.distill.settings import DistillSettings
        from longshore_export.distill.trainer import Trainer
    except ImportError as error:
        raise ConfigError(
            f"distillation needs more packages ({error.name} is missing): install longshore[export]"
        ) from None
    given = {name: getattr(args, name) for name in _HELP}
    settings = DistillSettings(**given, **_parse(args.set, DistillSettings))
    trainer = Trainer(settings, cpu=args.cpu)
    folder = _train(trainer)
    if trainer.accelerator.is_main_process:
        print(f"the student is in {folder}, its curve in {settings.out / 'curve.svg'}")
    trainer.close()
    return 0


def _train(trainer: Any) -> Path:
    from tqdm import tqdm

    shown = trainer.accelerator.is_main_process
    with tqdm(total=trainer.settings.num_steps, unit="step", disable=not shown) as bar:

        def show(step: int, losses: dict[str, float]) -> None:
            bar.update(step - bar.n)
            bar.set_postfix({name: f"{value:.3g}" for name, value in losses.items()})

        folder: Path = trainer.train(show)
    return folder


def _parse(items: list[str], settings: type) -> dict[str, Any]:
    """NAME=VALUE items as the settings' own types; ConfigError naming the first wrong one."""
    types = typing.get_type_hints(settings)
    known = {f.name for f in dataclasses.fields(settings)} - _HELP.keys()
    values: dict[str, Any] = {}
    for item in items:
        name, equals, text = item.partition("=")
        if not equals or name not in known:
            raise ConfigError(f"--set {item}: NAME=VALUE with one of {', '.join(sorted(known))}")
        try:
            values[name] = types[name](text)
        except ValueError:
            raise ConfigError(f"--set {item}: {name} takes a number") from None
    return values
