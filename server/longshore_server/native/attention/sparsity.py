"""The setting `attention_sparsity`: which tokens a generated token may look at, as text and as numbers.

It selects nothing itself and imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from longshore_server.native.errors import ConfigError

FIELD = "attention_sparsity"
DENSE = "dense"
MAX_TOKENS = 1 << 24
MAX_TOP_PAGES = 1 << 16
MAX_LAYERS = 1024
_FORM = 'is "dense" or words such as "sink=64 window=1024 top_pages=32 dense_layers=0,1 dense_below=4096"'
_NUMBERS = {"sink": MAX_TOKENS, "window": MAX_TOKENS, "top_pages": MAX_TOP_PAGES, "dense_below": MAX_TOKENS}


@dataclass(frozen=True, slots=True)
class Sparsity:
    """A generated token sees the first `sink_tokens`, the last `window_tokens`, and the best `top_pages`.

    All of it is rounded up to whole pages. Layers in `dense_layers`, and tokens whose context is at most
    `dense_below_tokens`, see everything. The first two layers are dense unless set otherwise, as in Quest
    (arXiv 2406.10774), whose page bounds choose the top pages.
    """

    window_tokens: int
    sink_tokens: int = 64
    top_pages: int = 0
    dense_layers: frozenset[int] = frozenset({0, 1})
    dense_below_tokens: int = 4096

    def first_position(self, num_prompt_tokens: int) -> int:
        """From where on the tokens of a sequence are sparse."""
        return max(num_prompt_tokens, self.dense_below_tokens)

    def num_sink_pages(self, page_tokens: int) -> int:
        return -(-self.sink_tokens // page_tokens)

    def num_window_pages(self, page_tokens: int) -> int:
        """Enough for the whole window wherever in its page the last token stands."""
        return -(-(self.window_tokens - 1) // page_tokens) + 1

    def num_pages(self, page_tokens: int) -> int:
        """Pages that one token sees at most, of one KV head."""
        return self.num_sink_pages(page_tokens) + self.num_window_pages(page_tokens) + self.top_pages


def parse_sparsity(text: str) -> Sparsity | None:
    """None for "dense"; raises ConfigError, in one line, for anything that is not a form of the setting."""
    words = text.split()
    if words == [DENSE]:
        return None
    given: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or (name not in _NUMBERS and name != "dense_layers"):
            raise ConfigError(FIELD, f"{_FORM}, got {word[:40]!r}")
        if name in given:
            raise ConfigError(FIELD, f"names {name} twice")
        given[name] = value
    if "window" not in given:
        raise ConfigError(FIELD, f"{_FORM}, got {text[:80]!r}")
    layers = {"dense_layers": _layers(given.pop("dense_layers"))} if "dense_layers" in given else {}
    numbers = {name: _number(name, value) for name, value in given.items()}
    names = {"sink": "sink_tokens", "window": "window_tokens", "dense_below": "dense_below_tokens"}
    return Sparsity(**{names.get(name, name): value for name, value in numbers.items()}, **layers)  # type: ignore[arg-type]


def _number(name: str, value: str) -> int:
    low = 1 if name == "window" else 0
    if not (value.isascii() and value.isdigit() and low <= int(value[:12]) <= _NUMBERS[name]):
        raise ConfigError(FIELD, f"{name} must be {low} to {_NUMBERS[name]}, got {value[:20]!r}")
    return int(value)


def _layers(value: str) -> frozenset[int]:
    parts = value.split(",") if value != "none" else []
    if any(not (part.isascii() and part.isdigit() and int(part[:6]) < MAX_LAYERS) for part in parts):
        raise ConfigError(FIELD, f'dense_layers is "none" or layer numbers such as 0,1, got {value[:40]!r}')
    return frozenset(int(part) for part in parts)
