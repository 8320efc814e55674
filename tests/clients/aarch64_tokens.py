"""Greedy tokens of chats by the device's own session and loop, in this process: JSON in, JSON out.

`test_aarch64.py` runs it under an emulator, where starting the student's child process is not possible.
"""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path

import onnxruntime

from longshore.bundle import load_bundle
from longshore.device.generate import GeneratedToken, Generator, Job
from longshore.device.sampling import SamplingSettings
from longshore.device.session import DecoderSession
from longshore.device.text import StudentText
from longshore.wire import decode_chat_request


def main() -> None:
    job = json.load(sys.stdin)
    bundle = Path(job["bundle"])
    manifest = load_bundle(bundle)
    text = StudentText(bundle, manifest)
    session = DecoderSession(bundle / manifest.variants[0].file, manifest.kv, num_threads=1)
    generator = Generator(session, prefill_chunk_tokens=256)
    answers = []
    for chat in job["chats"]:
        request = decode_chat_request({"model": "shop", "messages": chat})
        made: list[GeneratedToken] = []
        generator.run(
            Job(
                prompt=text.prompts(request)[0],
                generated=(),
                max_tokens=job["num_tokens"],
                stop_token_ids=manifest.eos_token_ids,
                sampling=SamplingSettings(temperature=0.0),
            ),
            made.append,
            lambda: False,
        )
        answers.append([token.sampled.token_id for token in made])
    print(
        json.dumps(
            {"answers": answers, "machine": platform.machine(), "onnxruntime": onnxruntime.__version__}
        )
    )


if __name__ == "__main__":
    main()
