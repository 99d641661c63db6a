"""Where the time of requests goes, summed per stage and reported to Triton's metrics once a second.

One custom-metric call costs about 15 µs (a message to the server process), so `execute` only adds numbers here and a
daemon thread reports the sums.
"""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

FLUSH_PERIOD_S = 1.0
RANKER_STAGES = ("tensors_in", "routing", "merge", "dense", "tensors_out")
SIDECAR_STAGES = ("lane_out", "queue", "pool", "lane_back")

_ROUTE, _MERGE = 0, 2  # columns of row 0 of a native timings array
_NS = 1e-9


class StageTimes:
    """Sums since the last flush. `add` and `add_error` belong to the executing thread; `flush` may run in any one thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._clear()

    def _clear(self) -> None:
        self.executes = self.requests = self.samples = 0
        self.tensors_in_ns = self.dense_ns = self.tensors_out_ns = 0
        self.lookups: dict[tuple[str, ...], NDArray[np.int64]] = {}
        """Summed native timings, by the sidecars whose rows they are: one entry, two around a change of plans."""
        self.errors: Counter[str] = Counter()
        self.adjustments: Counter[str] = Counter()

    def add(
        self,
        *,
        requests: int,
        samples: int,
        tensors_in_ns: int,
        lookup: NDArray[np.int64],
        sidecars: tuple[str, ...],
        dense_ns: int,
        tensors_out_ns: int,
    ) -> None:
        """One `execute` that ran a lookup and a forward pass; `lookup`: native timings `[1 + sidecars, 6]`, taken over."""
        with self._lock:
            self.executes += 1
            self.requests += requests
            self.samples += samples
            self.tensors_in_ns += tensors_in_ns
            if (sums := self.lookups.get(sidecars)) is None:
                self.lookups[sidecars] = lookup
            else:
                sums += lookup
            self.dense_ns += dense_ns
            self.tensors_out_ns += tensors_out_ns

    def add_error(self, code: str) -> None:
        """One request that was answered with an error."""
        with self._lock:
            self.errors[code] += 1

    def add_adjustment(self, direction: str) -> None:
        """The online controller changed `split_samples`."""
        with self._lock:
            self.adjustments[direction] += 1

    def take(self) -> dict[tuple[str, str, str], float]:
        """`(metric, label value, second label value) -> increment` since the last call; zeros are left out."""
        with self._lock:
            lookups, errors, adjustments = self.lookups, self.errors, self.adjustments
            route_ns, merge_ns = (sum(int(sums[0, column]) for sums in lookups.values()) for column in (_ROUTE, _MERGE))
            own = (self.tensors_in_ns, route_ns, merge_ns, self.dense_ns, self.tensors_out_ns)
            counts = {"executes": self.executes, "requests": self.requests, "samples": self.samples}
            self._clear()
        taken: dict[tuple[str, str, str], float] = defaultdict(float)
        taken |= {(name, "", ""): float(n) for name, n in counts.items()}
        taken |= {("stage_seconds", stage, ""): ns * _NS for stage, ns in zip(RANKER_STAGES, own, strict=True)}
        for sidecars, sums in lookups.items():
            for sidecar, row in zip(sidecars, sums[1:].tolist(), strict=True):
                for stage, ns in zip(SIDECAR_STAGES, row, strict=False):
                    taken["sidecar_stage_seconds", sidecar, stage] += ns * _NS
                taken["sidecar_bytes", sidecar, "request"] += row[4]
                taken["sidecar_bytes", sidecar, "response"] += row[5]
        taken |= {("errors", code, ""): float(n) for code, n in errors.items()}
        taken |= {("adjustments", direction, ""): float(n) for direction, n in adjustments.items()}
        return {key: value for key, value in taken.items() if value}


class StageReporter:
    """Reports `StageTimes` as Triton custom metrics, from a daemon thread of its own, until closed."""

    def __init__(self, times: StageTimes, *, model: str, version: str, pb_utils: Any) -> None:
        self._times = times
        self._labels = {"model": model, "version": version}
        self._families = {
            name: (
                pb_utils.MetricFamily(name=f"sidepool_ranker_{name}_total", description=text, kind=pb_utils.MetricFamily.COUNTER),
                labels,
            )
            for name, (text, labels) in {
                "executes": ("Batches executed: one lookup and one dense forward each", ()),
                "requests": ("Requests answered with scores", ()),
                "samples": ("Samples scored", ()),
                "errors": ("Requests answered with an error, by code", ("code",)),
                "adjustments": ("Changes of split_samples by the online controller", ("direction",)),
                "stage_seconds": ("Time spent in the ranker, by stage", ("stage",)),
                "sidecar_stage_seconds": ("Time of the slowest chunk at each sidecar, by stage", ("sidecar", "stage")),
                "sidecar_bytes": ("Frame bytes to and from each sidecar", ("sidecar", "direction")),
            }.items()
        }
        self._metrics: dict[tuple[str, str, str], Any] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sidepool-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Report what is left and end the thread. Idempotent."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(FLUSH_PERIOD_S):
            self._report()
        self._report()

    def _report(self) -> None:
        for key, increment in self._times.take().items():
            self._metric(key).increment(increment)

    def _metric(self, key: tuple[str, str, str]) -> Any:
        metric = self._metrics.get(key)
        if metric is None:
            family, names = self._families[key[0]]
            values = [v for v in key[1:] if v]
            metric = self._metrics[key] = family.Metric(labels=self._labels | dict(zip(names, values, strict=True)))
        return metric
