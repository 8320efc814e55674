"""`longshore export ...`; imports torch and onnx only when a command runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from longshore_export import distill_cli, gate_cli

if TYPE_CHECKING:
    from longshore.bundle import SigningKey


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the `export` command."""
    parser = subparsers.add_parser("export", help="make a model bundle for devices")
    actions = parser.add_subparsers(dest="action", required=True)
    student = actions.add_parser("student", help="export a Hugging Face folder to an ONNX bundle")
    student.add_argument("--model", type=Path, required=True, help="Hugging Face folder with safetensors")
    student.add_argument("--out", type=Path, required=True, help="bundle folder to write")
    student.add_argument("--name", help="name of the bundle; the model folder's by default")
    student.add_argument("--version", type=int, default=1, help="grows with each release (default: 1)")
    student.add_argument(
        "--variant",
        default="fp32",
        help="fp32, int8, mixed-b64, int4-b32, -b64 or -b128; built, those also with -p8 (default: fp32)",
    )
    student.add_argument(
        "--graph",
        choices=("built", "traced"),
        help="how the graph is made (default: built where the builder knows the model, else traced)",
    )
    student.add_argument(
        "--encoder",
        choices=("fp32", "int8"),
        help="the picture encoder of a model that sees (default: fp32, or what the gate takes)",
    )
    student.add_argument("--max-tokens", type=int, help="context on the device; the model's by default")
    student.add_argument(
        "--sign-key", type=Path, metavar="FILE", help="key file of `longshore bundle keygen`, or a bare seed"
    )
    student.add_argument("--key-id", help="id under which devices know a bare seed")
    gate_cli.add_arguments(student)
    student.set_defaults(run=_student)
    distill_cli.register(actions)


def _student(args: argparse.Namespace) -> int:
    from longshore.errors import ConfigError

    try:
        from longshore_export.bundle import export_student
        from longshore_export.graph import round_plainly
    except ImportError as error:
        raise ConfigError(
            f"export needs more packages ({error.name} is missing): install longshore[export]"
        ) from None
    verdict = gate_cli.choose(args)
    exported = export_student(
        args.model,
        args.out,
        name=args.name,
        version=args.version,
        max_tokens=args.max_tokens,
        signing_key=_signing_key(args),
        variant=verdict.chosen.candidate.wanted if verdict else args.variant,
        graph=args.graph,
        rounding=verdict.chosen.candidate.rounding if verdict else round_plainly,
        encoder=verdict.encoder if verdict else args.encoder or "fp32",
        capabilities=verdict.capabilities() if verdict else None,
    )
    manifest, parity = exported.manifest, exported.parity
    size_mb = sum(file.size_bytes for file in manifest.files) / 1e6
    variant = manifest.variants[0].name
    how = f"{variant}, {manifest.variants[0].graph}"
    print(f"{exported.path}: {manifest.name} {manifest.version}, {how}, {size_mb:.1f} MB")
    greedy = f", {parity.num_greedy_tokens} greedy tokens equal" if parity.num_greedy_tokens else ""
    print(
        f"parity with torch{_of(variant)}: logits within {parity.max_logit_difference:.1e} over "
        f"{parity.num_prompts} prompts{greedy}"
    )
    if exported.encoder_parity:
        seen = exported.encoder_parity
        print(
            f"encoder's parity with torch{_of(str(manifest.capabilities['encoder']))}: features within "
            f"{seen.max_difference:.1e} over {len(seen.sizes_px)} sizes"
        )
    return 0


def _of(variant: str) -> str:
    return "" if variant == "fp32" else " that rounds alike"


def _signing_key(args: argparse.Namespace) -> SigningKey | None:
    from longshore.bundle import read_signing_key

    return None if args.sign_key is None else read_signing_key(args.sign_key, args.key_id)
