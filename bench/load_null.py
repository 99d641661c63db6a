"""`sidepool bench load`: what the load generator itself can do, against a server that does nothing.

The generator has one core, the null server another. At each rate: how late requests left, how long they took, and whether the gaps
between them are exponential (Kolmogorov-Smirnov). In turns with it, h2load (nghttp2's own closed loop, where it is installed): the
rate that the same server gives when nobody waits for a schedule.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import resource
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from sidepool.bench import machine
from sidepool.bench.load import LoadResult, make_schedule, run_load
from sidepool.bench.load.arrivals import poisson
from sidepool.bench.load.null_server import PATH, compile_null_server, null_server
from sidepool.bench.load.triton import GrpcTarget
from sidepool.bench.serve import make_console
from sidepool.bench.stop_signals import stopped_by_signals

RATES = (1_000, 5_000, 10_000, 20_000, 30_000, 40_000)
# Bytes of a request for one sample of a DLRM, and of its answer.
REQUEST_BYTES, REPLY_BYTES = 600, 120
ROUNDS, SECONDS, WARMUP_S = 3, 3.0, 0.5
# Calls that h2load has outstanding: enough that neither side waits for the other.
H2LOAD_CALLS, H2LOAD_REQUESTS = 64, 60_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `sidepool bench load`."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")
    parser.add_argument("--rates", type=int, nargs="+", default=RATES, metavar="QPS", help=f"default: {' '.join(map(str, RATES))}")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"alternating rounds (default: {ROUNDS})")
    parser.add_argument("--seed", type=int, default=1)


def run(args: argparse.Namespace) -> int:
    """Measure, print a table, write JSON."""
    console = make_console()
    about = machine.describe(args.seed)
    console.print("  ".join(f"{key}: {value}" for key, value in about.items()))
    cores = sorted(os.sched_getaffinity(0))
    runs: dict[int, list[dict[str, Any]]] = {rate: [] for rate in args.rates}
    ceilings: list[float] = []
    with stopped_by_signals(), tempfile.TemporaryDirectory(prefix="sidepool-load-") as work, _pinned(cores[0]):
        program = compile_null_server(Path(work))
        with null_server(program, REPLY_BYTES, cpu=cores[-1]) as (address, _):
            for turn in range(args.rounds):
                for rate in args.rates:
                    runs[rate].append(_measure(address, rate, args.seed + turn))
                ceilings += _h2load(address, Path(work))
    results = [{"rate": rate} | _medians(measured) for rate, measured in runs.items()]
    ceiling = round(statistics.median(ceilings)) if ceilings else None
    _print(console, results, ceiling)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        found = about | {"h2load_qps": ceiling, "rates": results}
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        console.print(f"written to {args.json}")
    return 0


@contextlib.contextmanager
def _pinned(cpu: int) -> Iterator[None]:
    """This process, and what it starts, on one core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cpu})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _measure(address: str, rate: int, seed: int) -> dict[str, float]:
    target = GrpcTarget(address, PATH, [bytes(REQUEST_BYTES)])
    schedule = make_schedule(poisson(rate, SECONDS, seed), 1, seed, seconds=SECONDS)
    before = resource.getrusage(resource.RUSAGE_SELF)
    result = run_load(target, schedule, warmup_s=WARMUP_S)
    after = resource.getrusage(resource.RUSAGE_SELF)
    spent_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    late_us = np.percentile(result.lateness_ns, (50, 99)) / 1e3
    return {
        "answered_qps": result.answered_qps,
        "errors": float(sum(result.errors.values())),
        "late_p50_us": float(late_us[0]),
        "late_p99_us": float(late_us[1]),
        "latency_p50_us": result.percentile_ms(50) * 1e3,
        "latency_p99_us": result.percentile_ms(99) * 1e3,
        "core_share": spent_s / SECONDS,
        **_gap_test(result, rate),
    }


def _gap_test(result: LoadResult, rate: int) -> dict[str, float]:
    """The distance of the gaps' distribution from the exponential: as scheduled, with its probability, and as sent."""
    from scipy.stats import kstest

    def test(times_ns: NDArray[np.int64]) -> Any:
        return kstest(np.diff(np.sort(times_ns[result.measured])) * (rate / 1e9), "expon")

    due = test(result.schedule.due_ns)
    return {"ks_due": float(due.statistic), "ks_due_p": float(due.pvalue), "ks_sent": float(test(result.sent_ns).statistic)}


def _h2load(address: str, work: Path) -> list[float]:
    """Requests per second of h2load's closed loop; nothing where it is not installed."""
    program = shutil.which("h2load")
    if program is None:
        return []
    body = work / "body"
    body.write_bytes(b"\0" + REQUEST_BYTES.to_bytes(4, "big") + bytes(REQUEST_BYTES))
    headers = ["-H", "content-type: application/grpc", "-H", "te: trailers"]
    command = [
        program,
        "-n",
        str(H2LOAD_REQUESTS),
        "-c",
        "1",
        "-m",
        str(H2LOAD_CALLS),
        "-d",
        str(body),
        *headers,
        f"http://{address}{PATH}",
    ]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"([\d.]+) req/s", said)
    return [float(found[1])] if found else []


def _medians(measured: list[dict[str, Any]]) -> dict[str, float]:
    return {name: round(statistics.median(m[name] for m in measured), 4) for name in measured[0]}


def _print(console: Console, results: list[dict[str, Any]], ceiling: int | None) -> None:
    table = Table(title="one core of load on a server that does nothing; times in µs", title_justify="left", box=None)
    for column in ("rate", "answered/s", "late p50", "late p99", "latency p50", "latency p99", "core", "KS as due", "p", "as sent"):
        table.add_column(column, justify="right", no_wrap=True)
    for r in results:
        times = (f"{r[name]:.0f}" for name in ("answered_qps", "late_p50_us", "late_p99_us", "latency_p50_us", "latency_p99_us"))
        tests = (f"{r[name]:.4f}" for name in ("ks_due", "ks_due_p", "ks_sent"))
        table.add_row(str(r["rate"]), *times, f"{r['core_share']:.2f}", *tests)
    console.print(table)
    said = "h2load is not installed (Debian: nghttp2-client)" if ceiling is None else f"{ceiling} requests/s"
    console.print(f"h2load, a closed loop of {H2LOAD_CALLS} calls: {said}")
