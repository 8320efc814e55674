"""The optimisers and learning-rate schedule of the Shop recipe: Muon for matrices, AdamW for the rest.

Muon orthogonalises the momentum of each weight matrix (Jordan et al. 2024). torch.optim.Muon does it matrix
by matrix; here all matrices of one shape go through one batched product, which small models need.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5


def orthogonalise(matrices: Tensor) -> Tensor:
    """[n, rows, columns] to the nearest orthogonal matrices, roughly, in bf16."""
    a, b, c = NEWTON_SCHULZ
    x = matrices.bfloat16()
    tall = x.size(-2) > x.size(-1)
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum over 2-D parameters; one parameter group per shape."""

    def __init__(
        self, parameters: list[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.01
    ):
        by_shape: dict[torch.Size, list[nn.Parameter]] = {}
        for parameter in parameters:
            by_shape.setdefault(parameter.shape, []).append(parameter)
        groups = [{"params": same} for same in by_shape.values()]
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            parameters = group["params"]
            gradients = torch.stack([parameter.grad for parameter in parameters])
            state = self.state[parameters[0]]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(gradients)
            momentum = state["momentum"].lerp_(gradients, 1 - group["momentum"])
            updates = orthogonalise(gradients.lerp(momentum, group["momentum"])).to(gradients.dtype)
            rows, columns = updates.shape[-2:]
            scale = group["lr"] * max(1.0, rows / columns) ** 0.5
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(parameters, list(updates.unbind()), alpha=-scale)


def make_optimisers(modules: list[nn.Module], muon_lr: float, adam_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside decoder layers, AdamW for embeddings, norms and projections."""
    named = [item for module in modules for item in module.named_parameters() if item[1].requires_grad]
    matrices = [p for name, p in named if p.ndim == 2 and ".layers." in name]
    chosen = {id(p) for p in matrices}
    rest = [p for _, p in named if id(p) not in chosen]
    on_gpu = rest[0].is_cuda
    return [
        Muon(matrices, lr=muon_lr),
        torch.optim.AdamW(rest, lr=adam_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=on_gpu),
    ]


def lr_factor(step: int, progress: float, warmup_steps: int, decay_fraction: float) -> float:
    """Warm up, hold, then fall in a line to a hundredth over the last `decay_fraction` of the run."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return min(1.0, max(0.01, (1.0 - progress) / decay_fraction))
