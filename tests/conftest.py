"""What every test shares: the hypothesis profiles. Fixtures of one package stand in its own folder."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# Wall-clock checks say more about a busy machine than about the code, so both profiles go without.
_SHARED = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("ci", max_examples=50, print_blob=True, **_SHARED)
settings.register_profile("full", max_examples=2_000, **_SHARED)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
