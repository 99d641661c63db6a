"""`sidepool bench rdma`: the rdma lane beside a bare C exchange of the same bytes, 8 beside 16 engines, credits under load.

Both ends run in one process on two devices (or one), so it needs RDMA devices: real ones, or the guest of tests/guest/. What
it prints are ratios of one run; rates of an emulated guest say nothing about a network card.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sidepool import _native
from sidepool.bench import machine
from sidepool.bench.serve import make_console
from sidepool.sidecar.config import RdmaListen
from sidepool.wire.errors import ConfigError
from sidepool.wire.rdma import RdmaPath

DEVICES = Path("/sys/class/infiniband")
DIM, ROWS = 16, 10_000
SLOTS, REQUEST_BYTES, RESPONSE_BYTES = 16, 128 << 10, 128 << 10
# Samples whose pooled vectors take 64 B, 4 KB and 64 KB.
BATCHES = {"64 B": 1, "4 KB": 64, "64 KB": 1024}
# Exchanges under way at a time: enough that neither side waits for the other's processor.
DEPTH = 8
# After one that warms up. A machine that others use too changes its speed from second to second: rounds are short and many, only
# neighbours are compared, and who goes first changes.
ROUNDS = 9
LANES = 16
# A sidecar's default. Threads that spin longer take processors from each other where there are fewer of them.
SPIN_US = 5
TARGETS = {"rate": 0.8, "engines": 0.95}
# Patient, for emulated devices.
PATIENCE_S = 60.0


@dataclass(frozen=True)
class Devices:
    """Where the two ends are."""

    ranker: str
    sidecar: str
    gid_index: int


class Ends:
    """A sidecar's engines with one table, and clients with a lane each."""

    def __init__(self, devices: Devices, *, engines: int = 1, clients: int = 1, **options: Any) -> None:
        self._path = RdmaPath(device=devices.ranker, gid_index=devices.gid_index, peer_timeout_s=PATIENCE_S)
        self._window = options.pop("window_bytes", 0)
        path = RdmaPath(device=devices.sidecar, gid_index=devices.gid_index, peer_timeout_s=PATIENCE_S, window_bytes=self._window)
        self.server = _native.SidecarServer(engines=engines, spin_us=SPIN_US, max_lanes=64, max_frame_bytes=1 << 20)
        tables = _native.TableSet(1, 1, 1)
        tables.add_table_array(0, np.ones((ROWS, DIM), np.float32), "error", 0)
        tables.add_feature(0, 0, "sum", False)
        tables.seal()
        self.server.publish(tables)
        self.server.listen_rdma(RdmaListen(path=path, **options).native())
        self.clients = [self._client() for _ in range(clients)]

    def _client(self) -> _native.LookupClient:
        client = _native.LookupClient(
            epoch=1, sidecars=1, spin_us=SPIN_US, degrade=False, rows=np.array([ROWS]), dims=np.array([DIM], np.int32),
            poolings=["sum"], weighted=[False], out_of_range=["error"], sidecar_of_feature=np.zeros(1, np.int32),
        )  # fmt: skip
        path = self._path.model_copy(update={"window_bytes": self._window})
        offer = client.offer_rdma(path.native(), 1, SLOTS, REQUEST_BYTES, RESPONSE_BYTES)
        client.attach_rdma(0, offer, self.server.connect_rdma(SLOTS, REQUEST_BYTES, RESPONSE_BYTES, offer.end))
        return client

    def rate(self, batch: int, count: int, threads: int = DEPTH) -> float:
        """Lookups per second of all clients together."""
        ids = np.random.default_rng(batch).integers(0, ROWS, (batch, 1))
        with ThreadPoolExecutor(len(self.clients)) as pool:
            spent = list(pool.map(lambda client: client.repeat(ids, count, threads), self.clients))
        return float(len(self.clients) * count / (max(spent) / 1e9))

    def close(self) -> None:
        for client in self.clients:
            client.close()
        self.server.close()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `sidepool bench rdma`."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"alternating rounds (default: {ROUNDS})")
    parser.add_argument("--lookups", type=int, default=2000, help="lookups of 4 KB a round (default: 2000)")
    parser.add_argument("--device", help="the ranker's device (default: rxeA, else the first)")
    parser.add_argument("--peer-device", help="the sidecar's device (default: rxeB, else the first)")
    parser.add_argument("--gid-index", type=int, default=1, help="of both devices (default: 1, RoCE v2 over IPv4 on most)")


def run(args: argparse.Namespace) -> int:
    """Measure, print, write JSON."""
    console = make_console()
    devices = _devices(args)
    about = machine.describe(0) | {"devices": f"{devices.ranker}, {devices.sidecar}"}
    results: dict[str, Any] = {
        "rates": measure_rates(devices, args.rounds, args.lookups),
        "pieces": measure_pieces(devices, args.rounds, max(args.lookups // 100, 10)),
        "engines": measure_engines(devices, args.rounds, max(2 * args.lookups // LANES, 20)),
        "credits": measure_credits(devices, max(args.lookups // 4, 100)),
    }
    console.print("  ".join(f"{key}: {value}" for key, value in about.items()))
    for name, r in results["rates"].items():
        console.print(f"{name:>6}: {r['lane']:9.0f} lookups/s, bare C {r['bare']:9.0f}, {_ratio(r)}")
    for name, rate in results["pieces"].items():
        console.print(f"pieces of {name}: {rate:.1f} large lookups/s")
    engines = results["engines"]
    console.print(f"{LANES} lanes: 8 engines {engines['8']:.0f}, 16 engines {engines['16']:.0f} lookups/s, {_ratio(engines)}")
    for name, r in results["credits"].items():
        spread = f"mean {r['mean_us']:.0f} µs, p50 below {r['p50_below_us']} µs, {r['grants']} grants"
        console.print(f"credits {name} under bulk load: {spread}")
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(about | {"targets": TARGETS} | results, indent=1) + "\n", encoding="utf-8")
    return 0


def measure_rates(devices: Devices, rounds: int, count: int) -> dict[str, dict[str, float]]:
    """Per size: the lane's rate, that of two processes which write the same bytes, and how they compare."""
    results = {}
    with tempfile.TemporaryDirectory(prefix="sidepool-bench-") as directory, _ends(devices) as ends:
        program = _compile(Path(directory))
        for name, batch in BATCHES.items():
            # Rounds of all sizes take about as long: far longer than it takes to start the threads.
            lookups = max(4 * count // max(batch // 16, 1), 100)
            request, response = 192 + _padded(batch * 8), 128 + _padded(batch * DIM * 4)
            command = [program, devices.ranker, devices.sidecar, *map(str, (devices.gid_index, request, response, DEPTH, lookups))]
            rates = _alternate({"lane": partial(ends.rate, batch, lookups), "bare": partial(_bare_rate, command)}, rounds)
            sizes = {"request_bytes": request, "response_bytes": response}
            results[name] = _medians(rates) | _compare(rates["lane"], rates["bare"]) | sizes
    return results


def measure_pieces(devices: Devices, rounds: int, count: int) -> dict[str, float]:
    """Large lookups per second by size of the pieces in which responses leave."""
    sizes = {"16 KiB": 16 << 10, "64 KiB": 64 << 10, "256 KiB": 256 << 10}
    with contextlib.ExitStack() as stack:
        ends = {name: stack.enter_context(_ends(devices, piece_bytes=size)) for name, size in sizes.items()}
        return _medians(_alternate({name: partial(one.rate, 16 * 1024, count, 1) for name, one in ends.items()}, rounds))


def measure_engines(devices: Devices, rounds: int, count: int) -> dict[str, float]:
    """The rate of many lanes over 8 and over 16 engines, and how they compare."""
    with _ends(devices, engines=8, clients=LANES) as eight, _ends(devices, engines=16, clients=LANES) as sixteen:
        rates = _alternate({"8": partial(eight.rate, 1, count, 1), "16": partial(sixteen.rate, 1, count, 1)}, rounds)
    return _medians(rates) | _compare(rates["16"], rates["8"])


def measure_credits(devices: Devices, count: int) -> dict[str, dict[str, float]]:
    """How long grants take from their granter to the other end while large frames fill both directions."""
    results = {}
    for mode in ("dedicated", "piggybacked"):
        with _ends(devices, credits=mode, window_bytes=1) as ends:
            ends.rate(1024, count)
            sides = [*(e["rdma"] for e in ends.server.stats()["engines"]), *ends.clients[0].stats()["rdma"]]
        counts = np.sum([side["credit_us"] for side in sides], axis=0)
        grants = int(counts.sum())
        median = int(np.searchsorted(np.cumsum(counts), (grants + 1) // 2))
        mean = sum(side["credit_sum_us"] for side in sides) / max(grants, 1)
        results[mode] = {"grants": grants, "mean_us": mean, "p50_below_us": 1 << median}
    return results


def _alternate(contenders: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Each one's rate in every round but the first."""
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name in list(contenders)[:: 1 if turn % 2 else -1]:
            rates[name].append(contenders[name]())
    return {name: taken[1:] for name, taken in rates.items()}


def _medians(rates: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: statistics.median(taken) for name, taken in rates.items()}


def _compare(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """The median of the rounds' ratios, and its 95 % confidence interval by the sign test (of fewer than six: all of them)."""
    ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    count = len(ratios)
    cuts = (cut for cut in range(count // 2) if 2 * sum(math.comb(count, i) for i in range(cut + 1)) <= 0.05 * 2**count)
    cut = max(cuts, default=0)
    return {"ratio": statistics.median(ratios), "low": ratios[cut], "high": ratios[-1 - cut]}


def _ratio(figures: Mapping[str, float]) -> str:
    return f"ratio {figures['ratio']:.2f} ({figures['low']:.2f} to {figures['high']:.2f})"


@contextlib.contextmanager
def _ends(devices: Devices, **options: Any) -> Iterator[Ends]:
    ends = Ends(devices, **options)
    try:
        yield ends
    finally:
        ends.close()


def _devices(args: argparse.Namespace) -> Devices:
    found = sorted(d.name for d in DEVICES.glob("*"))
    if not found:
        raise ConfigError(
            f"bench rdma: found no device in {DEVICES}; allowed: a machine with one, or the guest (tests/guest/README.md)"
        )
    ranker, sidecar = (wanted if wanted in found else found[0] for wanted in ("rxeA", "rxeB"))
    return Devices(args.device or ranker, args.peer_device or sidecar, args.gid_index)


def _padded(size: int) -> int:
    return -(-size // 64) * 64


def _bare_rate(command: Sequence[str]) -> float:
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def _compile(directory: Path) -> str:
    program = directory / "rdma_pingpong"
    source = Path(__file__).with_name("rdma_pingpong.c")
    subprocess.run(["cc", "-O2", "-o", program, source, "-libverbs"], check=True)
    return str(program)
