"""What one worker knows of each core: settings, load, breaker, readiness and the models it serves.

Pure state with the clock passed in; the connections are `upstream`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from longshore.wire import ModelCard
from longshore_edge.balance import Choice, Load, PeakEwma, Policy
from longshore_edge.config import CoreSettings, EdgeConfig
from longshore_edge.geo import Place
from longshore_edge.health import Breaker
from longshore_edge.route import Option, candidates, model_is_unknown


@dataclass(slots=True)
class Core:
    """A core's live state. `models` is None until it told them; the last list is kept while it is down."""

    settings: CoreSettings
    load: Load
    breaker: Breaker
    is_ready: bool = True
    not_ready_reason: str = ""
    models: dict[str, ModelCard] | None = None
    models_read_s: float = field(default=float("-inf"))

    @property
    def name(self) -> str:
        return self.settings.name

    @property
    def place(self) -> Place | None:
        if self.settings.latitude is None or self.settings.longitude is None:
            return None
        return Place(self.settings.latitude, self.settings.longitude)

    def is_well(self) -> bool:
        """True if a request may be sent to it now."""
        return self.is_ready and self.breaker.admits()

    def ailment(self) -> str:
        """Why it is not well, in words."""
        if not self.is_ready:
            return self.not_ready_reason or "not ready"
        if not self.breaker.admits():
            return f"breaker {self.breaker.state}, next probe in {self.breaker.retry_in_s():.1f} s"
        return "well"

    def has_model(self, model: str, *, for_images: bool = False) -> bool | None:
        """Whether it serves `model`, `for_images` to requests with pictures; None while it has not said."""
        if self.models is None:
            return None
        card = self.models.get(model)
        if card is None or not for_images:
            return card is not None
        return None if card.input_modalities is None else "image" in card.input_modalities


class Fleet:
    """All cores of the settings, and the choice among them."""

    def __init__(self, config: EdgeConfig, policy: Policy, clock: Callable[[], float]) -> None:
        self._policy = policy
        self._limit = config.num_candidates
        self._clock = clock
        self.cores = {settings.name: _core(settings, config, clock) for settings in config.cores}
        self.remembered: Mapping[str, str] = {}  # digests from before a restart, for cores yet to be heard

    def choose(
        self, model: str, client: Place | None, tried: frozenset[str], *, for_images: bool = False
    ) -> tuple[Core, str] | None:
        """The core for the next attempt and why; None when no untried one is well."""
        nearest = candidates(self._options(model, for_images), client, limit=self._limit, tried=tried)
        if not nearest:
            return None
        loads = [self.cores[option.name].load for option in nearest]
        choice: Choice = self._policy.choose(loads, self._clock())
        return self.cores[choice.load.name], choice.reason

    def model_is_unknown(self, model: str, *, for_images: bool = False) -> bool:
        """True when every core has said what it serves and none has `model`, or none `for_images`."""
        return model_is_unknown(self._options(model, for_images))

    def predicted_ttft_s(
        self, model: str, client: Place | None, *, for_images: bool = False
    ) -> tuple[Core, float] | None:
        """The candidate with the least predicted time to first token, among those that were measured."""
        nearest = candidates(self._options(model, for_images), client, limit=self._limit)
        measured = [self.cores[option.name] for option in nearest]
        measured = [core for core in measured if core.load.ttft.num_samples]
        if not measured or len(measured) < len(nearest):
            return None  # an unmeasured core might do better: only sending there tells
        now_s = self._clock()
        best = min(measured, key=lambda core: core.load.predicted_ttft_s(now_s))
        return best, best.load.predicted_ttft_s(now_s)

    def digest_of(self, model: str) -> str | None:
        """The digest of the weights behind `model` if all cores that serve it agree, else None.

        While none says that it serves it, and some have not said anything yet, it is the remembered one.
        """
        digests = {
            core.models[model].model_digest
            for core in self.cores.values()
            if core.models is not None and model in core.models
        }
        if not digests and any(core.models is None for core in self.cores.values()):
            return self.remembered.get(model)
        return digests.pop() if len(digests) == 1 else None

    def told_digests(self) -> dict[str, str]:
        """The digest of each model that cores say they serve, where they agree."""
        names = {name for core in self.cores.values() for name in core.models or ()}
        return {name: digest for name in sorted(names) if (digest := self.digest_of(name)) is not None}

    def model_cards(self) -> Sequence[ModelCard]:
        """The models of all cores, each name once."""
        cards: dict[str, ModelCard] = {}
        for core in self.cores.values():
            for name, card in (core.models or {}).items():
                cards.setdefault(name, card)
        return list(cards.values())

    def _options(self, model: str, for_images: bool) -> list[Option]:
        return [
            Option(core.name, core.place, core.is_well(), core.has_model(model, for_images=for_images))
            for core in self.cores.values()
        ]


def _core(settings: CoreSettings, config: EdgeConfig, clock: Callable[[], float]) -> Core:
    ewma = PeakEwma(prior_s=config.prior_ttft_ms / 1e3)
    load = Load(settings.name, settings.weight, ewma)
    return Core(settings, load, Breaker(clock, config.failure_threshold, config.cooldown_s))


@dataclass(slots=True)
class Lease:
    """One attempt at a core, from sending to its end; keeps the core's counts and breaker right.

    Exactly one of `succeed`, `fail` and `abandon` ends it; later ones change nothing.
    """

    core: Core
    clock: Callable[[], float]
    sent_s: float = 0.0
    ttft_s: float | None = None
    _is_open: bool = True

    def __post_init__(self) -> None:
        self.sent_s = self.clock()
        self.core.load.num_in_flight += 1
        self.core.load.num_waiting += 1
        self.core.breaker.begin()

    def first_token(self, ttft_s: float | None = None) -> None:
        """The first token came; `ttft_s` where it was measured elsewhere, else the time since sending."""
        if self.ttft_s is not None or not self._is_open:
            return
        now_s = self.clock()
        self.ttft_s = now_s - self.sent_s if ttft_s is None else ttft_s
        self.core.load.num_waiting -= 1
        self.core.load.ttft.observe(self.ttft_s, now_s)

    def succeed(self) -> None:
        """The core did its part (also when it refused a request that is at fault)."""
        if self._end():
            self.core.breaker.succeeded()

    def fail(self) -> None:
        """The core is at fault; how long it took to fail counts as its latency, if it is the worst yet."""
        if not self._end():
            return
        self.core.breaker.failed()
        now_s = self.clock()
        if now_s - self.sent_s > self.core.load.ttft.value_s(now_s):
            self.core.load.ttft.observe(now_s - self.sent_s, now_s)

    def abandon(self) -> None:
        """Ended without telling anything of the core: the client left."""
        if self._end():
            self.core.breaker.abandoned()

    def _end(self) -> bool:
        if not self._is_open:
            return False
        self._is_open = False
        self.core.load.num_in_flight -= 1
        if self.ttft_s is None:
            self.core.load.num_waiting -= 1
        return True
