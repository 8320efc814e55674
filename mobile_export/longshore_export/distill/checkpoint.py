"""Checkpoints of a training run as one safetensors file: modules, optimisers, and a few words of text.

No pickle. The old file stands until the new one is whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from longshore.errors import ConfigError


def save_checkpoint(
    path: Path, modules: Mapping[str, nn.Module], optimisers: Sequence[Optimizer], meta: Mapping[str, str]
) -> None:
    """Write everything that the rest of a run needs."""
    tensors = {
        f"{name}/{key}": tensor
        for name, module in modules.items()
        for key, tensor in module.state_dict().items()
    }
    for number, optimiser in enumerate(optimisers):
        for index, state in optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser/{number}/{index}/{name}": tensor for name, tensor in state.items()}
    part = path.with_suffix(".part")
    # tied weights share memory, which safetensors refuses to write twice
    save_file(
        {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}, part, dict(meta)
    )
    part.rename(path)


def read_meta(path: Path) -> dict[str, str]:
    """The text of a checkpoint; ConfigError where it can't be read."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"the checkpoint {path} can't be read: {error}") from None


def load_checkpoint(
    path: Path, modules: Mapping[str, nn.Module], optimisers: Sequence[Optimizer], device: str
) -> None:
    """Put a checkpoint's tensors back where they came from."""
    tensors = load_file(path, device=device)
    for name, module in modules.items():
        module.load_state_dict(_under(tensors, f"{name}/"))
    for number, optimiser in enumerate(optimisers):
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in _under(tensors, f"optimiser/{number}/").items():
            index, _, key = name.partition("/")
            state.setdefault(int(index), {})[key] = tensor
        optimiser.load_state_dict({**optimiser.state_dict(), "state": state})


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
