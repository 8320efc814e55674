"""From settings to a runner: loads the model, learns its KV geometry, sizes the cache, picks the attention.

It runs once, when an engine is made, and knows nothing of requests.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedModel

from longshore_server.native.attention.backend import select_attention
from longshore_server.native.attention.kv_cache import KVScales, LayerGeometry, PagedKVCache, block_bytes
from longshore_server.native.attention.kv_scales import load_scales, measure_scales, random_prompts
from longshore_server.native.attention.page_bounds import PageBounds, bounds_bytes
from longshore_server.native.attention.probe import probe_geometries
from longshore_server.native.config import EngineConfig
from longshore_server.native.cpu.compiled import load_library
from longshore_server.native.cpu.decoder import CompiledDecoder, can_compile
from longshore_server.native.cpu.runner import CpuRunner
from longshore_server.native.errors import ConfigError, ModelLoadError, UnsupportedModelError
from longshore_server.native.gpu.graphs import CAPTURING
from longshore_server.native.images import ImageGeometry
from longshore_server.native.kv_memory import fit_model_len, num_kv_blocks
from longshore_server.native.model import cpu_linear
from longshore_server.native.model.fuse import FusedDecoder
from longshore_server.native.model.load import LoadedModel, load_model
from longshore_server.native.model.vision import ImageFeatures
from longshore_server.native.offload.kv_offload import KVOffload
from longshore_server.native.offload.shard_store import ShardStore
from longshore_server.native.offload.spec import parse_kv_swap
from longshore_server.native.offload.tiers import open_tiers
from longshore_server.native.offload.units import unit_bytes
from longshore_server.native.ranks.links import RankLinks
from longshore_server.native.runner import ModelRunner, Runner

if TYPE_CHECKING:  # triton is on GPUs only
    from longshore_server.native.gpu.rehearsal import Rehearsal
    from longshore_server.native.gpu.runner import GpuRunner

# Torch computes activation functions in vectors of up to so many elements, and what is left at the end of a
# tensor in another way, which may round otherwise.
VECTOR_ELEMENTS = 32


@dataclass(frozen=True, slots=True)
class BuiltModel:
    """A runner that is ready to step, and the limits that requests are checked against."""

    runner: Runner
    num_kv_blocks: int
    max_model_len: int
    vocab_size: int
    eos_token_ids: frozenset[int]
    batch_invariant: bool
    page_bounds: PageBounds | None = None
    offload: KVOffload | None = None  # of the first rank, with `kv_swap`
    shard_store: ShardStore | None = None  # of the other ranks
    images: ImageGeometry | None = None  # None where the model does not see


def build(config: EngineConfig, links: RankLinks | None = None) -> BuiltModel:
    """Raises ConfigError, ModelLoadError or UnsupportedModelError, each with one line.

    With `links` it builds one rank's share; all ranks build at the same time.
    """
    if torch.device(config.device).type != "cuda":
        return _build(config, links)
    with CAPTURING:  # random weights are drawn, and memory is counted, when no other engine captures
        return _build(config, links)


def _build(config: EngineConfig, links: RankLinks | None) -> BuiltModel:
    device = torch.device(config.device)
    loaded, geometries = _load(config, links)
    dtype = loaded.model.dtype
    compiled = _compile(loaded, config, geometries)
    if compiled is None:
        batch_invariant = _make_invariant(loaded.model, config, geometries)
    else:
        batch_invariant = config.batch_invariant is not False
    kv_dtype = _kv_dtype(config, dtype)
    bytes_per_block = block_bytes(geometries, config.block_size, kv_dtype)
    bytes_per_block += bounds_bytes(geometries, _ranked_layers(config, len(geometries)), kv_dtype)
    num_blocks = num_kv_blocks(config, loaded, bytes_per_block, has_gpu=links is None or links.is_nccl)
    if links is not None:
        num_blocks = links.smallest(num_blocks)
    max_model_len = fit_model_len(config, loaded.max_model_len, num_blocks * config.block_size)
    cache = PagedKVCache(geometries, num_blocks, config.block_size, kv_dtype, device)
    if kv_dtype == torch.float8_e4m3fn:
        cache.scales = _kv_scales(config, loaded, geometries, device, links)
    bounds = _page_bounds(config, cache)
    features = None if loaded.tower is None else ImageFeatures(loaded.tower)
    if compiled is not None:
        compiled.attach(cache)
        runner: Runner = CpuRunner(compiled, features)
    elif device.type == "cuda" and config.placement == "tensor_parallel":
        runner = _gpu_runner(config, loaded.model, cache, max_model_len, bounds, features, links)
        if links is not None and not links.is_nccl:
            runner.stay_eager()
    else:
        attention = select_attention(
            device,
            batch_invariant=batch_invariant,
            sparsity=config.sparsity,
            bounds=bounds,
            fp8_cache=kv_dtype == torch.float8_e4m3fn,
        )
        runner = ModelRunner(loaded.model, cache, device, attention, features, config.sparsity)
    offload, shard_store = _open_swap(config, cache, bounds, links)
    return BuiltModel(
        runner=runner,
        page_bounds=bounds,
        offload=offload,
        shard_store=shard_store,
        num_kv_blocks=num_blocks,
        max_model_len=max_model_len,
        vocab_size=loaded.vocab_size,
        eos_token_ids=loaded.eos_token_ids,
        batch_invariant=batch_invariant,
        images=None if features is None else features.geometry,
    )


def _load(config: EngineConfig, links: RankLinks | None) -> tuple[LoadedModel, list[LayerGeometry]]:
    """The model, which has shown that it computes a token, and what its layers' KV looks like."""
    device = torch.device(config.device)
    is_rehearsed = device.type == "cuda" and links is None
    with _rehearsal(config, device) if is_rehearsed else nullcontext() as rehearsal:
        loaded = load_model(config, links, None if rehearsal is None else rehearsal.begin)
        decoder = getattr(loaded.model, "model", None)
        try:
            if rehearsal is not None and rehearsal.has_begun and isinstance(decoder, FusedDecoder):
                rehearsal.finish()
                return loaded, decoder.kv_geometries
            return loaded, probe_geometries(loaded.model, loaded.num_layers, device)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{config.model} is not supported: {error}") from error
        except Exception as error:
            words = f"{type(error).__name__}: {error}"
            raise ModelLoadError(f"{config.model} fails on its first token: {words}") from error


def _rehearsal(config: EngineConfig, device: torch.device) -> Rehearsal:
    from longshore_server.native.gpu.rehearsal import Rehearsal

    return Rehearsal(device, partial(_rehearsing_runner, config))


def _rehearsing_runner(config: EngineConfig, model: PreTrainedModel, num_tokens: int) -> GpuRunner:
    """For a model of few layers: as the engine's own, but that it captures and warms nothing."""
    decoder = model.model
    assert isinstance(decoder, FusedDecoder)
    num_blocks = -(-num_tokens // config.block_size)
    device, kv_dtype = torch.device(config.device), _kv_dtype(config, model.dtype)
    cache = PagedKVCache(decoder.kv_geometries, num_blocks, config.block_size, kv_dtype, device)
    max_model_len = config.max_model_len or model.config.get_text_config().max_position_embeddings
    runner = _gpu_runner(config, model, cache, max_model_len, _page_bounds(config, cache))
    runner.stay_eager()
    return runner


def _gpu_runner(
    config: EngineConfig,
    model: PreTrainedModel,
    cache: PagedKVCache,
    max_model_len: int,
    bounds: PageBounds | None,
    features: ImageFeatures | None = None,
    links: RankLinks | None = None,
) -> GpuRunner:
    from longshore_server.native.gpu.launchers import compile_launchers_fast
    from longshore_server.native.gpu.runner import GpuRunner

    compile_launchers_fast()
    return GpuRunner(
        model,
        cache,
        config.max_num_seqs,
        max_model_len,
        features,
        on_ranks=links is not None,
        batch_invariant=config.has_invariant_kernels,
        sparsity=config.sparsity,
        bounds=bounds,
    )


def _kv_dtype(config: EngineConfig, dtype: torch.dtype) -> torch.dtype:
    return torch.float8_e4m3fn if config.kv_cache_dtype == "fp8" else dtype


def _page_bounds(config: EngineConfig, cache: PagedKVCache) -> PageBounds | None:
    if config.sparsity is None:
        return None
    return PageBounds(cache, _ranked_layers(config, len(cache.keys)))


def _ranked_layers(config: EngineConfig, num_layers: int) -> set[int]:
    """Those whose pages are ranked by their bounds."""
    sparsity = config.sparsity
    if sparsity is None or not sparsity.top_pages:
        return set()
    return set(range(num_layers)) - sparsity.dense_layers


def _open_swap(
    config: EngineConfig, cache: PagedKVCache, bounds: PageBounds | None, links: RankLinks | None
) -> tuple[KVOffload | None, ShardStore | None]:
    """The first rank's books and store, or another rank's store; neither without `kv_swap`."""
    tiers = parse_kv_swap(config.kv_swap)
    if not tiers:
        return None, None
    shared = links if config.placement == "tensor_parallel" else None  # else one rank has all of the KV
    is_cuda = cache.device.type == "cuda"
    memories = open_tiers(tiers, unit_bytes(cache), pinned=is_cuda, links=shared)
    if links is None or links.rank == 0:
        return KVOffload(cache, memories, bounds), None
    return None, ShardStore(cache, memories, bounds)


def _kv_scales(
    config: EngineConfig,
    loaded: LoadedModel,
    geometries: list[LayerGeometry],
    device: torch.device,
    links: RankLinks | None,
) -> list[KVScales]:
    """Those beside the model, or measured now on random prompts."""
    rank, num_ranks = (0, 1) if links is None else (links.rank, links.num_ranks)
    num_heads = [geometry.num_kv_heads for geometry in geometries]
    scales = load_scales(Path(config.model), num_heads, device, rank=rank, num_ranks=num_ranks)
    if scales is None:
        prompts = random_prompts(loaded.vocab_size, loaded.max_model_len, config.seed)
        scales = measure_scales(loaded.model, device, prompts)
    return scales


def _compile(
    loaded: LoadedModel, config: EngineConfig, geometries: list[LayerGeometry]
) -> CompiledDecoder | None:
    """On a CPU in float32, the model as compiled kernels run it, if they know it and a compiler is there."""
    if not config.may_be_compiled or not can_compile(loaded.model, geometries):
        return None
    library = load_library()
    return None if library is None else CompiledDecoder(library, loaded.model, loaded.max_model_len)


def _make_invariant(model: PreTrainedModel, config: EngineConfig, geometries: list[LayerGeometry]) -> bool:
    """On a CPU in float32, packs the linear layers; says whether the batch-invariant passes are to be used.

    On a GPU the model has been built for it already.
    Raises ConfigError when the mode was asked for and cannot be had.
    """
    if not config.may_be_batch_invariant:
        return config.has_invariant_kernels
    is_packed = (
        cpu_linear.is_available() and cpu_linear.pack_linears(model) > 0 and not _has_other_products(model)
    )
    inner_width = (getattr(model.config, "intermediate_size", None) or 0) // config.tensor_parallel_size
    if inner_width % VECTOR_ELEMENTS:
        if config.batch_invariant:
            words = f"an inner width of {inner_width} is no multiple of {VECTOR_ELEMENTS}"
            raise ConfigError("batch_invariant", f"cannot be had: {words}")
        return False
    if is_packed and all(g.key_dim == g.value_dim for g in geometries):
        return config.batch_invariant is not False
    if config.batch_invariant:
        if _has_other_products(model):
            raise ConfigError("batch_invariant", "cannot be had: not every matrix product is a linear layer")
        reason = "keys and values differ in size" if is_packed else "torch has no packed kernels for this CPU"
        raise ConfigError("batch_invariant", f"cannot be had: {reason}")
    return False


def _has_other_products(model: PreTrainedModel) -> bool:
    """Whether matrices are left outside of packed layers and embeddings, like those of routed experts."""
    return any(
        parameter.dim() > 1
        for module in model.modules()
        if not isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
    )
