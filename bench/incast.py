"""`sidepool bench incast`: many sidecars answer one ranker at once, over a cable that cannot take it.

Ranker and sidecars are machines of their own (network namespaces) on one switch, whose queue for the ranker is shallow: what all
of them send at once overflows it. Requests come at random moments, more than the cable can carry, and count as good where
they are answered within the limit from the moment they were due. Two ways take turns: no bound on what is under way and first come,
first served (what the network does with it is TCP's affair), and the receive window with earliest deadline first.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import signal
import statistics
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from sidepool.bench import machine
from sidepool.bench.namespaces import CannotShape, Link, Machine, star
from sidepool.bench.processes import running_sidecars
from sidepool.bench.serve import make_console
from sidepool.bench.shard_files import make_plan, write_sidecars
from sidepool.bench.stop_signals import stopped_by_signals
from sidepool.client import EmbeddingClient
from sidepool.client.lanes import DEFAULT_WINDOW_DELAY_US
from sidepool.wire.errors import SidepoolError
from sidepool.wire.plan import Plan

SIDECARS = 6
# One table per sidecar: each answers a lookup with 16 KiB, more than a first flight of TCP, and all of them with 96.
ROWS, DIM, BATCH = 2000, 64, 64
# Slow enough that two cores are never the bottleneck; the queue is less than one lookup's answers.
CABLE = Link(gbps=0.2, queue_bytes=64 << 10)
# Linux's own; namespaces would take over whatever this machine runs.
CONGESTION_CONTROL = "cubic"
# Ten times an idle lookup.
LIMIT_MS = 50.0
# Issue and README promise this much more good requests at OVERLOAD; HALF shows that nothing is lost where there is room.
OVERLOAD, HALF, TARGET = 1.3, 0.5, 1.5
ROUNDS, ROUND_S, REST_S = 5, 4.0, 0.5
# The cable's capacity is what so many callers get through it who always have one lookup under way each.
CAPACITY_CALLERS, CAPACITY_S = 2, 3.0
# More than are ever under way: each is over, one way or another, at its limit.
THREADS = 64
PATIENT_MS = 60_000.0


@dataclass(frozen=True)
class Way:
    """One of the two that are compared; its sidecars listen at `port`, beside the other's."""

    name: str
    order: str
    window_delay_us: int
    port: int


WAYS = (Way("unlimited+fcfs", "fcfs", 0, 50151), Way("window+edf", "edf", DEFAULT_WINDOW_DELAY_US, 50152))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `sidepool bench incast`."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"rounds of both ways in turn (default: {ROUNDS})")
    parser.add_argument("--seconds", type=float, default=ROUND_S, help=f"of either way in a round (default: {ROUND_S:g})")
    parser.add_argument("--limit-ms", type=float, default=LIMIT_MS, help=f"within which an answer is good (default: {LIMIT_MS:g})")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--work-dir", type=Path, default=Path("build"), help="where shards go meanwhile (default: build)")


def run(args: argparse.Namespace) -> int:
    """Measure, print, write JSON; 1 where the promise is not kept or machines cannot be made here."""
    console = make_console()
    about = machine.describe(args.seed)
    console.print("  ".join(f"{key}: {value}" for key, value in about.items()))
    args.work_dir.mkdir(parents=True, exist_ok=True)
    try:
        with stopped_by_signals():
            results = measure(args.work_dir, args.rounds, args.seconds, args.limit_ms, args.seed)
    except CannotShape as e:
        console.print(f"no shaped cables on this machine: {e}")
        return 1
    table = Table(title=f"answered within {args.limit_ms:g} ms, medians of {args.rounds} rounds", title_justify="left")
    for column in ("load", "way", "offered/s", "good/s", "share", "p50 ms", "p99 ms", "dropped packets"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for load, ways in results["loads"].items():
        for name, r in ways.items():
            drops, share = f"{r['dropped_packets']:.0f}", f"{r['share']:.1%}"
            table.add_row(load, name, *(f"{r[key]:.1f}" for key in ("offered_per_s", "good_per_s")), share,
                          *(f"{r[key]:.1f}" for key in ("p50_ms", "p99_ms")), drops)  # fmt: skip
    console.print(table)
    kept = results["ratio"] >= TARGET
    console.print(f"capacity {results['capacity_per_s']:.0f}/s; the cable's line rate {results['line_per_s']:.0f}/s")
    console.print(f"at {OVERLOAD:g} times capacity, good requests: {results['ratio']:.2f} times (promised: {TARGET:g})")
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        content = about | {"limit_ms": args.limit_ms, "target": TARGET, "kept": kept} | results
        args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        console.print(f"written to {args.json}")
    return 0 if kept else 1


def measure(work_dir: Path, rounds: int, seconds: float, limit_ms: float, seed: int) -> dict[str, Any]:
    """Both ways at both loads; raises `CannotShape`."""
    with star(1 + SIDECARS, CABLE) as (ranker, *machines), _served(work_dir, machines) as plans:
        for each in (ranker, *machines):
            _set_congestion_control(each)
        with get_context("spawn").Pool(1, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as caller:
            # Which is ended, not waited for, where this is interrupted.
            results: dict[str, Any] = caller.apply(_call_in_turn, (ranker, plans, rounds, seconds, limit_ms, seed))
    cable = asdict(CABLE) | {"sidecars": SIDECARS, "congestion_control": CONGESTION_CONTROL}
    return {"cable": cable, **results}


@contextlib.contextmanager
def _served(work_dir: Path, machines: Sequence[Machine]) -> Iterator[list[Plan]]:
    """A plan for each way, with all sidecars of both running."""
    rows = np.random.default_rng(3).standard_normal((ROWS, DIM)).astype(np.float32)
    directory = Path(tempfile.mkdtemp(prefix="incast-", dir=work_dir))
    try:
        plans, configs = [], []
        for way in WAYS:
            plans.append(make_plan(SIDECARS, ROWS, DIM, SIDECARS, [f"{each.address}:{way.port}" for each in machines]))
            (place := directory / way.order).mkdir()
            configs += write_sidecars(plans[-1], place, lambda table: rows, {"order": way.order, "promote": False})
        with running_sidecars(configs, work_dir=directory, machines=[*machines, *machines]):
            yield plans
    finally:
        shutil.rmtree(directory)


def _set_congestion_control(each: Machine) -> None:
    """By its route: the system's setting may not be changed everywhere, and nothing outside is to change."""
    network = f"{each.address.rpartition('.')[0]}.0/24"
    words = ["ip", "route", "replace", network, "dev", "eth0", "src", each.address, "scope", "link", "congctl", CONGESTION_CONTROL]
    done = subprocess.run(each.command(words), capture_output=True, text=True)
    if done.returncode != 0:
        raise CannotShape(f"{' '.join(words)}: {done.stderr.strip()}")


@dataclass(frozen=True)
class _Served:
    """A client, and what it asks for in turn."""

    client: EmbeddingClient
    parts: Sequence[NDArray[np.int64]]

    def lookup(self, number: int, deadline_ms: float) -> None:
        """One lookup; raises what it ends with."""
        result = self.client.lookup_parts([(self.parts[number % len(self.parts)], None, None)], deadline_ms=deadline_ms)
        if result.errors[0] is not None:
            raise result.errors[0]


def _call_in_turn(
    ranker: Machine, plans: Sequence[Plan], rounds: int, seconds: float, limit_ms: float, seed: int
) -> dict[str, Any]:
    """In a process of the ranker's machine."""
    ranker.enter()
    random = np.random.default_rng(seed)
    parts = [random.integers(0, ROWS, (BATCH, SIDECARS)) for _ in range(64)]
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(THREADS))
        served = []
        for way, plan in zip(WAYS, plans, strict=True):
            client = EmbeddingClient.connect(plan, lane="tcp", window_delay_us=way.window_delay_us)
            served.append(_Served(stack.enter_context(client), parts))
        line, capacity = _line_per_s(served[0]), max(_capacity(each, pool) for each in served)
        loads: dict[str, dict[str, Any]] = {}
        for load in (HALF, OVERLOAD):
            taken: dict[str, list[dict[str, Any]]] = {way.name: [] for way in WAYS}
            for _ in range(rounds):
                due = np.cumsum(random.exponential(1 / (load * capacity), int(load * capacity * seconds)))
                for way, each in zip(WAYS, served, strict=True):
                    before = ranker.dropped_packets()
                    found = _offer(each, pool, due, limit_ms)
                    time.sleep(REST_S)  # what is still on its way belongs to this round
                    taken[way.name].append(found | {"dropped_packets": ranker.dropped_packets() - before})
            loads[f"{load:g}x"] = {name: _medians(each) | {"rounds": each} for name, each in taken.items()}
        windows = {way.name: each.client.stats()["window"] for way, each in zip(WAYS, served, strict=True)}
    unlimited, window = (loads[f"{OVERLOAD:g}x"][way.name]["good_per_s"] for way in WAYS)
    return {
        "capacity_per_s": capacity,
        "line_per_s": line,
        "loads": loads,
        "ratio": window / max(unlimited, 1e-9),
        "windows": windows,
    }


def _line_per_s(served: _Served) -> float:
    """Lookups per second whose answers fill the cable without a gap: Ethernet frames of 1538 bytes on it carry 1448 of TCP."""
    timings = served.client.lookup_parts([(served.parts[0], None, None)], deadline_ms=PATIENT_MS).timings
    return CABLE.gbps * 1e9 / 8 / (sum(each.response_bytes for each in timings.sidecars) * 1538 / 1448)


def _capacity(served: _Served, pool: ThreadPoolExecutor) -> float:
    """Lookups per second that the cable carries."""
    end = time.monotonic() + CAPACITY_S

    def call(first: int) -> int:
        count = 0
        while time.monotonic() < end:
            served.lookup(first + count, PATIENT_MS)
            count += 1
        return count

    return sum(pool.map(call, range(CAPACITY_CALLERS))) / CAPACITY_S


def _offer(served: _Served, pool: ThreadPoolExecutor, due: NDArray[np.float64], limit_ms: float) -> dict[str, Any]:
    """Requests at the moments `due` (seconds from now), whether or not others are answered: what became of them."""
    begin = time.monotonic()

    def call(number: int) -> tuple[str, float]:
        left_ms = limit_ms - (time.monotonic() - begin - due[number]) * 1e3
        try:
            if left_ms <= 0:
                return "DEADLINE", limit_ms
            served.lookup(number, left_ms)
        except SidepoolError as e:
            return e.code, limit_ms
        took_ms = (time.monotonic() - begin - due[number]) * 1e3
        return ("good" if took_ms <= limit_ms else "late"), took_ms

    calls = []
    for number, at in enumerate(due.tolist()):
        time.sleep(max(0.0, begin + at - time.monotonic()))
        calls.append(pool.submit(call, number))
    ends = [each.result() for each in calls]
    outcomes = Counter(outcome for outcome, _ in ends)
    p50, p99 = np.percentile([took_ms for _, took_ms in ends], (50, 99))
    span = float(due[-1])
    return {
        "offered_per_s": len(due) / span,
        "good_per_s": outcomes["good"] / span,
        "share": outcomes["good"] / len(due),
        "p50_ms": float(p50),
        "p99_ms": float(p99),
        "outcomes": dict(outcomes),
    }


def _medians(rounds: Sequence[dict[str, Any]]) -> dict[str, float]:
    keys = [key for key, value in rounds[0].items() if not isinstance(value, dict)]
    return {key: statistics.median(each[key] for each in rounds) for key in keys}
