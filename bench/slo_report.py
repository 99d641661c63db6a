"""What `sidepool bench slo` found: figures over all models, a table, a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sidepool.bench.tuning.rates import LEAST

Results = Mapping[str, Mapping[str, Any]]
"""By model: what `sidepool.bench.slo.Model.measure` returns."""

SYSTEMS = ("monolithic", "static", "tuned")
DPI = 110


def summary(models: Results) -> dict[str, Any]:
    """Geometric means of ratios of highest rates, and of p99 at half load, over the models of which all systems meet the limit."""
    over = {name: model for name, model in models.items() if all(model["highest_qps"]["1"][system] for system in SYSTEMS)}
    rates = [model["highest_qps"]["1"] for model in over.values()]
    return {
        "over": list(over),
        "left_out": {name: model["unmet"] for name, model in models.items() if name not in over},
        "tuned_over_static": _mean([(r["tuned"], r["static"]) for r in rates]),
        "tuned_over_monolithic": _mean([(r["tuned"], r["monolithic"]) for r in rates]),
        "p99_at_half_load_tuned_over_monolithic": _mean([(_p99(m, "tuned"), _p99(m, "monolithic")) for m in over.values()]),
    }


def _mean(pairs: list[tuple[float, float]]) -> float | None:
    return round(math.exp(sum(math.log(ours / theirs) for ours, theirs in pairs) / len(pairs)), 3) if pairs else None


def _p99(model: Mapping[str, Any], system: str) -> float:
    """The least of the turns: what else the machine did is in the others; infinite where nothing was measured."""
    turns = model["fixed_rate"].get("latencies", {}).get(system, [])
    return min((float(turn["p99_ms"]) for turn in turns), default=math.inf)


def print_summary(console: Console, models: Results) -> None:
    """Rates within the published limits, ratios, and p99 at half of the monolithic model's rate."""
    table = Table(title="requests/s with p95 within the limit", title_justify="left")
    table.add_column("model, limit")
    for column in (*SYSTEMS, "tuned/static", "tuned/monolithic", "p99 ms at half load, tuned / monolithic"):
        table.add_column(column, justify="right")
    for name, model in models.items():
        for share, rates in model["highest_qps"].items():
            limit = f"{float(share) * model['limit']['ms']:g} ms"
            half = f"{_p99(model, 'tuned'):.1f} / {_p99(model, 'monolithic'):.1f}" if share == "1" else ""
            ratios = (_ratio(rates["tuned"], rates[other]) for other in ("static", "monolithic"))
            table.add_row(f"{name}, {limit}", *(f"{rates[s]:.1f}" for s in SYSTEMS), *ratios, half)
    console.print(table)
    for what, value in summary(models).items():
        console.print(f"{what}: {'unknown' if value is None else value}")


def _ratio(ours: float, theirs: float) -> str:
    return f"{ours / theirs:.2f}" if theirs else "-"


def plot(models: Results, path: Path) -> None:
    """A PNG: per model a bar for each system that meets the limit at any rate."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(SYSTEMS)
    for i, system in enumerate(SYSTEMS):
        rates = [model["highest_qps"]["1"] for model in models.values()]
        places = [k + (i - 1) * width for k in range(len(models))]
        bars = axes.bar(places, [r[system] for r in rates], width, label=system)
        axes.bar_label(bars, [f"{r[system]:.3g}" for r in rates], fontsize=7)
    axes.set_yscale("log")
    highest = max((rate for model in models.values() for rate in model["highest_qps"]["1"].values()), default=1.0)
    axes.set_ylim(LEAST, 2 * max(highest, 1.0))
    axes.set_xticks(range(len(models)), [f"{name}\n{m['limit']['ms']:g} ms" for name, m in models.items()])
    axes.set(ylabel="requests/s", title="Highest Poisson rate with p95 within the limit")
    figure.legend(loc="outside lower center", frameon=False, ncols=len(SYSTEMS))
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
