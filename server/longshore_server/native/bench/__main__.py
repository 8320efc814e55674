"""`python -m longshore_server.native.bench`: the command without the rest of Longshore."""

from __future__ import annotations

import sys

from longshore_server.native.bench.command import main

if __name__ == "__main__":
    sys.exit(main())
