"""Tensor parallelism over a plain model: which slice of each weight a rank holds, and where ranks meet.

The plan is the model's own (`config.base_model_tp_plan` and the head's `_tp_plan`). It loads no weights and
starts no process; after Megatron-LM (arXiv 1909.08053).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from longshore_server.native.errors import ConfigError, UnsupportedModelError
from longshore_server.native.gemm.multiply import Gemm
from longshore_server.native.model.fp8 import ScaledOutput
from longshore_server.native.model.fused_ops import Rows
from longshore_server.native.model.products import Product, make_product
from longshore_server.native.ranks.links import RankLinks

FIELD = "tensor_parallel_size"
KV_PROJECTIONS = ("k_proj", "v_proj")
REPLICATED_STYLES = {"replicate", "replicated_with_grad_allreduce"}
SHARDED_STYLES = {"colwise", "rowwise", "colwise_gather_output", "embedding_rowwise"}


@dataclass(frozen=True, slots=True)
class Slice:
    """Rows or columns `start` to `stop` of a whole weight; a rank pads them with zeros to `size`."""

    dim: int
    start: int
    stop: int
    size: int

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        """A view where nothing has to be padded."""
        part = whole.narrow(self.dim, self.start, self.stop - self.start)
        return self.padded(part)

    def padded(self, part: torch.Tensor) -> torch.Tensor:
        missing = self.size - part.shape[self.dim]
        if not missing:
            return part
        shape = [*part.shape]
        shape[self.dim] = missing
        return torch.cat([part, part.new_zeros(shape)], dim=self.dim)


class TensorParallelPlan:
    """Styles of a model's modules by name; raises UnsupportedModelError or ConfigError where none fits."""

    def __init__(self, model: nn.Module, hf_config: Any, rank: int, num_ranks: int) -> None:
        check_heads(hf_config, num_ranks)
        self._num_kv_heads: int = hf_config.num_key_value_heads
        self.rank = rank
        self.num_ranks = num_ranks
        patterns = _patterns(model, hf_config)
        self.styles: dict[str, str] = {}
        for name, module in model.named_modules():
            style = next((style for pattern, style in patterns if pattern.fullmatch(name)), None)
            if style is not None and style not in REPLICATED_STYLES:
                _check_style(name, module, style, hf_config.model_type)
                self.styles[name] = style

    def slice_of(self, parameter_name: str, shape: torch.Size) -> Slice | None:
        """What this rank holds of a parameter of the whole model; None when all of it.

        A row-wise layer's bias is whole on every rank: it is added once, after the sum.
        """
        module_name, _, kind = parameter_name.rpartition(".")
        style = self.styles.get(module_name)
        if style is None or (style == "rowwise" and kind == "bias"):
            return None
        if style == "rowwise":
            return self._even(parameter_name, 1, shape[1])
        if style in ("colwise_gather_output", "embedding_rowwise"):
            return self._ragged(shape[0])
        if module_name.rpartition(".")[2] in KV_PROJECTIONS and self._num_kv_heads < self.num_ranks:
            return self._one_kv_head(shape[0])
        return self._even(parameter_name, 0, shape[0])

    def _even(self, name: str, dim: int, total: int) -> Slice:
        if total % self.num_ranks:
            raise ConfigError(FIELD, f"{self.num_ranks} does not divide the {total} of {name}")
        size = total // self.num_ranks
        return Slice(dim, self.rank * size, (self.rank + 1) * size, size)

    def _ragged(self, total: int) -> Slice:
        """Rows of a vocabulary, which need not divide: the last ranks are padded."""
        size = -(-total // self.num_ranks)
        return Slice(0, min(self.rank * size, total), min((self.rank + 1) * size, total), size)

    def _one_kv_head(self, total: int) -> Slice:
        """Fewer KV heads than ranks: each stands on several ranks, beside the query heads that read it."""
        size = total // self._num_kv_heads
        head = self.rank * self._num_kv_heads // self.num_ranks
        return Slice(0, head * size, (head + 1) * size, size)


def check_heads(hf_config: Any, num_ranks: int) -> None:
    """Raises ConfigError, in one line, unless the heads can be shared out evenly."""
    num_heads = hf_config.num_attention_heads
    num_kv_heads = getattr(hf_config, "num_key_value_heads", None) or num_heads
    if num_heads % num_ranks:
        raise ConfigError(FIELD, f"{num_ranks} does not divide the model's {num_heads} attention heads")
    if num_kv_heads % num_ranks and num_ranks % num_kv_heads:
        raise ConfigError(FIELD, f"{num_ranks} and the model's {num_kv_heads} KV heads do not divide evenly")


def _patterns(model: nn.Module, hf_config: Any) -> list[tuple[re.Pattern[str], str]]:
    base_plan = getattr(hf_config, "base_model_tp_plan", None)
    if not base_plan:
        raise UnsupportedModelError(f"{hf_config.model_type} has no tensor-parallel plan of its own")
    prefix = getattr(model, "base_model_prefix", "model")
    plan = {f"{prefix}.{name}": style for name, style in base_plan.items()} | dict(type(model)._tp_plan or {})
    return [(re.compile(re.escape(name).replace(r"\*", r"\d+")), style) for name, style in plan.items()]


def _check_style(name: str, module: nn.Module, style: str, model_type: str) -> None:
    kind = nn.Embedding if style == "embedding_rowwise" else nn.Linear
    if style not in SHARDED_STYLES or type(module) is not kind:
        words = f"its plan shards {name} ({type(module).__name__}) as {style}, which is not known here"
        raise UnsupportedModelError(f"{model_type} cannot run tensor parallel: {words}")


# --- where the ranks meet ---


def connect(model: nn.Module, plan: TensorParallelPlan, links: RankLinks, names: Iterable[str]) -> None:
    """Wraps those of the named modules that need the other ranks; their weights must be in place."""
    for name in names:
        style = plan.styles[name]
        module = model.get_submodule(name)
        if style == "rowwise":
            model.set_submodule(name, RowParallel(module, links))
        elif style == "colwise_gather_output":
            model.set_submodule(name, GatheredColumns(module, links, _whole_rows(module)))
        elif style == "embedding_rowwise":
            model.set_submodule(name, ShardedEmbedding(module, links))


def _whole_rows(linear: nn.Module) -> int:
    return int(linear.whole_rows)  # type: ignore[arg-type]


class RowParallel(nn.Module):
    """A linear layer whose inputs are spread over the ranks: partial products are added up."""

    def __init__(self, linear: nn.Module, links: RankLinks) -> None:
        super().__init__()
        self.bias, linear.bias = linear.bias, None  # type: ignore[assignment]
        self.linear = linear
        self._links = links

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        output = self._links.add_up(self.linear(inputs))
        return output if self.bias is None else output + self.bias

    def as_product(self, to_fp8: bool, gemm: Gemm) -> Product:
        """The same between the operations of a fused layer; it takes the layer's weights over."""
        dtype: torch.dtype = self.linear.weight.dtype  # type: ignore[assignment,union-attr]
        return RowParallelProduct(make_product([self.linear], to_fp8, gemm), dtype, self._links, self.bias)


class RowParallelProduct(nn.Module):
    """A product over one rank's inputs, added up over all ranks. What comes out has no scales.

    In FP8 a rank scales its own part of each row and its own part of each output channel's weights, so its
    partial product is multiplied out before it meets the others'.
    """

    def __init__(self, inner: Product, dtype: torch.dtype, links: RankLinks, bias: Any) -> None:
        super().__init__()
        self.inner = inner
        self.bias = bias
        self._dtype = dtype
        self._links = links

    @property
    def takes_fp8(self) -> bool:  # type: ignore[override]
        return self.inner.takes_fp8

    def forward(self, rows: Rows) -> ScaledOutput:
        output = self._links.add_up(multiply_out(self.inner(rows), self._dtype))
        return ScaledOutput(output if self.bias is None else output + self.bias)


def multiply_out(product: ScaledOutput, dtype: torch.dtype) -> torch.Tensor:
    """The plain tensor [tokens, channels]; on a GPU in one kernel."""
    if product.values.is_cuda and (product.row_scales is not None or product.num_parts > 1):
        from longshore_server.native.model import triton_resolve  # triton is on GPUs only

        return triton_resolve.resolve(product, dtype)
    return product.resolve(dtype)


class GatheredColumns(nn.Module):
    """A linear layer whose outputs are computed in slices and laid side by side; padding is cut off."""

    def __init__(self, linear: nn.Module, links: RankLinks, out_features: int) -> None:
        super().__init__()
        self.linear = linear
        self.out_features = out_features
        self._links = links

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self._links.gather_columns(self.linear(inputs))[..., : self.out_features]


class ShardedEmbedding(nn.Module):
    """A token table whose rows are spread over the ranks: each adds the rows that it holds."""

    def __init__(self, table: nn.Module, links: RankLinks) -> None:
        super().__init__()
        self.table = table
        self._links = links

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        size = self.table.weight.shape[0]  # type: ignore[union-attr]
        local = token_ids - self._links.rank * size
        is_here = (local >= 0) & (local < size)
        rows = self.table(local.clamp(0, size - 1)) * is_here[..., None]  # type: ignore[operator]
        return self._links.add_up(rows)
