"""Keeping moved shards from taking what lookups need."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Pacer:
    """Bytes per second through one end of all moves of a sidecar. Thread-safe: several streams share the rate."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free_at = 0.0

    def wait(self, count: float, bytes_per_s: float, sleep: Callable[[float], object] = time.sleep) -> None:
        """Take `count` bytes' turn and return once those before it have had theirs; at no moment is more saved up than that."""
        with self._lock:
            now = time.monotonic()
            turn = max(self._free_at, now)
            self._free_at = turn + count / bytes_per_s
        if turn > now:
            sleep(turn - now)
