"""One request's state: its tokens, its KV blocks, how far it is computed, when it ends. No torch, no I/O."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence as SequenceOf
from enum import Enum

from longshore_server.native.images import PlacedImage, content_digest
from longshore_server.native.outputs import FinishReason
from longshore_server.native.sampling_params import SamplingParams


class SequenceStatus(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """A request inside the engine.

    `token_ids` is prompt then answer; the KV of the first `num_computed_tokens` of them stands in the blocks
    of `block_table`. A sequence samples a token in the step that computes the last of `token_ids`. While a
    step runs on a GPU, `num_inflight_tokens` counts the token that it has sampled and the host has not seen.
    """

    __slots__ = (
        "arrival",
        "block_digests",
        "block_table",
        "deadline_s",
        "finish_reason",
        "images",
        "max_total_tokens",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_inflight_tokens",
        "num_preemptions",
        "num_prompt_tokens",
        "num_published_blocks",
        "num_swapped_tokens",
        "params",
        "priority",
        "request_id",
        "sampler_state",
        "sparse_from",
        "status",
        "stop_token_ids",
        "tenant",
        "token_ids",
    )

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: SequenceOf[int],
        params: SamplingParams,
        *,
        max_model_len: int,
        eos_token_ids: frozenset[int] = frozenset(),
        tenant: str = "",
        priority: int = 0,
        arrival: int = 0,
        deadline_s: float | None = None,
        continue_from: SequenceOf[int] = (),
        images: tuple[PlacedImage, ...] = (),
        sparse_from: int | None = None,
    ) -> None:
        """Tokens from the position `sparse_from` on attend sparsely."""
        self.request_id = request_id
        self.token_ids: list[int] = [*prompt_token_ids, *continue_from]
        self.images = images  # in the prompt, by place
        self.num_prompt_tokens = len(prompt_token_ids)
        self.sparse_from = sparse_from
        self.params = params
        self.tenant = tenant
        self.priority = priority
        self.arrival = arrival
        self.deadline_s = deadline_s
        self.max_total_tokens = min(self.num_prompt_tokens + params.max_tokens, max_model_len)
        self.stop_token_ids = frozenset(params.stop_token_ids) | (
            frozenset() if params.ignore_eos else eos_token_ids
        )
        self.status = SequenceStatus.WAITING
        self.finish_reason: FinishReason | None = None
        self.block_table: list[int] = []
        self.block_digests: list[bytes] = []
        self.num_published_blocks = 0
        self.num_computed_tokens = 0
        self.num_cached_tokens = 0
        self.num_inflight_tokens = 0
        self.num_preemptions = 0
        self.num_swapped_tokens = 0  # whose KV was kept elsewhere when it was last preempted
        self.sampler_state: object | None = None  # owned by the sampler

    @property
    def rank(self) -> tuple[int, int]:
        """Order of service: smaller priority first, then first come, first served."""
        return (self.priority, self.arrival)

    @property
    def num_generated_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) + self.num_inflight_tokens - self.num_computed_tokens

    @property
    def must_not_stop(self) -> bool:
        """True while the next token would leave the answer shorter than `min_tokens`."""
        return self.next_offset < self.params.min_tokens

    @property
    def next_offset(self) -> int:
        """The index in the answer of the token that the next step samples."""
        return self.num_generated_tokens + self.num_inflight_tokens

    @property
    def is_full_length(self) -> bool:
        """True when the tokens so far, with the one in flight, leave no room for another."""
        return len(self.token_ids) + self.num_inflight_tokens >= self.max_total_tokens

    def append(self, token_id: int) -> FinishReason | None:
        """Adds a sampled token and says whether it ends the answer, and why."""
        self.token_ids.append(token_id)
        return self.ending()

    def ending(self) -> FinishReason | None:
        """Why the tokens so far are a whole answer, or None. A stop token counts from `min_tokens` on."""
        num_generated = self.num_generated_tokens
        if num_generated == 0:
            return None
        if self.token_ids[-1] in self.stop_token_ids and num_generated > self.params.min_tokens:
            return "stop"
        if len(self.token_ids) >= self.max_total_tokens:
            return "length"
        return None

    def digest_blocks(self, num_blocks: int, block_size: int) -> list[bytes]:
        """Chained digests of the first `num_blocks` full blocks; the chain starts from the tenant.

        A digest names a block's tokens, the images they stand for, from where on they attend sparsely, and
        all before them, for one tenant: equal digests mean equal KV. SHA-256 because a client chooses the
        tokens and must not be able to forge a match.
        """
        digests = self.block_digests
        for index in range(len(digests), num_blocks):
            parent = digests[-1] if digests else hashlib.sha256(self.tenant.encode()).digest()
            content = self._content(index * block_size, (index + 1) * block_size)
            digests.append(hashlib.sha256(parent + content).digest())
        return digests[:num_blocks]

    def digest_tail(self, num_tokens: int, block_size: int) -> bytes:
        """The digest of the first `num_tokens`, which end inside a block; never that of a full block."""
        num_full = num_tokens // block_size
        parent = self.digest_blocks(num_full, block_size)[-1:] or [self.tenant.encode()]
        content = self._content(num_full * block_size, num_tokens)
        return hashlib.sha256(b"tail" + parent[0] + content).digest()

    def _content(self, start: int, stop: int) -> bytes:
        content = array("q", self.token_ids[start:stop]).tobytes()
        if self.images:
            content += content_digest(self.images, start, stop)
        if self.sparse_from is not None and stop > self.sparse_from:
            content += b"sparse from %d" % self.sparse_from
        return content
