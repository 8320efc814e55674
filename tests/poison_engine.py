"""An engine process that dies, or fails in a step, on certain prompt tokens; everything else is real."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from longshore_server import engine_process
from longshore_server.config import CoreConfig

POISON = 901  # the process is killed in the step that has a prompt with it
SICK_STEP = 902  # every step raises while a prompt with it is here
SLOW_STEP = 903  # a step never ends


def poisoned(config: CoreConfig) -> Any:
    """The native engine, in a class that looks at the prompts it is given."""
    inner = engine_process.native_engine(config)

    class PoisonedEngine(type(inner)):  # type: ignore[misc]
        def add_request(self, request_id: str, prompt_token_ids: Any, *args: Any, **options: Any) -> None:
            super().add_request(request_id, prompt_token_ids, *args, **options)
            for token in (POISON, SICK_STEP, SLOW_STEP):
                if token in prompt_token_ids:
                    self.ill.setdefault(token, set()).add(request_id)

        def abort(self, request_id: str) -> bool:
            for requests in self.ill.values():
                requests.discard(request_id)
            return bool(super().abort(request_id))

        def step(self) -> Any:
            if self.ill.get(POISON):
                os.kill(os.getpid(), signal.SIGKILL)
            if self.ill.get(SICK_STEP):
                raise RuntimeError("this step is sick")
            if self.ill.get(SLOW_STEP):
                signal.pause()
            return super().step()

    inner.__class__ = PoisonedEngine
    inner.ill = {}
    return inner


if __name__ == "__main__":
    sys.exit(engine_process.main(factory=poisoned))
