"""A random model of Qwen2-0.5B's shape through export, quantization, signing, installation and an answer.

    python scripts/whole_life.py --work FOLDER [--small] [--variant int4-b64]

Prints size, seconds and peak memory of each part, each in a process of its own. `--small` takes a few layers
of the same form, for a look in seconds.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

SHAPE = {
    "vocab_size": 151_936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "eos_token_id": 1,
    "bos_token_id": None,
}
SMALL = {"num_hidden_layers": 2, "vocab_size": 8192}
SHOP = Path(__file__).parent.parent / "examples/shop/tokenizer"
MIB = 1024 * 1024


def draw(folder: Path, small: bool) -> None:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    Qwen2ForCausalLM(Qwen2Config(**SHAPE | (SMALL if small else {}))).save_pretrained(folder)
    for file in SHOP.iterdir():
        if file.suffix == ".json":
            (folder / file.name).write_bytes(file.read_bytes())


def export(work: Path, variant: str) -> None:
    from longshore.signing import PrivateKey
    from longshore_export.bundle import SigningKey, export_student

    key = PrivateKey.generate()
    (work / "public").write_text(key.public_key.text)
    export_student(work / "model", work / "bundle", variant=variant, signing_key=SigningKey("ops", key))


def install(work: Path) -> None:
    from longshore.bundle import install as install_bundle
    from longshore.signing import PublicKey

    installed = install_bundle(
        work / "bundle", work / "store", trusted_keys={"ops": PublicKey((work / "public").read_text())}
    )
    (work / "installed").write_text(str(installed))


def answer(work: Path) -> None:
    """Load the installed student and have it write 32 tokens; prints what the model process took."""
    from longshore.device import DeviceSettings, Student
    from longshore.wire import TokenEvent, decode_completion_request

    settings = DeviceSettings(memory_limit_bytes=4096 * MIB, start_timeout_s=600)
    with Student((work / "installed").read_text(), settings=settings) as student:
        measured = student.calibration
        assert measured is not None
        prompt = [number % 900 + 5 for number in range(256)]
        body = {"model": "s", "prompt": prompt, "max_tokens": 32, "temperature": 0, "ignore_eos": True}
        began_s = time.perf_counter()
        events = list(student.stream(decode_completion_request(body)))
        took_s = time.perf_counter() - began_s
        told = sum(isinstance(event, TokenEvent) for event in events)
        status = Path(f"/proc/{student.process_id}/status").read_text()
    peak_kib = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    print(
        f"  load {measured.load_s:.1f} s, prefill {measured.prefill_tokens_per_s:.0f} and decode "
        f"{measured.decode_tokens_per_s:.0f} tokens/s, 256 + {told} tokens in {took_s:.1f} s, "
        f"peak of the model process {peak_kib / 1024:.0f} MiB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--variant", default="int4-b64")
    parser.add_argument("--part", choices=("draw", "export", "install", "answer"))
    args = parser.parse_args()
    if args.part:
        parts = {
            "draw": lambda: draw(args.work / "model", args.small),
            "export": lambda: export(args.work, args.variant),
            "install": lambda: install(args.work),
            "answer": lambda: answer(args.work),
        }
        parts[args.part]()
        return
    args.work.mkdir(parents=True, exist_ok=True)
    for part in ("draw", "export", "install", "answer"):
        begin_s = time.perf_counter()
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--part", part], check=True)
        peak_mib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        print(f"{part}: {time.perf_counter() - begin_s:.1f} s, peak so far {peak_mib:.0f} MiB")
    manifest = json.loads((args.work / "bundle/manifest.json").read_text())
    print(f"bundle: {sum(file['size_bytes'] for file in manifest['files']) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
