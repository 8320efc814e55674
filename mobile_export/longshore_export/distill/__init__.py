"""Distillation: a large teacher guides a small student. `losses` says how, `trainer` runs it."""

from longshore_export.distill.losses import (
    Distiller,
    DistillWeights,
    hidden_states,
    layer_map,
    soft_target_loss,
)

__all__ = ["DistillWeights", "Distiller", "hidden_states", "layer_map", "soft_target_loss"]
