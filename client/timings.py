"""Where the time of a lookup went, as the native core measured it. All times in nanoseconds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class SidecarTimings:
    """One sidecar's share of a lookup: the times of its slowest chunk, the bytes of all."""

    lane_out_ns: int
    queue_ns: int
    pool_ns: int
    lane_back_ns: int
    request_bytes: int
    response_bytes: int


@dataclass(frozen=True, slots=True)
class Timings:
    """One lookup: routing, waiting for the sidecars, merging, all of it, and the chunks it was sent in."""

    route_ns: int
    wait_ns: int
    merge_ns: int
    total_ns: int
    chunks: int
    sidecars: tuple[SidecarTimings, ...]
    """In the order of the plan's sidecars (one entry, for the process itself, on the local lane)."""


def read_timings(raw: NDArray[np.int64]) -> Timings:
    """Name the numbers of a native timings array `[1 + sidecars, 6]`."""
    (route_ns, wait_ns, merge_ns, total_ns, chunks, _), *sidecars = raw.tolist()
    return Timings(route_ns, wait_ns, merge_ns, total_ns, chunks, tuple(SidecarTimings(*row) for row in sidecars))
