"""The counter-based noise: fixed for ever, uniform, and independent across seeds, positions and tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from longshore.seeds import row_keys
from longshore_server.native.randomness import gumbel_noise

PINNED_NOISE = [-0.8044097, -0.0340566, 1.8253622, 1.1693069]


def _uniform(keys: list[tuple[int, int]], num_tokens: int) -> np.ndarray:
    noise = gumbel_noise(torch.tensor(keys), torch.arange(num_tokens)[None])
    return np.exp(-np.exp(-noise.double().numpy()))  # the Gumbel distribution's own function


def test_noise_never_changes() -> None:
    """Answers in flight survive an upgrade only while these values stay."""
    noise = gumbel_noise(torch.tensor([row_keys(42, 7)]), torch.tensor([[0, 1, 2, 299]]))
    assert noise[0].tolist() == pytest.approx(PINNED_NOISE, abs=1e-6)


@pytest.mark.parametrize(
    "keys",
    [
        [row_keys(seed, 0) for seed in range(300)],
        [row_keys(5, position) for position in range(300)],
        [row_keys(2**64 - 1 - seed, seed) for seed in range(300)],
    ],
    ids=["seeds", "positions", "both"],
)
def test_noise_is_uniform_and_independent(keys) -> None:
    uniform = _uniform(keys, 200)  # [300, 200]
    counts = np.histogram(uniform, bins=50, range=(0, 1))[0]
    chi_square = ((counts - uniform.size / 50) ** 2 / (uniform.size / 50)).sum()
    assert chi_square < 49 + 5 * np.sqrt(98)
    centred = uniform - 0.5
    for other in (np.roll(centred, 1, 0), np.roll(centred, 1, 1), np.roll(centred, (1, 1), (0, 1))):
        correlation = (centred * other).mean() / (1 / 12)
        assert abs(correlation) < 5 / np.sqrt(uniform.size)


def test_a_token_keeps_its_noise_in_any_subset_and_order() -> None:
    keys = torch.tensor([row_keys(1, 2), row_keys(3, 4)])
    whole = gumbel_noise(keys, torch.arange(1000)[None])
    some = torch.tensor([[999, 0, 17], [5, 999, 1]])
    assert torch.equal(gumbel_noise(keys, some), whole.gather(1, some))
    assert torch.isfinite(whole).all()
