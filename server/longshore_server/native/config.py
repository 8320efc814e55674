"""The engine's settings: one frozen dataclass, checked when made. It reads no file and no environment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from longshore_server.native.attention.sparsity import Sparsity, parse_sparsity
from longshore_server.native.checks import check_float, check_int
from longshore_server.native.errors import ConfigError
from longshore_server.native.offload.spec import parse_kv_swap

LOAD_FORMATS = ("auto", "random")
KV_CACHE_DTYPES = ("auto", "fp8")
CPU_TOKEN_BUDGET = 512
GPU_TOKEN_BUDGET = 8192  # a GPU is busy from some hundred tokens on; long prompts then take few steps
DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTIZATIONS = ("none", "fp8")
PLACEMENTS = ("tensor_parallel", "attention_feed_forward")
MAX_RANKS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Settings of one engine; raises ConfigError naming the first wrong one.

    `load_format` "random" needs a config.json alone and fills the weights from `seed`. The KV cache has
    `num_kv_blocks` blocks of `block_size` tokens, or as many as `kv_memory_bytes` holds; with neither, enough
    for every running sequence, within a bound, or on a GPU what `gpu_memory_fraction` of its memory leaves
    beside the weights; `kv_cache_dtype` "fp8" halves a block. `max_num_batched_tokens` of None is 512 on a
    CPU and 8192 on a GPU. `itl_target_ms` bounds the time between two tokens of an answer: a step that
    decodes takes in only so much of other prompts as is predicted to fit. `max_model_len` of None takes the
    model's own limit.
    In batch-invariant mode an answer does not depend, to the last bit, on its neighbours in the batch, on
    chunking or on a resume; None takes it where it costs little, which is on a CPU in float32. One GPU has it
    too, for fused layers in 16 bits or FP8, but only if it is asked for.
    `quantization` "fp8" keeps the layers' weights in FP8 with a scale per output channel, and computes with
    activations in FP8 with a scale per token; embeddings, norms and head stay in `dtype`. `fuse_layers` None
    fuses the layers of known architectures on a GPU, and everywhere with FP8; on a CPU in float32 it runs
    them as compiled code where the machine has a C compiler, and False is torch alone. `gemm_plans` takes
    matrix products from tables of measured ones, where there is one for the GPU and the shape.
    `attention_sparsity` is "dense", or what a generated token sees of a long context (see Sparsity).
    `kv_swap` names memories for KV blocks that the device has no room for, fastest first: ("host:32GiB",
    "file:/mnt/nvme/kv:256GiB"); a file's folder must exist and the file must not. Sizes are of all ranks
    together.
    `tensor_parallel_size` ranks, each its own process, share every layer; with `placement`
    "attention_feed_forward" there are two instead, one with the attention and one with the feed-forward
    blocks. Device "cuda" gives each rank its own GPU; a numbered one is shared by all ranks, for trying out.
    """

    model: str
    load_format: Literal["auto", "random"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantization: Literal["none", "fp8"] = "none"
    fuse_layers: bool | None = None
    gemm_plans: bool = True
    device: str = "cpu"
    block_size: int = 16
    num_kv_blocks: int | None = None
    kv_memory_bytes: int | None = None
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"
    gpu_memory_fraction: float = 0.95
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int | None = None
    itl_target_ms: float | None = None
    max_num_waiting: int = 1024
    enable_prefix_cache: bool = True
    batch_invariant: bool | None = None
    attention_sparsity: str = "dense"
    kv_swap: tuple[str, ...] = ()
    seed: int = 0
    tensor_parallel_size: int = 1
    placement: Literal["tensor_parallel", "attention_feed_forward"] = "tensor_parallel"

    def __post_init__(self) -> None:
        if not self.model:
            raise ConfigError("model", "must name a model folder")
        _check_choice("load_format", self.load_format, LOAD_FORMATS)
        _check_choice("dtype", self.dtype, DTYPES)
        _check_choice("kv_cache_dtype", self.kv_cache_dtype, KV_CACHE_DTYPES)
        if self.kv_cache_dtype != "auto" and self.placement != "tensor_parallel":
            words = f"{self.kv_cache_dtype} cannot be had with placement {self.placement}"
            raise ConfigError("kv_cache_dtype", words)
        _check_choice("quantization", self.quantization, QUANTIZATIONS)
        self._check_quantization()
        _check_choice("placement", self.placement, PLACEMENTS)
        self._check_numbers()
        if self.tensor_parallel_size > 1 and self.placement != "tensor_parallel":
            raise ConfigError("placement", f"{self.placement} has two ranks: tensor_parallel_size must be 1")
        if self.token_budget < self.max_num_seqs:
            raise ConfigError(
                "max_num_batched_tokens",
                f"{self.token_budget} is below max_num_seqs {self.max_num_seqs}: "
                "a step must hold one token of every running sequence",
            )
        if self.num_kv_blocks is not None and self.kv_memory_bytes is not None:
            raise ConfigError("num_kv_blocks", "give num_kv_blocks or kv_memory_bytes, not both")
        parse_kv_swap(self.kv_swap)
        if self.sparsity is not None and self.batch_invariant:
            raise ConfigError("batch_invariant", "cannot be had with attention_sparsity")
        if self.batch_invariant and not (self.may_be_batch_invariant or self.has_invariant_kernels):
            words = "is available on the CPU in float32, and on one GPU with fused layers in 16 bits or FP8"
            raise ConfigError("batch_invariant", words)

    @property
    def sparsity(self) -> Sparsity | None:
        """What `attention_sparsity` says; None for dense."""
        return parse_sparsity(self.attention_sparsity)

    @property
    def fuses_layers(self) -> bool:
        """Whether layers are fused where the architecture is known."""
        if self.fuse_layers is not None:
            return self.fuse_layers
        return self.placement == "tensor_parallel" and (self.device != "cpu" or self.quantization != "none")

    @property
    def num_ranks(self) -> int:
        return self.tensor_parallel_size if self.placement == "tensor_parallel" else 2

    @property
    def token_budget(self) -> int:
        """Tokens in one step."""
        if self.max_num_batched_tokens is not None:
            return self.max_num_batched_tokens
        return max(CPU_TOKEN_BUDGET if self.device == "cpu" else GPU_TOKEN_BUDGET, self.max_num_seqs)

    @property
    def may_be_compiled(self) -> bool:
        """Whether a known architecture's steps may be compiled code, where there is a compiler."""
        return self.fuse_layers is None and self.num_ranks == 1 and self.may_be_batch_invariant

    @property
    def may_be_batch_invariant(self) -> bool:
        is_exact = self.device == "cpu" and self.dtype in ("auto", "float32") and not self.fuses_layers
        is_exact = is_exact and self.quantization == "none" and self.kv_cache_dtype == "auto"
        return is_exact and self.sparsity is None

    @property
    def has_invariant_kernels(self) -> bool:
        """Whether a GPU is asked to compute each row with kernels that are the same in every batch."""
        is_16_bits = self.dtype in ("auto", "bfloat16", "float16")
        is_one_gpu = self.device.startswith("cuda") and self.num_ranks == 1
        return bool(self.batch_invariant) and is_one_gpu and is_16_bits and self.fuses_layers

    def _check_quantization(self) -> None:
        if self.fuse_layers and self.placement != "tensor_parallel":
            raise ConfigError("fuse_layers", f"cannot be had with placement {self.placement}")
        if self.quantization == "none":
            return
        if self.dtype == "float16" or (self.dtype == "float32" and self.device != "cpu"):
            raise ConfigError("quantization", f"{self.quantization} computes in bfloat16, not {self.dtype}")

    def _check_numbers(self) -> None:
        check_int(ConfigError, "block_size", self.block_size, 1, 1024)
        check_int(ConfigError, "max_num_seqs", self.max_num_seqs, 1, 4096)
        check_float(ConfigError, "gpu_memory_fraction", self.gpu_memory_fraction, 0.0, 1.0, open_low=True)
        if self.itl_target_ms is not None:
            check_float(ConfigError, "itl_target_ms", self.itl_target_ms, 0.0, 1e6, open_low=True)
        check_int(ConfigError, "max_num_waiting", self.max_num_waiting, 0, 1 << 20)
        check_int(ConfigError, "tensor_parallel_size", self.tensor_parallel_size, 1, MAX_RANKS)
        check_int(ConfigError, "seed", self.seed, 0, 2**63 - 1)
        if self.max_num_batched_tokens is not None:
            check_int(ConfigError, "max_num_batched_tokens", self.max_num_batched_tokens, 1, 1 << 20)
        for name in ("num_kv_blocks", "kv_memory_bytes", "max_model_len"):
            if (value := getattr(self, name)) is not None:
                check_int(ConfigError, name, value, 1)


def _check_choice(field: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(field, f"must be one of {', '.join(choices)}, got {value!r}")
