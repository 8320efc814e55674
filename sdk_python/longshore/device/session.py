"""The ONNX Runtime session of a graph, built or traced, over one KV buffer that it owns.

Knows tokens and logits, neither text nor requests. Runs in the model process; onnxruntime is imported here
and only when a session is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longshore.errors import BundleIncompatibleError
from longshore.wire import KvGeometry, VisionGeometry

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


IMAGE_FEATURES = "image_features"
LEAST_PREFILL_TOKENS = 8  # below this, the graph for prompts has no advantage


@dataclass(frozen=True, slots=True)
class _Step:
    """A binding for a fixed number of tokens, with the arrays that it reads and writes."""

    binding: Any
    input_ids: NDArray[np.int64]  # [1, tokens]
    logits: NDArray[np.float32]  # [tokens, vocab]


class DecoderSession:
    """One model and its cache of keys and values, which the graph reads and writes in place.

    Where there is a graph for prompts, both work on the one cache. With a `vision` geometry the graphs take
    `image_features` too, a row for each image token of the call.
    """

    def __init__(
        self,
        model_path: Path,
        kv: KvGeometry,
        num_threads: int,
        prefill_path: Path | None = None,
        vision: VisionGeometry | None = None,
    ) -> None:
        import numpy as np
        import onnxruntime

        self._np = np
        self._ort = onnxruntime
        self.max_tokens = kv.max_tokens
        self.num_threads = num_threads
        self.image_token_id = vision.image_token_id if vision is not None else None
        self._no_images = np.zeros((0, vision.hidden_size), np.float32) if vision is not None else None
        self._session = self._open(model_path, kv, num_threads)
        self._prefill = self._open(prefill_path, kv, num_threads) if prefill_path else self._session
        self.vocab_size = int(self._session.get_outputs()[0].shape[1])
        self._cache = self._allocate(kv)
        self._lengths: dict[str, NDArray[Any]] = {
            "seqlens_k": np.zeros(1, np.int32),
            "total_sequence_length": np.zeros(1, np.int32),
        }
        self._logits = np.zeros((1, self.vocab_size), np.float32)
        self._row = np.zeros(1, np.int64)
        self._steps: dict[int, _Step] = {}  # by number of tokens

    def forward(
        self, token_ids: Sequence[int], num_past: int, image_features: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        """Compute `token_ids` after the first `num_past` tokens of the cache; the last one's logits [vocab].

        `image_features` [image tokens, hidden] are the rows of the image tokens among them, in order. The
        array is the session's own and is overwritten by the next call.
        """
        if len(token_ids) == 1 and image_features is None:
            logits: NDArray[np.float32] = self.forward_rows(token_ids, num_past)[0]
            return logits
        self._set_lengths(len(token_ids), num_past)
        self._row[0] = len(token_ids) - 1
        input_ids = self._np.array([token_ids], self._np.int64)
        session = self._prefill if len(token_ids) >= LEAST_PREFILL_TOKENS else self._session
        session.run_with_iobinding(self._bind(session, input_ids, self._row, self._logits, image_features))
        last: NDArray[np.float32] = self._logits[0]
        return last

    def forward_rows(self, token_ids: Sequence[int], num_past: int) -> NDArray[np.float32]:
        """As `forward`, with the logits [tokens, vocab] of every token; for a few tokens at a time."""
        self._set_lengths(len(token_ids), num_past)
        step = self._steps.get(len(token_ids)) or self._new_step(len(token_ids))
        step.input_ids[0] = token_ids
        self._session.run_with_iobinding(step.binding)
        return step.logits

    def _set_lengths(self, num_tokens: int, num_past: int) -> None:
        total = num_past + num_tokens
        if not 0 < num_tokens <= total <= self.max_tokens:
            raise ValueError(f"{num_past} + {num_tokens} tokens do not fit into {self.max_tokens}")
        self._lengths["seqlens_k"][0] = total - 1
        self._lengths["total_sequence_length"][0] = total

    def _new_step(self, num_tokens: int) -> _Step:
        np = self._np
        input_ids, rows = np.zeros((1, num_tokens), np.int64), np.arange(num_tokens, dtype=np.int64)
        logits = np.zeros((num_tokens, self.vocab_size), np.float32)
        step = _Step(self._bind(self._session, input_ids, rows, logits), input_ids, logits)
        self._steps[num_tokens] = step
        return step

    def _open(self, path: Path, kv: KvGeometry, num_threads: int) -> Any:
        options = session_options(self._ort, num_threads)
        session = self._ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._check_interface(session, kv)
        return session

    def _check_interface(self, session: Any, kv: KvGeometry) -> None:
        inputs = {item.name: item.shape for item in session.get_inputs()}
        cache = [1, kv.num_kv_heads, kv.max_tokens, kv.head_dim]
        needed = {"input_ids", "rows", "seqlens_k", "total_sequence_length", *_cache_names("past", kv)}
        needed |= {IMAGE_FEATURES} if self._no_images is not None else set()
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

    def _bind(
        self,
        session: Any,
        input_ids: NDArray[np.int64],
        rows: NDArray[np.int64],
        logits: NDArray[np.float32],
        image_features: NDArray[np.float32] | None = None,
    ) -> Any:
        """A binding that reads and writes our own arrays, so that a step copies nothing."""
        binding = session.io_binding()
        wrap = self._ort.OrtValue.ortvalue_from_numpy
        features = self._no_images if image_features is None else image_features
        arrays = {"input_ids": input_ids, "rows": rows, **self._lengths}
        arrays |= {IMAGE_FEATURES: features} if features is not None else {}
        for name, array in arrays.items():
            binding.bind_ortvalue_input(name, wrap(array))
        binding.bind_ortvalue_output("logits", wrap(logits))
        for name, value in self._cache.items():
            bind = binding.bind_ortvalue_input if name.startswith("past") else binding.bind_ortvalue_output
            bind(name, value)
        # The binding points into the arrays and must not outlive them.
        binding.longshore_arrays = (input_ids, rows, logits, features)
        return binding


def session_options(onnxruntime: Any, num_threads: int) -> Any:
    """The options of every session here: so many threads, none of which spins when there is nothing to do."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    options.enable_mem_pattern = False  # prompts differ in length
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # an idle app stays idle
    return options


def _cache_names(when: str, kv: KvGeometry) -> list[str]:
    return [f"{when}_{what}.{layer}" for layer in range(kv.num_layers) for what in ("key", "value")]
