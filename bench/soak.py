"""`sidepool bench soak`: many client processes at full load against two sidecars, for minutes.

Every value is verified (rows are known in closed form). Resident memory of every process is sampled from /proc, and its
slope after the first minute tells a leak; descriptors, lanes and shared memory are counted before and after. Two further
clients, one per lane, are stopped in the middle of their lookups for as long as the others work, which must not feel it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from sidepool.bench import machine
from sidepool.bench.footprint import Footprint, footprint
from sidepool.bench.processes import Sidecar, running_sidecars
from sidepool.bench.serve import make_console
from sidepool.bench.shard_files import make_plan, write_sidecars
from sidepool.bench.soak_client import DIM, ROWS, TABLES, row_value
from sidepool.bench.stop_signals import stopped_by_signals
from sidepool.wire import control_pb2, control_pb2_grpc
from sidepool.wire.errors import ConfigError, TransportError

SIDECARS = 2
LANES = ("shm", "tcp")
# Caches, arenas and slots fill for a while; what grows after this is a leak. Half of a run that is shorter than two minutes.
WARM_UP_S = 60.0
# What is promised for every process after the warm-up.
MAX_MB_PER_MINUTE = 1.0
SAMPLE_S = 1.0
REPORT_S = 30.0
# How long a client that is closing, or a sidecar that notices it, may take on a crowded machine.
SETTLE_S = 30.0
SHM = Path("/dev/shm")


class Client:
    """One `soak_client` process."""

    def __init__(self, plan: Path, lane: str, threads: int, seed: int, log: Path) -> None:
        command = [sys.executable, "-m", "sidepool.bench.soak_client", str(plan), lane, str(threads), str(seed)]
        self._log = log
        with log.open("ab") as errors:
            # A session of its own: Ctrl-C reaches only the parent, which ends its clients in order.
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
            )
        self.pid = self._process.pid

    def counted(self) -> dict[str, Any]:
        """What the client has counted so far; waits until it has connected. Raises `TransportError` when it has ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise TransportError(f"a client ended:\n{self._log.read_text(errors='replace')[-2000:]}")
        counted: dict[str, Any] = json.loads(line)
        return counted

    def freeze(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def finish(self) -> None:
        """Tell the client to end, without waiting for it. Idempotent."""
        self.thaw()
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()

    def close(self) -> None:
        """Wait until the client, told to end, has closed its lanes in order."""
        self.finish()
        try:
            self._process.wait(SETTLE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `sidepool bench soak`."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")
    parser.add_argument("--minutes", type=float, default=5.0, help="default: 5")
    parser.add_argument("--processes", type=int, default=20, help="client processes (default: 20)")
    parser.add_argument("--lookups", type=int, default=200, help="lookups at once, over all processes (default: 200)")


def run(args: argparse.Namespace) -> int:
    """Soak, print, write JSON; 1 where a promise is not kept."""
    if not 0 < args.processes <= args.lookups or args.lookups % args.processes or not args.minutes > 0:
        raise ConfigError("allowed: --minutes above 0, and --lookups a multiple of --processes")
    console = make_console()
    about = machine.describe(seed=0)
    console.print("  ".join(f"{key}: {value}" for key, value in about.items()))
    with stopped_by_signals(), tempfile.TemporaryDirectory(prefix="sidepool-soak-") as directory:
        results = soak(Path(directory), args.minutes, args.processes, args.lookups // args.processes, console.print)
    for name, value in results.items():
        console.print(f"{name}: {value}", soft_wrap=True)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"machine": about, **results}, indent=1) + "\n", encoding="utf-8")
    return 0 if all(results["kept"].values()) else 1


def soak(directory: Path, minutes: float, processes: int, threads: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Run the load with files in `directory`; returns what was seen, with the verdicts under `kept`."""
    plan = make_plan(TABLES, ROWS, DIM, SIDECARS)
    every_row = np.arange(ROWS)
    configs = write_sidecars(
        plan, directory, lambda table: np.repeat(row_value(table, every_row)[:, None], DIM, axis=1).astype(np.float32)
    )
    shm_before = regions()
    with running_sidecars(configs, work_dir=directory) as sidecars:
        settle(sidecars)
        before = [held(sidecar) for sidecar in sidecars]
        with clients_of(directory, processes, threads) as (working, stopped):
            begin = time.monotonic()
            for client in stopped:
                client.counted()
            reached = [client.counted()["right"] for client in stopped]
            for client in stopped:
                client.freeze()
            samples = watch([s.pid or 0 for s in sidecars], [c.pid for c in working], 60 * minutes, say, working)
            counted = [client.counted() for client in working]
            elapsed_s = time.monotonic() - begin
            resumed = [right_after_thaw(client, right) for client, right in zip(stopped, reached, strict=True)]
        settle(sidecars)
        after = [held(sidecar) for sidecar in sidecars]
    slopes = {name: slope_mb_per_minute(series) for name, series in samples.items()}
    right, wrong = (sum(c[key] for c in counted) for key in ("right", "wrong"))
    errors = sum((Counter(c["errors"]) for c in counted), Counter[str]())
    return {
        "minutes": round(elapsed_s / 60, 2),
        "processes": processes,
        "lookups_at_once": processes * threads,
        "lookups": right + wrong,
        "lookups_per_s": round((right + wrong) / elapsed_s),
        "wrong": wrong,
        "errors": dict(errors),
        "least_lookups_of_a_process": min(c["right"] for c in counted),
        "mb_per_minute": {name: round(slope, 3) for name, slope in slopes.items()},
        "rss_mb": {name: [round(series[0][1] / 1e6, 1), round(series[-1][1] / 1e6, 1)] for name, series in samples.items()},
        "descriptors": [[b.descriptors, a.descriptors] for b, a in zip(before, after, strict=True)],
        "kept": {
            "values": wrong == 0 and min(c["right"] for c in counted) > 0,
            "errors": not errors,
            "memory": max(slopes.values()) < MAX_MB_PER_MINUTE,
            "descriptors": all(
                a.sockets <= b.sockets and a.descriptors <= b.descriptors for b, a in zip(before, after, strict=True)
            ),
            "shared_memory": all(a.lane_files == 0 for a in after) and regions() <= shm_before,
            "stopped_clients_resume": all(resumed),
        },
    }


def regions() -> set[Path]:
    """What lies in /dev/shm, but for a Triton's own regions: one may run beside this and come and go."""
    return {path for path in SHM.iterdir() if not path.name.startswith("sidepool_")}


@contextlib.contextmanager
def clients_of(directory: Path, processes: int, threads: int) -> Iterator[tuple[list[Client], list[Client]]]:
    """`processes` working clients, lanes in turn, and one per lane to be stopped; all closed on the way out."""
    with contextlib.ExitStack() as stack:
        clients = []
        for seed in range(processes + len(LANES)):
            client = Client(directory / "plan.yaml", LANES[seed % len(LANES)], threads, seed, directory / "clients.log")
            stack.callback(client.close)
            clients.append(client)
        for client in clients:
            client.counted()
        yield clients[:processes], clients[processes:]
        for client in clients:
            client.finish()


def watch(
    sidecars: Sequence[int], clients: Sequence[int], seconds: float, say: Callable[[str], None], working: Sequence[Client]
) -> dict[str, list[tuple[float, int]]]:
    """Sample RSS for `seconds`: per process `(second, bytes)` after the warm-up."""
    pids = {f"sidecar-{i}": pid for i, pid in enumerate(sidecars)} | {f"client-{i}": pid for i, pid in enumerate(clients)}
    samples: dict[str, list[tuple[float, int]]] = {name: [] for name in pids}
    begin = time.monotonic()
    said = 0.0
    while (now := time.monotonic() - begin) < seconds:
        if now >= min(WARM_UP_S, seconds / 2):
            for name, pid in pids.items():
                samples[name].append((now, footprint(pid).rss))
        if now - said >= REPORT_S:
            said = now
            say(f"{now:.0f} s: {sum(client.counted()['right'] for client in working)} lookups")
        time.sleep(SAMPLE_S)
    return samples


def slope_mb_per_minute(series: Sequence[tuple[float, int]]) -> float:
    """Least-squares slope of `(second, bytes)`."""
    seconds, sizes = np.array(series, np.float64).T
    return float(np.polyfit(seconds - seconds[0], sizes, 1)[0]) * 60 / 1e6


def right_after_thaw(client: Client, reached: int) -> bool:
    """Let a stopped client go on; whether it gets right values again, and none that is wrong."""
    client.thaw()
    deadline = time.monotonic() + SETTLE_S
    while time.monotonic() < deadline:
        counted = client.counted()
        # One per thread was on its way when it was stopped; more than these were asked for afterwards.
        if counted["right"] > reached + 100:
            return bool(counted["wrong"] == 0)
        time.sleep(0.1)
    return False


def settle(sidecars: Sequence[Sidecar]) -> None:
    """Wait until no sidecar has a lane."""
    deadline = time.monotonic() + SETTLE_S
    while any(open_lanes(sidecar) for sidecar in sidecars) and time.monotonic() < deadline:
        time.sleep(0.05)


def open_lanes(sidecar: Sidecar) -> int:
    """Lanes a sidecar says are open."""
    with grpc.insecure_channel(str(sidecar.facts()["grpc"]), [("grpc.use_local_subchannel_pool", 1)]) as channel:
        stub = control_pb2_grpc.SidecarStub(channel)  # type: ignore[no-untyped-call]
        stats = json.loads(stub.Stats(control_pb2.StatsRequest(), timeout=SETTLE_S, wait_for_ready=True).json)["stats"]
    return sum(engine["lanes"] for engine in stats["engines"])


def held(sidecar: Sidecar) -> Footprint:
    """A sidecar's footprint, once the descriptors of closed connections are gone: the least of a few looks."""
    looks = []
    for _ in range(20):
        looks.append(footprint(sidecar.pid or 0))
        time.sleep(0.05)
    return min(looks, key=lambda look: look.descriptors)
