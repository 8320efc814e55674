"""The garbage collector in a process that serves. In a process of its own, since it stays that way."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import gc, weakref
from longshore_server.native.garbage import keep_for_good

class Loop:
    def __init__(self):
        self.itself = self

old = [[number] for number in range(100_000)]
keep_for_good()
assert gc.get_freeze_count() > 100_000 and len(gc.get_objects()) < 1000
young = weakref.ref(Loop())
assert young() is not None
gc.collect()
assert young() is None
"""


def test_a_collection_passes_over_what_was_there_and_still_frees_what_came_later() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
