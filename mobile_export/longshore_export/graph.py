"""Builds the ONNX graph of a Llama-shaped decoder over a shared KV buffer.

The graph is put together operator by operator, so that each layer is nine to eleven kernels: one matrix
product for q, k and v, attention with RoPE inside, norms that add the residual. Owns the graph and its
names; reads no file and trains nothing.

    inputs   input_ids [1, tokens] int64        the new tokens
             rows [rows] int64                  which of them need logits (only the last, as a rule)
             seqlens_k [1] int32                tokens in the cache after this call, less one
             total_sequence_length [1] int32    tokens in the cache after this call
             past_key.N, past_value.N [1, kv_heads, max_tokens, head_dim] float32
    outputs  logits [rows, vocab] float32
             present_key.N, present_value.N     to be bound to the same buffers as past_*
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from longshore.errors import UnsupportedModelError
from longshore_export.graph_derive import derive_rows
from longshore_export.quantize import (
    BlockFormat,
    BlockWeights,
    DerivedFormat,
    RowFormat,
    RowWeights,
    WeightFormat,
    round_blocks,
    round_rows,
)
from longshore_export.quantize_recipe import FP32, Recipe
from longshore_export.shape import DecoderShape

OPSET = 18
CONTRIB_DOMAIN = "com.microsoft"
IR_VERSION = 9
MIN_ONNXRUNTIME = "1.24"
MAX_MODEL_BYTES = 1_900_000_000  # one protobuf file holds less than 2 GiB
INT8_ACTIVATIONS = 4  # MatMulNBits' accuracy_level: activations are rounded to int8, block by block

Array = NDArray[np.float32]
Weights = Mapping[str, Array]
Quantized = BlockWeights | RowWeights
Rounding = Callable[[str, Array, BlockFormat | RowFormat], Quantized]


def round_plainly(part: str, matrix: Array, form: BlockFormat | RowFormat) -> Quantized:
    """Each weight to the nearest step, whatever the part."""
    return round_rows(matrix) if isinstance(form, RowFormat) else round_blocks(matrix, form)


def build_graph(
    shape: DecoderShape,
    weights: Weights,
    cos: Array,
    sin: Array,
    recipe: Recipe = FP32,
    rounding: Rounding = round_plainly,
) -> onnx.ModelProto:
    """The whole model; `weights` by Hugging Face names, [out, in], `cos` and `sin` [positions, head_dim / 2].

    `rounding` makes the codes of a part ("layer0.qkv") from its matrix [out, in]. Raises
    UnsupportedModelError where the weights are not those of the shape, or don't fit into one file.
    """
    builder = _Builder(shape, weights, recipe, rounding)
    builder.constant("cos_cache", cos[: shape.max_tokens])
    builder.constant("sin_cache", sin[: shape.max_tokens])
    logits = builder.decoder()
    builder.node("Identity", [logits], ["logits"])
    return builder.model()


def required_operators(model: onnx.ModelProto) -> tuple[str, ...]:
    """The operators that a runtime needs, as `domain:name`, the standard domain left out."""
    names = {f"{node.domain}:{node.op_type}" if node.domain else node.op_type for node in model.graph.node}
    return tuple(sorted(names))


class _Builder:
    """Nodes and constants as they come; every method that computes returns the name of its result."""

    def __init__(self, shape: DecoderShape, weights: Weights, recipe: Recipe, rounding: Rounding) -> None:
        self._shape = shape
        self._weights = weights
        self._recipe = recipe
        self._rounding = rounding
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, onnx.TensorProto] = {}

    # --- pieces ---

    def node(
        self, operator: str, inputs: list[str], outputs: list[str], domain: str = "", **attributes: Any
    ) -> str:
        name = f"{operator}_{len(self._nodes)}"
        self._nodes.append(helper.make_node(operator, inputs, outputs, name, domain=domain, **attributes))
        return outputs[0]

    def constant(self, name: str, value: NDArray[Any]) -> str:
        if name not in self._constants:
            self._constants[name] = numpy_helper.from_array(np.ascontiguousarray(value), name)
        return name

    def weight(self, name: str) -> Array:
        try:
            return self._weights[name]
        except KeyError:
            raise UnsupportedModelError(f"the model has no weight {name}") from None

    def linear(self, source: str, out: str, names: list[str]) -> str:
        """`source` times one or several weights side by side, [out, in] each, and their biases if any."""
        matrix = np.concatenate([self.weight(f"{name}.weight") for name in names])
        bias = ""
        if f"{names[0]}.bias" in self._weights:
            bias = self.constant(
                f"{out}.bias", np.concatenate([self.weight(f"{name}.bias") for name in names])
            )
        return self.product(source, out, matrix, self._recipe.format_of(out), bias)

    def product(self, source: str, out: str, matrix: Array, form: WeightFormat, bias: str) -> str:
        """`source` [..., in] times `matrix` [out, in] in its format, plus `bias` unless that is ""."""
        if form is None:
            weight = self.constant(f"{out}.weight", matrix.T)
            plain = self.node("MatMul", [source, weight], [f"{out}.product" if bias else out])
            return self.node("Add", [plain, bias], [out]) if bias else plain
        if isinstance(form, DerivedFormat):
            weights = self._rounding(out, matrix, form.source)
            assert isinstance(weights, BlockWeights)
            names = derive_rows(self, out, weights)
            return self._row_node(source, out, names, bias)
        rounded = self._rounding(out, matrix, form)
        if isinstance(rounded, BlockWeights):
            return self.block_product(source, out, rounded, bias)
        return self.row_product(source, out, rounded, bias)

    def block_product(self, source: str, out: str, weights: BlockWeights, bias: str) -> str:
        codes, scales = self.block_constants(out, weights)
        return self.node(
            "MatMulNBits",
            [source, codes, scales, "", "", bias] if bias else [source, codes, scales],
            [out],
            domain=CONTRIB_DOMAIN,
            K=weights.num_inputs,
            N=len(weights.codes),
            bits=weights.format.bits,
            block_size=weights.format.block_size,
            accuracy_level=INT8_ACTIVATIONS,
        )

    def block_constants(self, part: str, weights: BlockWeights) -> tuple[str, str]:
        codes = self.constant(f"{part}.codes", weights.packed())
        return codes, self.constant(f"{part}.scales", weights.scales)

    def row_product(self, source: str, out: str, weights: RowWeights, bias: str) -> str:
        """Activations are rounded to bytes over the whole call, which is as much as MatMulInteger takes."""
        codes = self.constant(f"{out}.codes", weights.codes.T)
        scales = self.constant(f"{out}.scales", weights.scales)
        zero = self.constant(f"{out}.zero_points", np.zeros(len(weights.codes), np.int8))
        return self._row_node(source, out, (codes, scales, zero), bias)

    def _row_node(self, source: str, out: str, weights: tuple[str, str, str], bias: str) -> str:
        inputs = [source, *weights, *([bias] if bias else [])]
        return self.node("DynamicQuantizeMatMul", inputs, [out], domain=CONTRIB_DOMAIN)

    def norm(self, source: str, out: str, weight_name: str) -> str:
        gamma = self.constant(weight_name, self.weight(weight_name))
        epsilon = self._shape.rms_norm_eps
        return self.node("SimplifiedLayerNormalization", [source, gamma], [out], axis=-1, epsilon=epsilon)

    def add_and_norm(self, source: str, skip: str, out: str, weight_name: str) -> tuple[str, str]:
        """(norm of the sum, the sum): the residual connection and the next norm in one kernel."""
        gamma = self.constant(weight_name, self.weight(weight_name))
        self.node(
            "SkipSimplifiedLayerNormalization",
            [source, skip, gamma],
            [out, "", "", f"{out}.sum"],
            domain=CONTRIB_DOMAIN,
            epsilon=self._shape.rms_norm_eps,
        )
        return out, f"{out}.sum"

    # --- the decoder ---

    def decoder(self) -> str:
        residual = self.embedding()
        normed = self.norm(residual, "layer0.normed", "model.layers.0.input_layernorm.weight")
        last = self._shape.num_layers - 1
        for index in range(last + 1):
            name = f"model.layers.{index}"
            mixed = self.attention(index, normed)  # [1, tokens, q_size]
            if index == last:  # from here on only the rows that need logits are worth computing
                mixed = self.node("Gather", [mixed, "rows"], ["last.mixed"], axis=1)
                residual = self.node("Gather", [residual, "rows"], ["last.residual"], axis=1)
            attended = self.linear(mixed, f"layer{index}.o", [f"{name}.self_attn.o_proj"])
            normed, residual = self.add_and_norm(
                attended, residual, f"layer{index}.mlp_in", f"{name}.post_attention_layernorm.weight"
            )
            fed = self.feed_forward(index, normed)
            following = f"model.layers.{index + 1}.input_layernorm" if index < last else "model.norm"
            normed, residual = self.add_and_norm(fed, residual, f"layer{index}.out", f"{following}.weight")
        return self.head(normed)

    def embedding(self) -> str:
        """The rows [1, tokens, hidden] of the tokens' embeddings."""
        matrix, form = self.weight("model.embed_tokens.weight"), self._recipe.embedding
        if form is None:
            return self.node(
                "Gather", [self.constant("embedding", matrix), "input_ids"], ["embedded"], axis=0
            )
        if matrix.shape[1] % form.block_size:
            raise UnsupportedModelError(f"{matrix.shape[1]} inputs are not whole blocks of {form.block_size}")
        weights = self._rounding("embedding", matrix, form)
        assert isinstance(weights, BlockWeights)
        codes = self.constant("embedding.codes", weights.packed().reshape(len(matrix), -1))
        return self.node(
            "GatherBlockQuantized",
            [codes, "input_ids", self.constant("embedding.scales", weights.scales)],
            ["embedded"],
            domain=CONTRIB_DOMAIN,
            bits=form.bits,
            block_size=form.block_size,
            gather_axis=0,
            quantize_axis=1,
        )

    def attention(self, index: int, source: str) -> str:
        """Causal attention; the operator applies RoPE and writes the new keys and values into the cache."""
        name, shape = f"model.layers.{index}.self_attn", self._shape
        fused = self.linear(
            source, f"layer{index}.qkv", [f"{name}.q_proj", f"{name}.k_proj", f"{name}.v_proj"]
        )
        query, key, value = self.normed_heads(index, fused) if shape.has_qk_norm else (fused, "", "")
        past = [f"past_key.{index}", f"past_value.{index}"]
        present = [f"present_key.{index}", f"present_value.{index}"]
        return self.node(
            "GroupQueryAttention",
            [query, key, value, *past, "seqlens_k", "total_sequence_length", "cos_cache", "sin_cache"],
            [f"layer{index}.mixed", *present],
            domain=CONTRIB_DOMAIN,
            num_heads=shape.num_heads,
            kv_num_heads=shape.num_kv_heads,
            scale=shape.head_dim**-0.5,
            do_rotary=1,
            rotary_interleaved=0,
        )

    def normed_heads(self, index: int, fused: str) -> tuple[str, str, str]:
        """Qwen3's norm of every query and key head."""
        shape, prefix = self._shape, f"layer{index}"
        parts = [f"{prefix}.q", f"{prefix}.k", f"{prefix}.v"]
        sizes = self.constant("qkv_sizes", np.array([shape.q_size, shape.kv_size, shape.kv_size], np.int64))
        self.node("Split", [fused, sizes], parts, axis=-1)
        out = []
        for part, width in (("q", shape.q_size), ("k", shape.kv_size)):
            heads = self.constant(
                f"{part}_heads", np.array([0, -1, width // shape.head_dim, shape.head_dim], np.int64)
            )
            flat = self.constant(f"{part}_flat", np.array([0, -1, width], np.int64))
            split = self.node("Reshape", [f"{prefix}.{part}", heads], [f"{prefix}.{part}_by_head"])
            weight_name = f"model.layers.{index}.self_attn.{part}_norm.weight"
            normed = self.norm(split, f"{prefix}.{part}_normed", weight_name)
            out.append(self.node("Reshape", [normed, flat], [f"{prefix}.{part}_flat"]))
        return out[0], out[1], parts[2]

    def feed_forward(self, index: int, source: str) -> str:
        """Gate and up are two products: one for both has to be split again, which costs more than it saves."""
        name, prefix = f"model.layers.{index}.mlp", f"layer{index}"
        gate = self.linear(source, f"{prefix}.gate", [f"{name}.gate_proj"])
        up = self.linear(source, f"{prefix}.up", [f"{name}.up_proj"])
        silu = self.node(
            "QuickGelu", [gate], [f"{prefix}.silu"], domain=CONTRIB_DOMAIN, alpha=1.0
        )  # x * sigmoid(1.0 * x)
        gated = self.node("Mul", [silu, up], [f"{prefix}.gated"])
        return self.linear(gated, f"{prefix}.down", [f"{name}.down_proj"])

    def head(self, source: str) -> str:
        """Logits [rows, vocab]; a tied head shares the embedding's constant."""
        shape = self._shape
        flat = self.constant("head_shape", np.array([-1, shape.hidden_size], np.int64))
        rows = self.node("Reshape", [source, flat], ["head_in"])
        form = self._recipe.format_of("head")
        name = "model.embed_tokens.weight" if shape.is_tied else "lm_head.weight"
        if form is not None:
            return self.product(rows, "head", self.weight(name), form, "")
        table = "embedding" if shape.is_tied and self._recipe.embedding is None else "head.weight"
        return self.node("Gemm", [rows, self.constant(table, self.weight(name))], ["head"], transB=1)

    # --- the model ---

    def model(self) -> onnx.ModelProto:
        if sum(constant.ByteSize() for constant in self._constants.values()) > MAX_MODEL_BYTES:
            raise UnsupportedModelError("the weights are over 1.9 GB, more than one ONNX file holds")
        graph = helper.make_graph(
            self._nodes, "decoder", self._inputs(), self._outputs(), list(self._constants.values())
        )
        # onnx.checker is not asked: it does not know SimplifiedLayerNormalization, which ONNX Runtime keeps
        # in the standard domain. Making a session of the model is the check, and verify.py does so.
        return helper.make_model(
            graph,
            producer_name="longshore",
            ir_version=IR_VERSION,
            opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB_DOMAIN, 1)],
        )

    def _inputs(self) -> list[onnx.ValueInfoProto]:
        return [
            helper.make_tensor_value_info("input_ids", TensorProto.INT64, [1, "tokens"]),
            helper.make_tensor_value_info("rows", TensorProto.INT64, ["rows"]),
            helper.make_tensor_value_info("seqlens_k", TensorProto.INT32, [1]),
            helper.make_tensor_value_info("total_sequence_length", TensorProto.INT32, [1]),
            *self._cache("past"),
        ]

    def _outputs(self) -> list[onnx.ValueInfoProto]:
        logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["rows", self._shape.vocab_size])
        return [logits, *self._cache("present")]

    def _cache(self, when: str) -> list[onnx.ValueInfoProto]:
        shape = self._shape
        dims = [1, shape.num_kv_heads, shape.max_tokens, shape.head_dim]
        return [
            helper.make_tensor_value_info(f"{when}_{what}.{index}", TensorProto.FLOAT, dims)
            for index in range(shape.num_layers)
            for what in ("key", "value")
        ]
