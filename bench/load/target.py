"""What a load is put on. A target keeps its distinct requests ready; a driver sends them, once."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sidepool.wire.errors import ConfigError

# What becomes of requests whose target gives no status of its own: native/load/load.hpp.
OK, WAITING, LOST, MALFORMED, UNANSWERED, NOT_SENT = 0, -1, 100, 101, 102, 103
OUTCOMES = {OK: "OK", LOST: "connection lost", MALFORMED: "malformed reply", UNANSWERED: "unanswered", NOT_SENT: "not sent"}
# Threads, or connections, of one load: more would only wait for each other.
MOST_AT_ONCE = 1024
# A thread that waits for a time spins this long before it: most of what waking from a sleep takes, and at 1,000 requests per second
# at most a fiftieth of its core.
SPIN_US = 20


def check_at_once(name: str, count: int) -> int:
    """`count` threads or connections, if a load can have as many; raises `ConfigError`."""
    if not 1 <= count <= MOST_AT_ONCE:
        raise ConfigError(f"{name}: found {count}; allowed: 1 to {MOST_AT_ONCE}")
    return count


class Driver(Protocol):
    """One run of a load (`sidepool._native.Load`)."""

    def run(
        self,
        due_ns: NDArray[np.int64],
        request: NDArray[np.int32],
        sent_ns: NDArray[np.int64],
        done_ns: NDArray[np.int64],
        status: NDArray[np.int32],
        drain_ns: int,
    ) -> dict[str, int]:
        """Send everything when it is due; returns when all is answered, or `drain_ns` after the last was due.

        Fills in sent_ns, done_ns and status, which others may read meanwhile. Returns start_ns (monotonic clock), most_outstanding,
        most_bytes and reconnects.
        """

    def stop(self) -> None:
        """Any thread: end the run soon; what is not over then counts as unanswered or not sent."""

    def examples(self) -> dict[int, str]:
        """The first message that came with each status."""


class Target(Protocol):
    """Distinct requests, and a way to send them."""

    @property
    def requests(self) -> int:
        """How many distinct requests there are."""

    def driver(self) -> Driver:
        """A driver for one run."""

    def status_name(self, status: int) -> str:
        """`status` in a report."""

    def describe(self) -> dict[str, Any]:
        """Address, limits and the like, for reports."""

    def close(self) -> None:
        """Let go of connections and memory. Idempotent."""
