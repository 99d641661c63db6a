"""`sidepool bench serve`: the partitioned and the monolithic model in one Triton, measured alternately."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from sidepool.bench import machine
from sidepool.bench.deployment import DISAGGREGATED, MONOLITHIC, deployed
from sidepool.bench.measure import CLIENTS, ROUNDS, Measured, Shape, blocks, compare, ratios
from sidepool.bench.models import dlrm
from sidepool.bench.stop_signals import stopped_by_signals
from sidepool.bench.traffic import fixed_request, jagged_request

# Distinct requests per shape: enough that their rows do not all stay in the last-level cache.
REQUESTS = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `sidepool bench serve`."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")
    parser.add_argument("--work-dir", type=Path, default=Path("build/bench"), metavar="DIR", help="default: build/bench")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"alternating rounds per shape (default: {ROUNDS})")
    parser.add_argument("--lane", choices=("shm", "tcp", "grpc"), default="shm", help="default: shm")
    parser.add_argument("--seed", type=int, default=1)


def run(args: argparse.Namespace) -> int:
    """Measure, print a table, write JSON."""
    console = make_console()
    about = machine.describe(args.seed)
    console.print("  ".join(f"{key}: {value}" for key, value in about.items()))
    results: dict[str, dict[str, Measured]] = {}
    with stopped_by_signals():
        for variant, build in (("single", dlrm.single_id), ("multi", dlrm.multi_hot)):
            results |= _measure(variant, build(seed=args.seed), args, console)
    print_comparison(console, results)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(
            json.dumps(about | {"lane": args.lane, "shapes": comparison_json(results)}, indent=1) + "\n", encoding="utf-8"
        )
        console.print(f"written to {args.json}")
    return 0


def _measure(variant: str, built: tuple[Any, Any], args: argparse.Namespace, console: Console) -> dict[str, dict[str, Measured]]:
    shapes = benchmark_shapes(variant, args.seed)
    model, example_inputs = built
    with deployed(
        model, example_inputs, directory=args.work_dir / variant, work_dir=args.work_dir, lane=args.lane, step=console.print
    ) as deployment:
        return measure_shapes(deployment.server.grpc, shapes, rounds=args.rounds, console=console)


def benchmark_shapes(variant: str, seed: int) -> list[Shape]:
    """1 and 128 single-id samples, or 128 samples with 20 ids per bag; uniform ids, the worst case for any cache."""
    rng = np.random.default_rng(seed)
    rows = dlrm.table_rows()

    def dense(samples: int) -> Any:
        return rng.standard_normal((samples, dlrm.DENSE_FEATURES), dtype=np.float32)

    def fixed(samples: int) -> Any:
        return fixed_request(dense(samples), np.stack([rng.integers(0, n, samples) for n in rows], axis=1))

    def jagged(samples: int, ids: int) -> Any:
        lengths = np.full((len(rows), samples), ids, np.int32)
        return jagged_request(dense(samples), lengths, np.concatenate([rng.integers(0, n, samples * ids) for n in rows]))

    if variant == "single":
        return [
            Shape("1 sample", [fixed(1) for _ in range(REQUESTS)]),
            Shape("128 samples", [fixed(128) for _ in range(REQUESTS)]),
        ]
    return [Shape("128 samples x 20 ids", [jagged(128, 20) for _ in range(REQUESTS)])]


def measure_shapes(address: str, shapes: list[Shape], *, rounds: int, console: Console) -> dict[str, dict[str, Measured]]:
    """Every shape on both models, alternately, with a progress bar."""
    models = (DISAGGREGATED, MONOLITHIC)
    results = {}
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("measuring", total=len(shapes) * len(models) * blocks(rounds))
        for shape in shapes:
            progress.update(task, description=f"measuring {shape.title}")
            results[shape.title] = compare(address, models, shape, rounds=rounds, progress=lambda: progress.advance(task))
    return results


def make_console() -> Console:
    """A console as wide as the terminal, or wide enough for the tables where there is none."""
    return Console(width=None if sys.stdout.isatty() else 132, highlight=False, markup=False)


def print_comparison(console: Console, results: Mapping[str, Mapping[str, Measured]]) -> None:
    """Disaggregated and monolithic side by side, with the ratio of each number."""
    table = Table(title="disaggregated / monolithic (ratio)", title_justify="left")
    table.add_column("request")
    for column in ("p50 µs", "p95 µs", "p99 µs", "requests/s, 1 client", f"requests/s, {CLIENTS} clients"):
        table.add_column(column, justify="right")
    for title, measured in results.items():
        ours, theirs = measured[DISAGGREGATED].as_json(), measured[MONOLITHIC].as_json()
        ratio = ratios(measured[DISAGGREGATED], measured[MONOLITHIC])
        table.add_row(title, *(f"{ours[n]:.0f} / {theirs[n]:.0f} ({ratio[n]:.2f})" for n in ours))
    console.print(table)


def comparison_json(results: Mapping[str, Mapping[str, Measured]]) -> dict[str, Any]:
    """The same as plain data."""
    return {
        title: {
            "disaggregated": measured[DISAGGREGATED].as_json(),
            "monolithic": measured[MONOLITHIC].as_json(),
            "ratio": ratios(measured[DISAGGREGATED], measured[MONOLITHIC]),
        }
        for title, measured in results.items()
    }
