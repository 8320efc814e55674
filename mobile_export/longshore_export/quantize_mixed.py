"""Mixed precision by layer: what of a model keeps 8 bits, chosen by what 4 bits there would change.

Measures on calibration texts how far the next token's distribution moves when one piece alone is rounded to
4 bits, a layer, the embedding or the head. The pieces that move it most for their size keep 8 bits. Rounds as
it is told to; writes no graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from longshore_export.graph import Rounding
from longshore_export.quantize import BlockFormat
from longshore_export.quantize_emulate import PARTS, emulate
from longshore_export.quantize_recipe import BYTE_BLOCK, Recipe

SHARE = 0.25  # of the weights, which may keep 8 bits
BLOCK = 64
MAX_TEXTS = 16
MAX_ROWS = 32  # of a text, counted from its end: a large vocabulary makes long rows

Text: TypeAlias = Sequence[int] | Tensor  # token ids, or embeddings [tokens, hidden]
_FOUR, _EIGHT, _SMALL_FOUR = BlockFormat(4, BLOCK), BlockFormat(8, BYTE_BLOCK), BlockFormat(4, BYTE_BLOCK)


def mixed_by_layer(model: Any, texts: Sequence[Text], rounding: Rounding, share: float = SHARE) -> Recipe:
    """The recipe `layers-b64` of a model in fp32: 4 bits, and 8 for at most `share` of its weights."""
    sizes, moved = piece_sizes(model), piece_divergences(model, texts, rounding)
    left = share * sum(sizes.values())
    kept = set()
    for piece in sorted(sizes, key=lambda piece: moved[piece] / sizes[piece], reverse=True):
        if sizes[piece] <= left:
            kept.add(piece)
            left -= sizes[piece]
    return Recipe(
        f"layers-b{BLOCK}",
        "int4",
        linear=_FOUR,
        head=_EIGHT if "head" in kept else _FOUR,
        embedding=_EIGHT if "embedding" in kept else _SMALL_FOUR,
        exceptions={f"{piece}.{part}": _EIGHT for piece in sorted(kept & _layers(model)) for part in PARTS},
    )


def piece_sizes(model: Any) -> dict[str, int]:
    """Weights of each piece: `embedding`, `head`, `layerN`."""
    sizes = {"embedding": model.model.embed_tokens.weight.numel(), "head": model.lm_head.weight.numel()}
    for index, layer in enumerate(model.model.layers):
        sizes[f"layer{index}"] = sum(
            getattr(getattr(layer, place), name).weight.numel()
            for place, names in PARTS.values()
            for name in names
        )
    return sizes


@torch.no_grad()
def piece_divergences(model: Any, texts: Sequence[Text], rounding: Rounding) -> dict[str, float]:
    """KL(fp32 || one piece in 4 bits) of each piece, in nats a token."""
    chosen = texts[:: -(-len(texts) // MAX_TEXTS)]  # from all of it: such files go from kind to kind
    plain = [_log_probabilities(model, text) for text in chosen]
    return {
        piece: divergence(plain, emulate(model, _alone(piece), rounding), chosen)
        for piece in piece_sizes(model)
    }


@torch.no_grad()
def divergence(plain: Sequence[Tensor], rounded: Any, texts: Sequence[Text]) -> float:
    """Mean KL over the rows of all texts; `plain` are the log probabilities of the model that was rounded."""
    total, num_rows = 0.0, 0
    for theirs, text in zip(plain, texts, strict=True):
        ours = _log_probabilities(rounded, text)
        total += float(F.kl_div(ours, theirs, log_target=True, reduction="sum"))
        num_rows += len(theirs)
    return total / num_rows


def _log_probabilities(model: Any, text: Text) -> Tensor:
    """[rows, vocab] of the last tokens of a text."""
    if isinstance(text, Tensor):
        logits = model(inputs_embeds=text[None]).logits
    else:
        logits = model(torch.tensor([list(text)])).logits
    return F.log_softmax(logits[0, -MAX_ROWS:].float(), dim=-1)


def _alone(piece: str) -> Recipe:
    """Everything in fp32 but one piece."""
    if piece == "embedding":
        return Recipe(piece, "int4", embedding=_SMALL_FOUR)
    if piece == "head":
        return Recipe(piece, "int4", head=_FOUR)
    return Recipe(piece, "int4", exceptions={f"{piece}.{part}": _FOUR for part in PARTS})


def _layers(model: Any) -> set[str]:
    return {f"layer{index}" for index in range(len(model.model.layers))}
