"""A run as a picture: latency over time, rates over time, latency by percentile."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sidepool.bench.load.result import LoadResult
from sidepool.bench.load.target import OK

DPI = 110
# Bins of time: fine enough for bursts of a second in a run of minutes.
BINS = 120
# Dots beyond this many hide one another.
MOST_DOTS = 20_000


def plot(result: LoadResult, path: Path) -> None:
    """Write a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 9), layout="constrained")
    above, middle, below = figure.subplots(3, 1)
    due_s = result.schedule.due_ns / 1e9
    ok = result.status == OK
    latency_ms = (result.done_ns - result.schedule.due_ns) / 1e6
    dots = np.flatnonzero(ok)[:: max(1, int(ok.sum()) // MOST_DOTS)]
    above.plot(due_s[dots], latency_ms[dots], ".", markersize=2, alpha=0.5)
    above.set(yscale="log", ylabel="latency, ms", title="Latency of answered requests, by when they were due")
    if result.slo_ms is not None:
        above.axhline(result.slo_ms, color="red", linewidth=0.8, label=f"limit {result.slo_ms:g} ms")
        above.legend(frameon=False)
    edges = np.linspace(0.0, max(result.schedule.seconds, 1e-3), BINS + 1)
    width = edges[1] - edges[0]
    for label, times in (("due", due_s), ("answered", result.done_ns[ok] / 1e9), ("errors", result.done_ns[~ok] / 1e9)):
        middle.stairs(np.histogram(times, edges)[0] / width, edges, label=label)
    middle.set(ylabel="per second", xlabel="s")
    middle.legend(ncols=3, frameon=False)
    if result.latency_ns.size:
        tails = np.logspace(0, -min(5.0, np.log10(result.latency_ns.size)), 200)
        below.plot(1 / tails, np.percentile(result.latency_ns, 100 * (1 - tails)) / 1e6)
    below.set(xscale="log", yscale="log", ylabel="latency, ms", xlabel="one request in … is slower")
    for axes in (above, middle, below):
        axes.spines[["top", "right"]].set_visible(False)
        axes.axvspan(0, result.warmup_s, color="grey", alpha=0.2) if axes is not below and result.warmup_s else None
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
