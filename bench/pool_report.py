"""The results of `sidepool bench pool`: as a table, as JSON, as a picture."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sidepool.bench.pool_cases import Shape

# The ids of the picture and of the table in docs/performance.md: the worst case for any cache.
PLOTTED_IDS = "uniform"
# Nothing in the picture needs more; keeps the file below 100 KB.
PLOT_DPI = 110


@dataclass(frozen=True)
class Case:
    """Medians, in microseconds per batch, of everyone who looked up the same batches. None: not measured."""

    shape: Shape
    ids: str
    row_format: str
    threads: int
    ours_us: float
    fbgemm_us: float
    fbgemm_module_us: float | None
    torch_us: float | None
    ceiling_us: float
    ours_cached_us: float | None = None
    """Ours over rows that a core's own cache holds."""

    @property
    def ratios(self) -> dict[str, float | None]:
        """How many times faster we are (`vs_ceiling`: what share of its speed we reach)."""
        return {
            "vs_fbgemm": self.fbgemm_us / self.ours_us,
            "vs_fbgemm_module": self.fbgemm_module_us and self.fbgemm_module_us / self.ours_us,
            "vs_torch": self.torch_us and self.torch_us / self.ours_us,
            "vs_ceiling": self.ceiling_us / self.ours_us,
        }

    def as_json(self) -> dict[str, Any]:
        rounded = {k: v and round(v, 3) for k, v in self.ratios.items()}
        times = {k: v and round(v, 2) for k, v in asdict(self).items() if k.endswith("_us")}
        shape = asdict(self.shape) | {"ids_per_batch": self.shape.batch * sum(self.shape.ids)}
        shape["ids_per_bag"] = shape.pop("ids")
        name = shape.pop("name")
        return {"shape": name, "ids": self.ids, "row_format": self.row_format, "threads": self.threads} | times | rounded | shape


def summarise(cases: Sequence[Case]) -> dict[str, Any]:
    """Per row format and number of threads: geometric mean and worst case of every ratio; and how two threads scale."""
    summary: dict[str, Any] = {}
    for (row_format, threads), held in _grouped(cases):
        entry: dict[str, Any] = {}
        for name in held[0].ratios:
            known = [ratio for case in held if (ratio := case.ratios[name]) is not None]
            if known:
                entry[name] = _mean_and_worst(known)
        summary[f"{row_format}, {threads} thread{'s' if threads > 1 else ''}"] = entry
    one = {(c.shape.name, c.ids, c.row_format): c for c in cases if c.threads == 1}
    scaling = [one[c.shape.name, c.ids, c.row_format].ours_us / c.ours_us for c in cases if c.threads == 2]
    summary["two threads over one"] = _mean_and_worst(scaling)
    return summary


def _mean_and_worst(ratios: Sequence[float]) -> dict[str, float]:
    return {"geometric_mean": round(statistics.geometric_mean(ratios), 3), "worst": round(min(ratios), 3)}


def _grouped(cases: Sequence[Case]) -> list[tuple[tuple[str, int], list[Case]]]:
    def key(case: Case) -> tuple[str, int]:
        return case.row_format, case.threads

    return [(k, list(held)) for k, held in itertools.groupby(sorted(cases, key=key), key)]


def print_report(console: Console, cases: Sequence[Case]) -> None:
    """A line per case, then the means."""
    table = Table(title="µs per batch; how many times faster we are", title_justify="left", box=None)
    heads = ("shape", "ids", "rows", "threads", "ours", "FBGEMM", "its module", "torch", "ceiling", "cached")
    for column in (*heads, "vs FBGEMM", "vs module", "vs torch", "of ceiling"):
        table.add_column(column, justify="right", no_wrap=True)
    for c in cases:
        times = (c.ours_us, c.fbgemm_us, c.fbgemm_module_us, c.torch_us, c.ceiling_us, c.ours_cached_us)
        shown = [_cell(us, 1) for us in times] + [_cell(ratio, 2) for ratio in c.ratios.values()]
        table.add_row(c.shape.name, c.ids, c.row_format, str(c.threads), *shown)
    console.print(table)
    for name, entry in summarise(cases).items():
        console.print(f"{name}: {entry}")


def _cell(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def plot(cases: Sequence[Case], path: Path) -> None:
    """Bytes of rows per second with one thread, and the ratio to FBGEMM per row format, as PNG."""
    from matplotlib.figure import Figure

    held = [c for c in cases if c.ids == PLOTTED_IDS and c.threads == 1]
    fp32 = [c for c in held if c.row_format == "fp32"]
    names = [c.shape.name.removeprefix("26 x ") for c in fp32]
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    above, below = figure.subplots(2, 1)
    speeds = {
        "sidepool": [_gb_per_s(c, c.ours_us) for c in fp32],
        "FBGEMM": [_gb_per_s(c, c.fbgemm_us) for c in fp32],
        "torch": [_gb_per_s(c, c.torch_us) for c in fp32],
        "gather ceiling": [_gb_per_s(c, c.ceiling_us) for c in fp32],
    }
    _bars(above, names, speeds)
    above.set_ylabel("GB/s of rows, fp32")
    above.set_title(f"Gather and pool, one thread, {PLOTTED_IDS} ids", loc="left")
    formats = dict.fromkeys(c.row_format for c in held)
    ratios = {f: [c.fbgemm_us / c.ours_us for c in held if c.row_format == f] for f in formats}
    _bars(below, names, ratios)
    below.axhline(1, color="black", linewidth=0.8)
    below.set_yscale("log", base=2)
    below.yaxis.set_major_formatter("{x:g}")
    below.set_ylabel("times faster than FBGEMM")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=PLOT_DPI)


def _bars(axes: Any, names: Sequence[str], series: dict[str, list[float]]) -> None:
    width = 0.8 / len(series)
    for k, (label, values) in enumerate(series.items()):
        axes.bar([i + (k - (len(series) - 1) / 2) * width for i in range(len(names))], values, width, label=label)
    axes.set_xticks(range(len(names)), names)
    axes.legend(ncols=len(series), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def _gb_per_s(case: Case, us: float | None) -> float:
    row_bytes = case.shape.batch * sum(case.shape.ids) * case.shape.dim * 4
    return 0.0 if us is None else row_bytes / us / 1e3
