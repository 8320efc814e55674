"""A Llama folder as a GGUF file with every matrix in Q4_0 or Q8_0, for scripts/bench_device.py.

Arguments: model folder, Q4_0 or Q8_0, file to write. Needs gguf, numpy and safetensors; no vocabulary is
written, since the benchmark speaks in token ids.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gguf
import numpy as np
from gguf.quants import quantize
from safetensors import safe_open

NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
ENDS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def renamed(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem in ENDS:
        return f"{ENDS[stem]}.weight"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[part]}.weight"


def interleaved(matrix: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of q or k in the order that llama.cpp's RoPE wants."""
    split = matrix.reshape(num_heads, 2, -1, matrix.shape[1])
    return split.swapaxes(1, 2).reshape(matrix.shape)


def write(folder: Path, form: gguf.GGMLQuantizationType, out: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(str(out), "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(2 if form == gguf.GGMLQuantizationType.Q4_0 else 7)
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(str(file), "np") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                array = tensors.get_tensor(name).astype(np.float32)
                if "q_proj" in name:
                    array = interleaved(array, config["num_attention_heads"])
                if "k_proj" in name:
                    array = interleaved(array, config["num_key_value_heads"])
                if array.ndim == 1:
                    writer.add_tensor(renamed(name), array)
                else:
                    writer.add_tensor(renamed(name), quantize(array, form), raw_dtype=form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    write(Path(sys.argv[1]), gguf.GGMLQuantizationType[sys.argv[2]], Path(sys.argv[3]))
