"""`sidepool bench lane`: what a lane adds to pooling, beside grpcio and beside the barest exchange of the same bytes.

Two processes on one machine. A lane's overhead is the whole lookup (routing, sending, waiting, merging) less the time the
sidecar spent pooling, both read inside the native core; `caller_p50_us` is the same seen from Python. Peers carry the
same number of bytes each way: a grpcio unary call whose handler returns prepared bytes, a two-process futex ping-pong
(the floor for shm) and a loopback-socket ping-pong (the floor for tcp). All take turns, several rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from sidepool import _native
from sidepool.bench import machine
from sidepool.bench.lane_peer import DIM, FEATURES, GRPC_OPTIONS, ROWS
from sidepool.bench.serve import make_console
from sidepool.client.embedding import DEFAULT_SPIN_US

BATCHES = (1, 128)
# The median of this many rounds is reported; one round of 1,000 lookups takes well under a second.
ROUNDS = 7
CALLS = 1000
# What issue and README promise: at least this much cheaper than grpcio, at most this much dearer than the floor.
TARGETS = {"shm": {"grpcio": 10.0, "floor": 3.0}, "tcp": {"grpcio": 4.0, "floor": 2.5}}
FLOORS = {"shm": "futex", "tcp": "socket"}

Sample = dict[str, float]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `sidepool bench lane`."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"alternating rounds (default: {ROUNDS})")
    parser.add_argument("--seed", type=int, default=1)


def run(args: argparse.Namespace) -> int:
    """Measure, print a table, write JSON."""
    console = make_console()
    about = machine.describe(args.seed)
    console.print("  ".join(f"{key}: {value}" for key, value in about.items()))
    results = measure(args.rounds, args.seed)
    table = Table(title="lane overhead beyond pooling, µs", title_justify="left")
    for column in ("lane", "batch", "p50", "p99", "from Python", "grpcio p50", "times cheaper", "floor p50", "times floor"):
        table.add_column(column, justify="right")
    for lane, shapes in results.items():
        for shape, r in shapes.items():
            cells = (r["p50_us"], r["p99_us"], r["caller_p50_us"], r["peer"]["grpcio_p50_us"], r["ratio"]["grpcio"])
            floor = (r["peer"]["floor_p50_us"], r["ratio"]["floor"])
            table.add_row(lane, shape, *(f"{x:.1f}" for x in (*cells, *floor)))
    console.print(table)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(about | {"targets": TARGETS, "lanes": results}, indent=1) + "\n", encoding="utf-8")
        console.print(f"written to {args.json}")
    return 0


def measure(rounds: int, seed: int) -> dict[str, dict[str, Any]]:
    """Per lane and shape: overhead, peers and ratios."""
    sizes = {batch: frame_bytes(batch) for batch in BATCHES}
    results: dict[str, dict[str, Any]] = {lane: {} for lane in TARGETS}
    with tempfile.TemporaryDirectory(prefix="sidepool-bench-") as directory, _peer(Path(directory), sizes) as peer:
        pingpong = _compile_pingpong(Path(directory))
        for batch in BATCHES:
            request, response = sizes[batch]
            contenders: dict[str, Callable[[], Sample]] = {lane: _lookups(peer[lane], batch, seed) for lane in TARGETS}
            contenders["grpcio"] = _grpc_calls(peer["grpc"], request, response)
            for floor in FLOORS.values():
                contenders[floor] = _pingpongs(pingpong, floor, request, response)
            samples: dict[str, list[Sample]] = {name: [] for name in contenders}
            for _ in range(rounds + 1):
                for name, contender in contenders.items():
                    samples[name].append(contender())
            # The first round warms connections and caches.
            medians = {name: {k: statistics.median(s[k] for s in taken[1:]) for k in taken[0]} for name, taken in samples.items()}
            for lane in TARGETS:
                results[lane][f"26 features x {batch}"] = _compare(medians[lane], medians["grpcio"], medians[FLOORS[lane]])
    return results


def _compare(lane: Sample, grpcio: Sample, floor: Sample) -> dict[str, Any]:
    return {
        **lane,
        "peer": {
            f"{name}_{key}": value for name, sample in (("grpcio", grpcio), ("floor", floor)) for key, value in sample.items()
        },
        "ratio": {"grpcio": grpcio["p50_us"] / lane["caller_p50_us"], "floor": lane["p50_us"] / floor["p50_us"]},
    }


def frame_bytes(batch: int) -> tuple[int, int]:
    """Bytes of the request and the response frame of one lookup of 26 single-id features."""
    request = 128 + _padded(FEATURES * 24) + _padded(FEATURES * batch * 8)
    return request, 128 + FEATURES * _padded(batch * DIM * 4)


def _padded(size: int) -> int:
    return -(-size // 64) * 64


@contextlib.contextmanager
def _peer(directory: Path, sizes: dict[int, tuple[int, int]]) -> Iterator[dict[str, Any]]:
    """The other process, with a client per lane and a channel to its grpcio server."""
    tokens = {lane: secrets.token_hex(16) for lane in TARGETS}
    unix = str(directory / "peer.sock")
    arguments = {"unix": unix, "tokens": tokens, "response_bytes": [response for _, response in sizes.values()]}
    command = [sys.executable, "-m", "sidepool.bench.lane_peer", json.dumps(arguments)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    clients: list[_native.LookupClient] = []
    try:
        assert process.stdout is not None
        ports = json.loads(process.stdout.readline() or "null")
        if ports is None:
            raise RuntimeError("the peer process did not start")
        for lane in TARGETS:
            clients.append(_client())
            if lane == "shm":
                clients[-1].attach_shm(0, unix, bytes.fromhex(tokens[lane]), 5.0)
            else:
                clients[-1].attach_tcp(0, "127.0.0.1", ports["tcp"], bytes.fromhex(tokens[lane]), 5.0)
        with grpc.insecure_channel(f"127.0.0.1:{ports['grpc']}", GRPC_OPTIONS) as channel:
            yield {**dict(zip(TARGETS, clients, strict=True)), "grpc": channel}
    finally:
        for client in clients:
            client.close()
        process.communicate()


def _client() -> _native.LookupClient:
    return _native.LookupClient(
        epoch=1,
        sidecars=1,
        spin_us=DEFAULT_SPIN_US,
        degrade=False,
        rows=np.full(FEATURES, ROWS, np.int64),
        dims=np.full(FEATURES, DIM, np.int32),
        poolings=["sum"] * FEATURES,
        weighted=[False] * FEATURES,
        out_of_range=["error"] * FEATURES,
        sidecar_of_feature=np.zeros(FEATURES, np.int32),
    )


def _lookups(client: _native.LookupClient, batch: int, seed: int) -> Callable[[], Sample]:
    ids: NDArray[np.int64] = np.random.default_rng(seed).integers(0, ROWS, (batch, FEATURES))
    out = np.empty((batch, FEATURES * DIM), np.float32)
    verdicts, timings = np.empty((1, 5), np.int64), np.empty((2, 6), np.int64)

    def sample() -> Sample:
        inside, outside = [], []
        for _ in range(CALLS):
            begin = time.perf_counter_ns()
            status, _ = client.lookup([(ids, None, None)], out, (), 1_000_000_000, 0, b"", verdicts, timings)
            whole = time.perf_counter_ns() - begin
            if status:
                raise RuntimeError(f"a lookup failed with status {status}")
            pooling = int(timings[1, 2])
            inside.append(int(timings[0, 3]) - pooling)
            outside.append(whole - pooling)
        return {**_percentiles(inside), "caller_p50_us": statistics.median(outside) / 1e3}

    return sample


def _grpc_calls(channel: grpc.Channel, request: int, response: int) -> Callable[[], Sample]:
    call = channel.unary_unary(f"/peer/bytes{response}", request_serializer=None, response_deserializer=None)
    body = bytes(request)

    def sample() -> Sample:
        times = []
        for _ in range(CALLS // 4):  # the slow one: fewer calls keep its turn as long as the others'
            begin = time.perf_counter_ns()
            call(body)
            times.append(time.perf_counter_ns() - begin)
        return _percentiles(times)

    return sample


def _compile_pingpong(directory: Path) -> Path:
    program = directory / "pingpong"
    source = Path(__file__).resolve().parent / "pingpong.cpp"
    subprocess.run(["c++", "-O2", "-std=c++20", "-o", str(program), str(source)], check=True)
    return program


def _pingpongs(program: Path, kind: str, request: int, response: int) -> Callable[[], Sample]:
    def sample() -> Sample:
        command = [str(program), kind, str(request), str(response), str(CALLS)]
        p50, p99 = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        return {"p50_us": int(p50) / 1e3, "p99_us": int(p99) / 1e3}

    return sample


def _percentiles(times_ns: list[int]) -> Sample:
    ordered = sorted(times_ns)
    return {"p50_us": ordered[len(ordered) // 2] / 1e3, "p99_us": ordered[len(ordered) * 99 // 100] / 1e3}
