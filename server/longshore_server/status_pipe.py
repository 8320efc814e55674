"""How a child tells its supervisor that it is ready and alive: JSON lines on what was its standard output."""

from __future__ import annotations

import json
import os
import threading
from typing import Any


class StatusPipe:
    """Takes standard output for status lines; what libraries print goes to standard error from here on."""

    def __init__(self) -> None:
        self._fd = os.dup(1)
        os.dup2(2, 1)
        os.set_blocking(self._fd, False)  # a supervisor that is suspended must not suspend its children
        self._lock = threading.Lock()

    def tell(self, **fields: Any) -> None:
        """One line to the supervisor; if it is gone, so is the reason to go on."""
        try:
            with self._lock:
                os.write(self._fd, json.dumps(fields).encode() + b"\n")
        except BlockingIOError:
            pass  # thousands of lines unread: one sign of life more says nothing
        except OSError:
            os._exit(1)


def read_status(line: bytes) -> dict[str, Any]:
    """The fields of one line; none where it is not a status line."""
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
