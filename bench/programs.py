"""`sidepool bench programs`: attention in the sidecar or behind it.

DeepRecSys's DIN (250 behaviours of 32 floats), partitioned with and without programs, each behind a sidecar process of its own.
What one lookup carries, and how long the whole takes: index arithmetic, lookup, dense net, on the CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from sidepool.bench.machine import describe
from sidepool.bench.models.deeprecsys import SIZES, deeprecsys, inputs
from sidepool.bench.processes import running_sidecars
from sidepool.bench.serve import make_console
from sidepool.bench.triton_server import free_ports
from sidepool.client import Pipeline
from sidepool.client.lanes import Lane
from sidepool.partition import partition_model

SEED = 12
# A behaviours table of 12.8 MB: beyond the level-2 cache, quick to write.
ROWS = 100_000
BATCHES = (1, 16, 128)
# Medians over this many calls, each variant in turn: neither sees other weather than the other.
CALLS = 60
# Distinct requests, so that no variant answers from its cache lines alone.
REQUESTS = 16

Figures = dict[int, dict[str, dict[str, float]]]
"""Samples → variant → what was measured."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `sidepool bench programs`."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")
    parser.add_argument("--lane", choices=("shm", "tcp"), default="tcp", help="to the sidecars (default: tcp, over loopback)")


def run(args: argparse.Namespace) -> int:
    """Measure, print, write JSON."""
    about, found = describe(SEED), measure(args.lane)
    console = make_console()
    console.print("  ".join(f"{key}: {value}" for key, value in about.items()))
    for batch, variants in found.items():
        for name, figures in variants.items():
            there, back, median_ms = figures["request_bytes"], figures["response_bytes"], figures["p50_us"] / 1e3
            console.print(f"{batch:>4} samples, {name:<12}  {there:>9,.0f} B there  {back:>9,.0f} B back  {median_ms:7.2f} ms")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        result = {"machine": about, "lane": args.lane, "batches": found}
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def measure(lane: Lane, batches: Sequence[int] = BATCHES, calls: int = CALLS, rows: int = ROWS) -> Figures:
    """Per batch size and variant: bytes of request and response, and the median of a call in microseconds."""
    torch.manual_seed(SEED)
    torch.set_num_threads(1)  # the sidecars run on the same machine
    model, example = deeprecsys("din", max_rows=rows)
    with contextlib.ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sidepool-bench-programs-")))
        ports = free_ports(2)
        variants = {"lookups only": False, "program": True}
        reports = {
            name: partition_model(
                model, example, root / str(i), name="din", sidecars=1, addresses=[f"127.0.0.1:{ports[i]}"], programs=programs
            )
            for i, (name, programs) in enumerate(variants.items())
        }
        configs = [root / str(i) / "sidecars/sidecar-0/sidecar.yaml" for i in range(2)]
        stack.enter_context(running_sidecars(configs, work_dir=root / "logs"))
        pipelines = {name: stack.enter_context(Pipeline.open(r.out_dir, lane=lane)) for name, r in reports.items()}
        table_rows = [min(n, rows) for n in SIZES["din"].rows]
        found: Figures = {}
        for batch in batches:
            given = [inputs("din", table_rows, batch) for _ in range(REQUESTS)]
            times = _in_turn(pipelines, given, calls)
            found[batch] = {
                name: {
                    "request_bytes": report.wire_bytes(0, batch)[0],
                    "response_bytes": report.wire_bytes(0, batch)[1],
                    "p50_us": statistics.median(times[name]) * 1e6,
                }
                for name, report in reports.items()
            }
        return found


def _in_turn(pipelines: dict[str, Pipeline], given: Sequence[tuple[Tensor, ...]], calls: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in pipelines}
    for i in range(calls + len(given)):
        for name, pipeline in pipelines.items():
            began = time.perf_counter()
            pipeline(*given[i % len(given)])
            if i >= len(given):  # the first pass over the requests warms up
                times[name].append(time.perf_counter() - began)
    return times
