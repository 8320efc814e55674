"""The ONNX Runtime session of a built graph, over one KV buffer that it owns.

Knows tokens and logits, neither text nor requests. Runs in the model process; onnxruntime is imported here
and only when a session is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longshore.errors import BundleIncompatibleError
from longshore.wire import KvGeometry

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class DecoderSession:
    """One model and its cache of keys and values, which the graph reads and writes in place."""

    def __init__(self, model_path: Path, kv: KvGeometry, num_threads: int) -> None:
        import numpy as np
        import onnxruntime

        self._np = np
        self._ort = onnxruntime
        self.max_tokens = kv.max_tokens
        self._session = onnxruntime.InferenceSession(
            str(model_path), _options(onnxruntime, num_threads), providers=["CPUExecutionProvider"]
        )
        self._check_interface(kv)
        self.vocab_size = int(self._session.get_outputs()[0].shape[1])
        self._cache = self._allocate(kv)
        self._scalars: dict[str, NDArray[Any]] = {
            "rows": np.zeros(1, np.int64),
            "seqlens_k": np.zeros(1, np.int32),
            "total_sequence_length": np.zeros(1, np.int32),
        }
        self._logits = np.zeros((1, self.vocab_size), np.float32)
        self._next = np.zeros((1, 1), np.int64)
        self._decode_binding = self._bind(self._next)

    def forward(self, token_ids: Sequence[int], num_past: int) -> NDArray[np.float32]:
        """Compute `token_ids` after the first `num_past` tokens of the cache; the last one's logits [vocab].

        The array is the session's own and is overwritten by the next call.
        """
        total = num_past + len(token_ids)
        if not 0 < len(token_ids) <= total <= self.max_tokens:
            raise ValueError(f"{num_past} + {len(token_ids)} tokens do not fit into {self.max_tokens}")
        if len(token_ids) == 1:
            self._next[0, 0] = token_ids[0]
            binding = self._decode_binding
        else:
            binding = self._bind(self._np.array([token_ids], self._np.int64))
        self._scalars["rows"][0] = len(token_ids) - 1
        self._scalars["seqlens_k"][0] = total - 1
        self._scalars["total_sequence_length"][0] = total
        self._session.run_with_iobinding(binding)
        logits: NDArray[np.float32] = self._logits[0]
        return logits

    def _check_interface(self, kv: KvGeometry) -> None:
        inputs = {item.name: item.shape for item in self._session.get_inputs()}
        cache = [1, kv.num_kv_heads, kv.max_tokens, kv.head_dim]
        needed = {"input_ids", "rows", "seqlens_k", "total_sequence_length", *_cache_names("past", kv)}
        if set(inputs) != needed or any(inputs[name] != cache for name in _cache_names("past", kv)):
            raise BundleIncompatibleError("the graph's inputs are not those that this runtime feeds")

    def _allocate(self, kv: KvGeometry) -> dict[str, Any]:
        """The buffers by input and output name; a past and its present are one memory."""
        shape = (1, kv.num_kv_heads, kv.max_tokens, kv.head_dim)
        cache: dict[str, Any] = {}
        for past, present in zip(_cache_names("past", kv), _cache_names("present", kv), strict=True):
            value = self._ort.OrtValue.ortvalue_from_numpy(self._np.zeros(shape, self._np.float32))
            cache[past] = cache[present] = value
        return cache

    def _bind(self, input_ids: NDArray[np.int64]) -> Any:
        """A binding that reads and writes our own arrays, so that a step copies nothing."""
        binding = self._session.io_binding()
        wrap = self._ort.OrtValue.ortvalue_from_numpy
        binding.bind_ortvalue_input("input_ids", wrap(input_ids))
        for name, array in self._scalars.items():
            binding.bind_ortvalue_input(name, wrap(array))
        binding.bind_ortvalue_output("logits", wrap(self._logits))
        for name, value in self._cache.items():
            bind = binding.bind_ortvalue_input if name.startswith("past") else binding.bind_ortvalue_output
            bind(name, value)
        binding.longshore_arrays = input_ids  # the binding points into the array and must not outlive it
        return binding


def _options(onnxruntime: Any, num_threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    options.enable_mem_pattern = False  # prompts differ in length
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # an idle app stays idle
    return options


def _cache_names(when: str, kv: KvGeometry) -> list[str]:
    return [f"{when}_{what}.{layer}" for layer in range(kv.num_layers) for what in ("key", "value")]
