"""What the demo claims, each with its check; a claim that was not checked can't be printed."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Claims:
    """Prints claims as they are checked and remembers whether all of them held."""

    failed: list[str] = field(default_factory=list)
    num_checked: int = 0

    def check(self, holds: bool, text: str, evidence: str = "") -> None:
        """Record one claim; `evidence` is the figure that decided it."""
        self.num_checked += 1
        mark = "ok    " if holds else "FAILED"
        print(f"  {mark} {text}" + (f"  [{evidence}]" if evidence else ""), flush=True)
        if not holds:
            self.failed.append(text)

    @property
    def all_hold(self) -> bool:
        """True when something was checked and nothing failed."""
        return self.num_checked > 0 and not self.failed
