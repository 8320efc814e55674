"""Counts that workers share through files: real processes, one of which dies."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from longshore_server.peer_counts import PeerCounts

_WORKER = """
import sys
from pathlib import Path
from longshore_server.peer_counts import PeerCounts

counts = PeerCounts(Path(sys.argv[1]))
for line in sys.stdin:
    tenant, change = line.split()
    counts.add(tenant, int(change))
    print("done", flush=True)
"""


def test_others_are_counted_and_the_dead_are_not(tmp_path: Path) -> None:
    now_s = 0.0
    counts = PeerCounts(tmp_path, clock=lambda: now_s)
    counts.add("acme", 5)
    assert counts.count("acme") == 0, "its own are not the others'"
    command = [sys.executable, "-c", _WORKER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdin is not None
        assert worker.stdout is not None
        for line in ("acme 3", "other 1", "acme -1"):
            print(line, file=worker.stdin, flush=True)
            assert worker.stdout.readline() == "done\n"
        now_s = 2.0
        assert [counts.count(name) for name in ("acme", "other", "nobody")] == [2, 1, 0]
        worker.kill()
    now_s, end_s = 4.0, time.monotonic() + 5
    while counts.count("acme"):
        assert time.monotonic() < end_s
        now_s += 2.0
    assert list(tmp_path.iterdir()) == [counts._own_path]
    counts.close()
    assert not list(tmp_path.iterdir())


def test_a_tenant_is_never_counted_too_low(tmp_path: Path) -> None:
    counts = PeerCounts(tmp_path)
    reader = PeerCounts.__new__(PeerCounts)
    reader.__dict__.update(counts.__dict__, _peers={counts._own_path: counts._own}, _refreshed_s=float("inf"))
    wanted = {f"tenant-{index}": index % 7 for index in range(3000)}
    for tenant, num in wanted.items():
        counts.add(tenant, num)
    assert all(reader.count(tenant) >= num for tenant, num in wanted.items())
    assert sum(reader.count(tenant) == num for tenant, num in wanted.items()) > 2500
    for tenant, num in wanted.items():
        counts.add(tenant, -num)
    assert not any(reader.count(tenant) for tenant in wanted)
