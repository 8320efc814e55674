"""The first generation of an engine, before anyone waits for one: what loads or compiles lazily does so here.

It leaves nothing in the engine but the counters of its two short answers.
"""

from __future__ import annotations

import logging
import time
from typing import Any

from longshore_server.native.errors import NativeEngineError
from longshore_server.native.images import CHANNELS, ImageGeometry, ImageInput
from longshore_server.native.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

NUM_PROMPT_TOKENS = 16
NUM_ANSWER_TOKENS = 3
TENANT = "warm-up"  # its prefix is nobody else's


def warm_up(engine: Any) -> None:
    """Runs one greedy and one sampled request to their ends; the first shows an image where the model sees.

    An engine that can't is let off with a warning: each request will be told what is wrong with it.
    """
    started_s = time.monotonic()
    num_tokens = min(NUM_PROMPT_TOKENS, engine.max_model_len - NUM_ANSWER_TOKENS)
    prompt = [index % engine.vocab_size for index in range(max(1, num_tokens))]
    images = _images(engine.images)
    if images:
        prompt[0] = engine.images.image_token_id
    try:
        for name, temperature, top_p in (("greedy", 0.0, 1.0), ("sampled", 1.0, 0.9)):
            params = SamplingParams(
                max_tokens=NUM_ANSWER_TOKENS, temperature=temperature, top_p=top_p, ignore_eos=True
            )
            engine.add_request(f"warm-up-{name}", prompt, params, tenant=TENANT, images=images)
        failures = [output.error for output in _outputs(engine) if output.error is not None]
    except (NativeEngineError, RuntimeError) as error:
        failures = [str(error)]
        for name in ("greedy", "sampled"):
            engine.abort(f"warm-up-{name}")
    if failures:
        logger.warning("the engine's first generation failed: %s", failures[0])
    logger.info("warmed up in %.2f s", time.monotonic() - started_s)


def _images(geometry: ImageGeometry | None) -> list[ImageInput]:
    """The smallest image there is: one token's."""
    if geometry is None:
        return []
    side_px = geometry.unit_px
    return [ImageInput(side_px, side_px, bytes(side_px * side_px * CHANNELS))]


def _outputs(engine: Any) -> list[Any]:
    outputs: list[Any] = []
    while engine.has_unfinished():
        outputs += engine.step()
    return outputs
