"""Where the time goes: the ranker's stage metrics and Triton's own queue statistics, read before and after some traffic."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from sidepool.bench.triton_server import TritonServer

# The ranker reports once a second.
REPORT_PERIOD_S = 1.0

_LINE = re.compile(r"^sidepool_ranker_(\w+)_total\{([^}]*)\} (\S+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')
_RANKER_STAGES = ("tensors_in", "routing", "merge", "dense", "tensors_out")
_SIDECAR_STAGES = ("lane_out", "queue", "pool", "lane_back")
SIDECAR_TITLES = {"lane_out": "lane out", "queue": "sidecar queue", "pool": "gather+pool", "lane_back": "lane back"}


@dataclass(frozen=True)
class Snapshot:
    """Running totals of one model: `(metric, labels…) -> value`, and Triton's queue as `(requests, ns)`."""

    metrics: Mapping[tuple[str, ...], float]
    queue: tuple[int, int]


@dataclass(frozen=True)
class Stages:
    """Mean microseconds per execute between two snapshots (the queue: per request)."""

    queue_us: float
    ranker_us: Mapping[str, float]
    sidecar_us: Mapping[str, Mapping[str, float]]
    sidecar_bytes: Mapping[str, tuple[float, float]]
    """Per sidecar: request and response bytes per execute."""
    requests_per_execute: float


def snapshot(server: TritonServer, model: str) -> Snapshot:
    """Totals of `model` now; waits until the ranker has reported what came before."""
    time.sleep(1.2 * REPORT_PERIOD_S)
    metrics: dict[tuple[str, ...], float] = {}
    for name, text, value in _LINE.findall(server.metrics()):
        labels = dict(_LABEL.findall(text))
        if labels.pop("model") == model:
            labels.pop("version")
            metrics[(name, *(labels[key] for key in sorted(labels, key=_label_order)))] = float(value)
    queue = server.get_json(f"/v2/models/{model}/stats")["model_stats"][0]["inference_stats"]["queue"]
    return Snapshot(metrics, (int(queue["count"]), int(queue["ns"])))


def between(before: Snapshot, after: Snapshot) -> Stages:
    """Means over what happened between two snapshots."""

    def grew(*key: str) -> float:
        return after.metrics.get(key, 0.0) - before.metrics.get(key, 0.0)

    executes = max(grew("executes"), 1.0)
    sidecars = sorted({key[1] for key in after.metrics if key[0] == "sidecar_stage_seconds"})
    queued = max(after.queue[0] - before.queue[0], 1)
    return Stages(
        queue_us=(after.queue[1] - before.queue[1]) / queued / 1e3,
        ranker_us={stage: 1e6 * grew("stage_seconds", stage) / executes for stage in _RANKER_STAGES},
        sidecar_us={
            name: {stage: 1e6 * grew("sidecar_stage_seconds", name, stage) / executes for stage in _SIDECAR_STAGES}
            for name in sidecars
        },
        sidecar_bytes={
            name: (grew("sidecar_bytes", name, "request") / executes, grew("sidecar_bytes", name, "response") / executes)
            for name in sidecars
        },
        requests_per_execute=grew("requests") / executes,
    )


def _label_order(label: str) -> int:
    """`sidecar` comes before what qualifies it."""
    return 0 if label == "sidecar" else 1


def print_stages(console: Console, stages: Stages) -> None:
    """Where the time of one execute goes, in the order in which it passes."""
    table = Table(
        title=f"where the time goes: µs per execute ({stages.requests_per_execute:.1f} requests each)", title_justify="left"
    )
    names = list(stages.sidecar_us)
    for column in ("stage", "ranker", *names):
        table.add_column(column, justify="left" if column == "stage" else "right")
    blank = [""] * len(names)
    own = stages.ranker_us
    table.add_row("Triton queue (per request)", f"{stages.queue_us:.0f}", *blank)
    table.add_row("tensors in", f"{own['tensors_in']:.0f}", *blank)
    table.add_row("routing", f"{own['routing']:.0f}", *blank)
    for stage, title in SIDECAR_TITLES.items():
        table.add_row(title, "", *(f"{stages.sidecar_us[name][stage]:.0f}" for name in names))
    table.add_row("merge", f"{own['merge']:.0f}", *blank)
    table.add_row("dense", f"{own['dense']:.0f}", *blank)
    table.add_row("tensors out", f"{own['tensors_out']:.0f}", *blank)
    kilobytes = (f"{request / 1e3:.1f} / {response / 1e3:.1f}" for request, response in stages.sidecar_bytes.values())
    table.add_row("kB out / back", "", *kilobytes)
    console.print(table)
