"""Every error that the native engine raises, as one tree; nothing else is raised on purpose.

NativeEngineError
├── ConfigError (ValueError)              an engine setting is wrong; names the setting
├── InvalidRequestError (ValueError)      a request field is wrong; names the field
│   ├── PromptTooLongError                prompt leaves no room for an answer; names both lengths
│   └── DuplicateRequestError             the request id is in use
├── QueueFullError                        the waiting queue is at its bound; try again later
├── OutOfBlocksError                      the KV block pool is empty (never leaves the scheduler)
├── RankProtocolError                     a message between ranks is not in their table
├── RanksLostError                        a rank died or fell silent; the engine cannot go on
└── ModelLoadError                        the model folder cannot be used; one line says why
    └── UnsupportedModelError             the architecture needs what this engine lacks
"""

from __future__ import annotations


class NativeEngineError(Exception):
    """Base of every error of the native engine; `code` is stable and safe to show to clients."""

    code = "engine_error"


class ConfigError(NativeEngineError, ValueError):
    """An engine setting is wrong."""

    code = "invalid_engine_config"

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


class InvalidRequestError(NativeEngineError, ValueError):
    """A field of one request is wrong; the engine is untouched."""

    code = "invalid_request"

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


class PromptTooLongError(InvalidRequestError):
    """The prompt (with what is already answered) leaves no room for one more token."""

    code = "prompt_too_long"

    def __init__(self, num_prompt_tokens: int, max_model_len: int) -> None:
        super().__init__(
            "prompt_token_ids",
            f"{num_prompt_tokens} tokens leave no room for an answer within the model's {max_model_len}",
        )
        self.num_prompt_tokens = num_prompt_tokens
        self.max_model_len = max_model_len


class DuplicateRequestError(InvalidRequestError):
    """A request with this id has not ended yet."""

    code = "duplicate_request"

    def __init__(self, request_id: str) -> None:
        super().__init__("request_id", f"{request_id!r} is already in the engine")
        self.request_id = request_id


class QueueFullError(NativeEngineError):
    """The waiting queue is at its bound; nothing was added."""

    code = "queue_full"

    def __init__(self, max_num_waiting: int) -> None:
        super().__init__(f"{max_num_waiting} requests are already waiting")
        self.max_num_waiting = max_num_waiting


class OutOfBlocksError(NativeEngineError):
    """The block pool cannot give the blocks asked for; nothing was allocated."""

    code = "out_of_blocks"


class RankProtocolError(NativeEngineError):
    """A rank sent what is not in the table of messages; it is treated as dead."""

    code = "rank_protocol"


class RanksLostError(NativeEngineError):
    """A rank died, fell silent or fell out of step: all ranks have been ended, and this engine with them."""

    code = "ranks_lost"


class ModelLoadError(NativeEngineError):
    """The model folder cannot be loaded; the message is one line."""

    code = "model_load_failed"


class UnsupportedModelError(ModelLoadError):
    """The model is sound, but needs something that this engine does not have."""

    code = "unsupported_model"
