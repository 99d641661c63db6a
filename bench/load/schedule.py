"""What is sent when: made up-front, so that nothing random and nothing slow happens while the load runs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sidepool.bench.load.arrivals import Times
from sidepool.wire.errors import ConfigError


@dataclass(frozen=True)
class Schedule:
    """`due_ns` int64 `[n]`, from the start and ascending; `request` int32 `[n]`, places among the target's requests."""

    due_ns: Times
    request: NDArray[np.int32]
    seconds: float
    """Length of the run: arrivals may end a little before."""

    def __len__(self) -> int:
        return int(self.due_ns.size)


def make_schedule(due_ns: Times, requests: int, seed: int, *, seconds: float | None = None) -> Schedule:
    """Send one of `requests` at each of `due_ns`: in random order, each as often as the others.

    seconds: length of the run; default: until the last arrival. Raises `ConfigError` where nothing is due.
    """
    if not due_ns.size:
        raise ConfigError("arrivals: found none; allowed: at least one; raise the rate or the duration")
    random = np.random.default_rng(seed)
    rounds = -(-due_ns.size // requests)
    order = np.concatenate([random.permutation(requests).astype(np.int32) for _ in range(rounds)])[: due_ns.size]
    return Schedule(np.ascontiguousarray(due_ns, np.int64), order, float(due_ns[-1]) / 1e9 if seconds is None else seconds)
