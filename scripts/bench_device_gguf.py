"""A Llama folder as a GGUF file with every matrix in Q4_0, Q8_0 or F16, for scripts/bench_device*.py.

Arguments: model folder, format, file to write. Needs gguf and numpy; no vocabulary is written, since the
benchmarks speak in token ids.
"""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
from gguf.quants import quantize

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


FILE_TYPES = {
    "F16": gguf.LlamaFileType.MOSTLY_F16,
    "Q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
    "Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}


def tensors(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of the safetensors files in float32; bf16 is the upper half of a float32."""
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        for name, entry in json.loads(data[8 : 8 + length]).items():
            if name == "__metadata__":
                continue
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            if entry["dtype"] == "BF16":
                wide = np.frombuffer(data[begin:end], "<u2").astype(np.uint32) << 16
            else:
                assert entry["dtype"] == "F32", f"{name} is {entry['dtype']}"
                wide = np.frombuffer(data[begin:end], "<u4")
            yield name, wide.view(np.float32).reshape(entry["shape"])


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
    writer.add_file_type(FILE_TYPES[form.name])
    for name, tensor in tensors(folder):
        array = tensor
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
