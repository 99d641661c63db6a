"""What came of a load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sidepool.bench.load.schedule import Schedule
from sidepool.bench.load.target import OK, WAITING

PERCENTILES = (50.0, 90.0, 95.0, 99.0, 99.9)
# Latencies in the HDR histogram: to three significant digits, in microseconds, up to an hour.
HDR_DIGITS, HDR_MOST_US = 3, 3_600_000_000


@dataclass(frozen=True)
class LoadResult:
    """One run. Arrays have the schedule's length; times are nanoseconds from its start.

    Everything that is reported leaves out requests due before `warmup_s`. A latency runs from the time at which the request was
    due, so it holds whatever kept the generator or the server from taking it then.
    """

    schedule: Schedule
    sent_ns: NDArray[np.int64]
    done_ns: NDArray[np.int64]
    status: NDArray[np.int32]
    warmup_s: float
    slo_ms: float | None
    names: Mapping[int, str]
    """What each status that occurred means."""
    examples: Mapping[str, str]
    """By name of a status: the first message that came with it."""
    totals: Mapping[str, int] = field(default_factory=dict)
    """What the driver says of the run: most_outstanding, most_bytes, reconnects, start_ns."""
    target: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def measured(self) -> NDArray[np.bool_]:
        """Requests that count, of whatever status: those due after the warm-up."""
        counted: NDArray[np.bool_] = self.schedule.due_ns >= int(self.warmup_s * 1e9)
        return counted

    @property
    def seconds(self) -> float:
        """Length of what is measured."""
        return self.schedule.seconds - self.warmup_s

    @cached_property
    def latency_ns(self) -> NDArray[np.int64]:
        """Of the requests that were answered, from when they were due."""
        ok = self.measured & (self.status == OK)
        latency: NDArray[np.int64] = (self.done_ns - self.schedule.due_ns)[ok]
        return latency

    def percentile_ms(self, percent: float) -> float:
        """Of the answered requests; infinite where none was."""
        return float(np.percentile(self.latency_ns, percent)) / 1e6 if self.latency_ns.size else float("inf")

    @property
    def scheduled(self) -> int:
        return int(self.measured.sum())

    @property
    def offered_qps(self) -> float:
        """Requests due per second."""
        return self.scheduled / self.seconds

    @property
    def answered_qps(self) -> float:
        """Requests that were answered, per second of the schedule."""
        return self.latency_ns.size / self.seconds

    @cached_property
    def errors(self) -> dict[str, int]:
        """Requests that were not answered, by what became of them; most first."""
        over = self.status[self.measured & (self.status != OK) & (self.status != WAITING)]
        found, counts = np.unique(over, return_counts=True)
        most_first = sorted(zip(found.tolist(), counts.tolist(), strict=True), key=lambda pair: -pair[1])
        return {self.names.get(status, str(status)): count for status, count in most_first}

    @property
    def within_slo(self) -> int:
        """Requests answered within `slo_ms` of when they were due; without a limit, all that were answered."""
        return self.latency_ns.size if self.slo_ms is None else int((self.latency_ns <= self.slo_ms * 1e6).sum())

    @property
    def goodput_qps(self) -> float:
        """`within_slo` per second of the schedule."""
        return self.within_slo / self.seconds

    @property
    def attainment(self) -> float:
        """The share of all requests, lost ones included, that were answered within `slo_ms`."""
        return self.within_slo / self.scheduled if self.scheduled else 0.0

    @cached_property
    def lateness_ns(self) -> NDArray[np.int64]:
        """From when a request was due to when the generator took it up, of those that it did: its own share of the latency."""
        sent = self.measured & (self.sent_ns >= 0)
        lateness: NDArray[np.int64] = (self.sent_ns - self.schedule.due_ns)[sent]
        return lateness

    def as_json(self) -> dict[str, Any]:
        """All of it as plain data, the histogram included."""
        latencies = {f"p{p:g}": _rounded(self.percentile_ms(p)) for p in PERCENTILES}
        if self.latency_ns.size:
            latencies |= {"mean": round(float(self.latency_ns.mean()) / 1e6, 4), "max": round(int(self.latency_ns.max()) / 1e6, 4)}
        late = np.percentile(self.lateness_ns, (50, 99, 100)) / 1e3 if self.lateness_ns.size else (0.0, 0.0, 0.0)
        return {
            "target": dict(self.target),
            "seconds": round(self.seconds, 3),
            "warmup_s": self.warmup_s,
            "scheduled": self.scheduled,
            "offered_qps": round(self.offered_qps, 2),
            "answered_qps": round(self.answered_qps, 2),
            "latency_ms": latencies,
            "slo_ms": self.slo_ms,
            "goodput_qps": round(self.goodput_qps, 2),
            "attainment": round(self.attainment, 5),
            "errors": self.errors,
            "error_examples": dict(self.examples),
            "generator": {
                "late_us": dict(zip(("p50", "p99", "max"), (round(float(x), 1) for x in late), strict=True)),
                **{k: v for k, v in self.totals.items() if k != "start_ns"},
            },
            "hdr": self.hdr_histogram(),
        }

    def hdr_histogram(self) -> str:
        """Latencies of answered requests in microseconds, as HdrHistogram's tools read and merge them (V2, base64)."""
        from hdrh.histogram import HdrHistogram

        histogram = HdrHistogram(1, HDR_MOST_US, HDR_DIGITS)
        for value, count in zip(*np.unique(np.maximum(self.latency_ns // 1000, 1), return_counts=True), strict=True):
            histogram.record_value(int(value), int(count))
        return bytes(histogram.encode()).decode("ascii")


def _rounded(value: float) -> float | None:
    return round(value, 4) if np.isfinite(value) else None
