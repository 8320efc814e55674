"""Builds the ONNX graph of a Llama-shaped decoder over a shared KV buffer.

The graph is put together operator by operator, so that each layer is nine to eleven kernels: one matrix
product for q, k and v, attention with RoPE inside, norms that add the residual. Owns the graph and its
names; reads no file and trains nothing.

    inputs   input_ids [1, tokens] int64        the new tokens
             rows [rows] int64                  which of them need logits (only the last, as a rule)
             seqlens_k [1] int32                tokens in the cache after this call, less one
             total_sequence_length [1] int32    tokens in the cache after this call
             past_key.N, past_value.N [1, kv_heads, max_tokens, head_dim] float32
             image_features [image tokens, hidden] float32, of a model that sees: a row for each image token
                                              among the new ones, in order; too few stop the run, and with
                                              none at all the token is one like all
    outputs  logits [rows, vocab] float32
             present_key.N, present_value.N     to be bound to the same buffers as past_*
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper

from longshore.errors import UnsupportedModelError
from longshore_export.graph_parts import (
    CONTRIB_DOMAIN,
    MIN_ONNXRUNTIME,
    OPSET,
    Array,
    GraphParts,
    Quantized,
    Rounding,
    Weights,
    required_operators,
    round_plainly,
)
from longshore_export.quantize import BlockWeights
from longshore_export.quantize_recipe import FP32, Recipe
from longshore_export.shape import DecoderShape

__all__ = [
    "MIN_ONNXRUNTIME",
    "OPSET",
    "Quantized",
    "Rounding",
    "build_graph",
    "required_operators",
    "round_plainly",
]


def build_graph(
    shape: DecoderShape,
    weights: Weights,
    cos: Array,
    sin: Array,
    recipe: Recipe = FP32,
    rounding: Rounding = round_plainly,
    image_token_id: int | None = None,
) -> onnx.ModelProto:
    """The whole model; `weights` by Hugging Face names, [out, in], `cos` and `sin` [positions, head_dim / 2].

    `rounding` makes the codes of a part ("layer0.qkv") from its matrix [out, in]. With an `image_token_id`,
    pictures' features take the place of that token's embedding. Raises
    UnsupportedModelError where the weights are not those of the shape, or don't fit into one file.
    """
    builder = _Builder(shape, weights, recipe, rounding, image_token_id)
    builder.constant("cos_cache", cos[: shape.max_tokens])
    builder.constant("sin_cache", sin[: shape.max_tokens])
    logits = builder.decoder()
    builder.node("Identity", [logits], ["logits"])
    return builder.model()


class _Builder(GraphParts):
    """The decoder, of the parts."""

    def __init__(
        self,
        shape: DecoderShape,
        weights: Weights,
        recipe: Recipe,
        rounding: Rounding,
        image_token_id: int | None,
    ) -> None:
        super().__init__(weights, recipe, rounding)
        self._shape = shape
        self._image_token_id = image_token_id

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
        if self._image_token_id is not None:
            residual = self.with_pictures(residual, self._image_token_id)
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

    def with_pictures(self, embedded: str, image_token_id: int) -> str:
        """The embeddings, with the next row of `image_features` in place of each image token's.

        Row n goes to the n-th image token. Others look at a row of zeros before the first, which is dropped.
        Without any rows the token is one like all, as where the model itself has said it.
        """
        image_token = self.constant("image_token", np.array(image_token_id, np.int64))
        axis = self.constant("token_axis", np.array(1, np.int64))
        zeros = self.constant("no_picture", np.zeros((1, self._shape.hidden_size), np.float32))
        found = self.node("Equal", ["input_ids", image_token], ["is_image_token"])  # [1, tokens]
        num_rows = self.node("Shape", ["image_features"], ["picture.rows"], start=0, end=1)
        none = self.constant("no_rows", np.array([0], np.int64))
        is_image = self.node(
            "And", [found, self.node("Greater", [num_rows, none], ["picture.any"])], ["is_image"]
        )
        ones = self.node("Cast", [is_image], ["is_image.ones"], to=TensorProto.INT64)
        count = self.node("CumSum", [ones, axis], ["is_image.count"])
        row = self.node("Mul", [count, ones], ["picture.row"])
        table = self.node("Concat", [zeros, "image_features"], ["picture.table"], axis=0)
        shown = self.node("Gather", [table, row], ["picture.shown"], axis=0)
        last = self.constant("last_axis", np.array([-1], np.int64))
        where = self.node("Unsqueeze", [is_image, last], ["is_image.column"])
        return self.node("Where", [where, shown, embedded], ["embedded.whole"])

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
        """Gate and up are two products: one for both must be split again, which costs more than it saves."""
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
        return self.to_model("decoder", self._inputs(), self._outputs())

    def _inputs(self) -> list[onnx.ValueInfoProto]:
        return [
            helper.make_tensor_value_info("input_ids", TensorProto.INT64, [1, "tokens"]),
            helper.make_tensor_value_info("rows", TensorProto.INT64, ["rows"]),
            helper.make_tensor_value_info("seqlens_k", TensorProto.INT32, [1]),
            helper.make_tensor_value_info("total_sequence_length", TensorProto.INT32, [1]),
            *self._cache("past"),
            *self._pictures(),
        ]

    def _pictures(self) -> list[onnx.ValueInfoProto]:
        if self._image_token_id is None:
            return []
        dims = ["image_tokens", self._shape.hidden_size]
        return [helper.make_tensor_value_info("image_features", TensorProto.FLOAT, dims)]

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
