"""Twice as many requests as can be served, for a while: what is still answered in time, and how soon all is well again."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from sidepool.bench.footprint import footprint
from sidepool.bench.load import LoadResult, make_schedule, run_load
from sidepool.bench.load.arrivals import poisson
from sidepool.bench.load.target import OK
from sidepool.bench.load.triton import TritonTarget
from sidepool.bench.traffic import Arrays
from sidepool.bench.triton_server import TritonServer, processes_of_group

OVERLOAD, AFTERWARDS = 2.0, 0.5
# How long is looked at after the load has dropped.
AFTER_S = 5.0


def overloaded(
    server: TritonServer,
    model: str,
    requests: Sequence[Arrays],
    *,
    highest_qps: float,
    limit_ms: float,
    seconds: float,
    seed: int,
    shared_memory: bool = False,
) -> dict[str, Any]:
    """`OVERLOAD` times the highest rate for so long, then `AFTERWARDS` times; every request says by when it must be answered."""
    during = poisson(OVERLOAD * highest_qps, seconds, seed)
    after = poisson(AFTERWARDS * highest_qps, AFTER_S, seed + 1) + int(seconds * 1e9)
    with contextlib.closing(
        TritonTarget(server.grpc, model, requests, deadline_ms=limit_ms, shared_memory=shared_memory)
    ) as target:
        schedule = make_schedule(np.concatenate([during, after]), target.requests, seed, seconds=seconds + AFTER_S)
        before_bytes = _resident(server)
        peaks = [before_bytes]
        result = run_load(target, schedule, slo_ms=limit_ms, view=lambda _: peaks.append(_resident(server)))
    return figures(result, during.size, seconds, limit_ms=limit_ms, highest_qps=highest_qps) | {
        "anonymous_bytes": {"before": before_bytes, "most": max(peaks)},
        "errors": result.errors,
    }


def figures(result: LoadResult, during: int, seconds: float, *, limit_ms: float, highest_qps: float) -> dict[str, float]:
    """Of a load whose first `during` requests, in `seconds`, are the overload."""
    late_ns = result.done_ns - result.schedule.due_ns
    good = (result.status == OK) & (late_ns <= limit_ms * 1e6)
    missed_s = (result.schedule.due_ns[during:][~good[during:]] / 1e9) - seconds
    goodput = good[:during].sum() / seconds
    return {
        "offered_qps": round(during / seconds, 2),
        "goodput_qps": round(float(goodput), 2),
        "goodput_share": round(float(goodput / highest_qps), 3),
        "recovery_s": round(float(missed_s.max()), 2) if missed_s.size else 0.0,
    }


def _resident(server: TritonServer) -> int:
    """Anonymous memory of the server and its stubs: what a queue would grow in."""
    return sum(footprint(pid).anonymous for pid in processes_of_group(server.pid))
