"""How much memory the KV cache gets: as many blocks as were asked for, or as fit beside weights and steps."""

from __future__ import annotations

import torch

from longshore_server.native.config import EngineConfig
from longshore_server.native.errors import ConfigError
from longshore_server.native.gpu.graphs import buckets_up_to
from longshore_server.native.gpu.mixed_steps import shapes_of
from longshore_server.native.model.load import LoadedModel

DEFAULT_KV_MEMORY_BYTES = 512 * 1024 * 1024
GPU_WORKSPACE_BYTES = 1024 * 1024 * 1024  # cuBLAS, Triton, the nodes of captured graphs


def num_kv_blocks(config: EngineConfig, loaded: LoadedModel, bytes_per_block: int, *, has_gpu: bool) -> int:
    """What was asked for, or what fits; raises ConfigError where that is nothing.

    `has_gpu`: no other rank shares the device, if that is a GPU.
    """
    if config.num_kv_blocks is not None:
        return config.num_kv_blocks
    if config.kv_memory_bytes is not None:
        num_blocks = config.kv_memory_bytes // bytes_per_block
        if num_blocks == 0:
            raise ConfigError("kv_memory_bytes", f"is less than one block of {bytes_per_block} bytes")
        return num_blocks
    if torch.device(config.device).type == "cuda" and has_gpu:
        return _num_gpu_blocks(config, loaded, bytes_per_block)
    num_wanted = config.max_num_seqs * -(-loaded.max_model_len // config.block_size)
    return max(1, min(num_wanted, DEFAULT_KV_MEMORY_BYTES // bytes_per_block))


def _num_gpu_blocks(config: EngineConfig, loaded: LoadedModel, bytes_per_block: int) -> int:
    """What the configured share of the GPU's memory holds beside weights and a step's activations."""
    torch.cuda.empty_cache()
    num_free, num_total = torch.cuda.mem_get_info(torch.device(config.device))
    kept_free = int((1 - config.gpu_memory_fraction) * num_total)
    num_bytes = num_free - kept_free - _step_bytes(config, loaded)
    if num_bytes < bytes_per_block:
        raise ConfigError(
            "gpu_memory_fraction", f"{config.gpu_memory_fraction} leaves no memory for KV beside the weights"
        )
    return num_bytes // bytes_per_block


def _step_bytes(config: EngineConfig, loaded: LoadedModel) -> int:
    """A bound of what a step needs beside weights and KV: a layer's activations, logits in two forms, and the
    logits that each captured shape keeps.
    """
    model_config = loaded.model.config
    hidden = getattr(model_config, "hidden_size", 4096)
    inner = getattr(model_config, "intermediate_size", None) or 4 * hidden
    layer_bytes = config.token_budget * (8 * hidden + 4 * inner) * 2
    buckets = buckets_up_to(config.max_num_seqs)
    num_captured = sum(buckets) + sum(shape.num_kept for shape in shapes_of(buckets[-1], tile_rows=1))
    logits_bytes = (8 * config.max_num_seqs + 2 * num_captured) * loaded.vocab_size
    return layer_bytes + logits_bytes + GPU_WORKSPACE_BYTES


def fit_model_len(config: EngineConfig, max_model_len: int, num_kv_tokens: int) -> int:
    """The longest sequence that the KV cache can hold alone; a length that was asked for must fit."""
    if config.max_model_len is not None and config.max_model_len > num_kv_tokens:
        raise ConfigError(
            "max_model_len", f"{config.max_model_len} exceeds the KV cache's {num_kv_tokens} tokens"
        )
    return min(max_model_len, num_kv_tokens)
