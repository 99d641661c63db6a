"""`sidepool bench start`: how soon a sidecar over page-cached shards is ready, and what memory it takes while and after promoting.

Writes shards of the given size, which leaves them in the page cache, starts a sidecar, and reads its memory from /proc until
every table lies in huge pages. `RssFile` is the mapped page cache: it belongs to the kernel and shrinks as tables are promoted.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import grpc
import numpy as np

from sidepool.bench import machine
from sidepool.bench.footprint import Footprint, footprint
from sidepool.bench.processes import Sidecar
from sidepool.bench.serve import make_console
from sidepool.bench.shard_files import make_plan, write_sidecars
from sidepool.wire import control_pb2, control_pb2_grpc
from sidepool.wire.errors import ConfigError, TransportError

DIM = 64
MIB = 1 << 20
# What is promised: ready within this for 4 GB, and at most this much memory for a sidecar's tables.
READY_S, FACTOR, CONSTANT_BYTES = 2.0, 1.10, 150 * MIB
# Starts measured; the median counts, since the first may still share the disk with what writing left behind.
STARTS = 3
SAMPLE_S = 0.01
# Copying runs at more than 1 GB/s on anything that serves tables.
PROMOTION_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Start:
    """One start: seconds until the ready file and until the last table lies in huge pages, and resident bytes."""

    ready_s: float
    promoted_s: float
    peak: Footprint
    """At the moment of the largest RSS."""
    settled: Footprint
    """After the promotion."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `sidepool bench start`."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")
    parser.add_argument("--gigabytes", type=float, default=4.0, help="bytes of all tables together (default: 4)")
    parser.add_argument("--tables", type=int, default=16, help="tables of equal size (default: 16)")
    parser.add_argument("--work-dir", type=Path, default=Path("build"), help="where the shards go meanwhile (default: build)")


def run(args: argparse.Namespace) -> int:
    """Measure, print, write JSON; 1 where a promise is not kept."""
    rows = int(args.gigabytes * 1e9) // (args.tables * DIM * 4)
    if args.tables < 1 or rows < 1:
        raise ConfigError(f"--gigabytes {args.gigabytes:g} --tables {args.tables}: allowed: at least one row per table")
    args.work_dir.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix="start-", dir=args.work_dir))
    try:
        plan = make_plan(args.tables, rows, DIM, sidecars=1)
        table_bytes = sum(table.bytes for table in plan.tables)
        numbers = np.arange(rows * DIM, dtype=np.float32).reshape(rows, DIM)
        (config,) = write_sidecars(plan, directory, lambda table: numbers)
        starts = [measure(config, directory, table_bytes) for _ in range(STARTS)]
    finally:
        shutil.rmtree(directory)
    about = machine.describe(seed=0)
    chosen = sorted(starts, key=lambda start: start.ready_s)[STARTS // 2]
    allowed = FACTOR * table_bytes + CONSTANT_BYTES
    worst = max(start.peak.rss for start in starts)
    kept = {"ready": chosen.ready_s <= READY_S, "memory": worst <= allowed}
    console = make_console()
    console.print("  ".join(f"{key}: {value}" for key, value in about.items()))
    console.print(
        f"{table_bytes / 1e9:.2f} GB in {args.tables} tables: ready after {chosen.ready_s:.2f} s (at most {READY_S:g}), "
        f"promoted after {chosen.promoted_s:.2f} s"
    )
    console.print(
        f"memory at most {worst / MIB:.0f} MiB, settled {chosen.settled.rss / MIB:.0f} MiB, of which anonymous "
        f"{chosen.settled.anonymous / MIB:.0f} MiB (at most {allowed / MIB:.0f})"
    )
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        results = {
            "machine": about,
            "table_bytes": table_bytes,
            "tables": args.tables,
            "ready_s": chosen.ready_s,
            "promoted_s": chosen.promoted_s,
            "peak_bytes": worst,
            "allowed_bytes": int(allowed),
            "kept": kept,
            "starts": [asdict(start) for start in starts],
        }
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0 if all(kept.values()) else 1


def measure(config: Path, directory: Path, table_bytes: int) -> Start:
    """Start a sidecar, watch it until everything is promoted, stop it."""
    sidecar = Sidecar(config, log=directory / "sidecar.log", ready=directory / "ready.json")
    begin = time.perf_counter()
    try:
        sidecar.start()
        assert sidecar.pid is not None
        sidecar.wait_ready()
        ready_s = time.perf_counter() - begin
        peak = footprint(sidecar.pid)
        with grpc.insecure_channel(str(sidecar.facts()["grpc"])) as channel:
            stub = control_pb2_grpc.SidecarStub(channel)  # type: ignore[no-untyped-call]
            while int(stub.Describe(control_pb2.DescribeRequest()).huge_bytes) < table_bytes:
                if time.perf_counter() - begin > PROMOTION_TIMEOUT_S:
                    raise TransportError(f"the tables were not promoted within {PROMOTION_TIMEOUT_S:g} s")
                peak = max(peak, footprint(sidecar.pid), key=lambda f: f.rss)
                time.sleep(SAMPLE_S)
        promoted_s = time.perf_counter() - begin
        # The last table counts as promoted just before its mapped pages are given back.
        time.sleep(0.2)
        seen = footprint(sidecar.pid)
        return Start(ready_s, promoted_s, max(peak, seen, key=lambda f: f.rss), seen)
    finally:
        sidecar.stop()
