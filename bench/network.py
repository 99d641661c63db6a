"""What travels between a ranker and its sidecars with pooling at either end: counted on the lanes, and over shaped cables.

Tables are cut by rows over all sidecars, so that every bag is pooled in parts wherever it is pooled.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from sidepool.bench.namespaces import Link, Machine, star
from sidepool.bench.processes import running_sidecars
from sidepool.bench.shard_files import cut_plan, write_sidecars
from sidepool.client import EmbeddingClient
from sidepool.client.lanes import PoolingPlace
from sidepool.wire.plan import Plan

SEED = 3
BATCH = 64
LOOKUPS = 50
ROWS = 20_000
SIDECARS = 4
PATIENT_MS = 60_000.0
# A cable that two cores can fill, and a port's share of the packet memory of a common access switch (16 MB for 64 ports).
CABLE = Link(gbps=1.0, queue_bytes=256 << 10)
# Over cables: both ways in turn; the first lookups, which find TCP's windows small, are not counted.
ROUNDS, ROUND_LOOKUPS, FIRST_LOOKUPS = 5, 20, 10
# In a namespace of its own, a sidecar finds the customary port free.
PORT = 50151


@dataclass(frozen=True)
class Shape:
    """Tables, ids per bag and dim of a model of Gupta et al., DeepRecSys (ISCA 2020), table 1, with rows that fit any machine."""

    name: str
    tables: int
    ids_per_bag: int
    dim: int

    def lookups(self) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """Uniform ids `[LOOKUPS, nnz]`, and the lengths that all lookups have."""
        lengths = np.full(self.tables * BATCH, self.ids_per_bag, np.int32)
        return np.random.default_rng(SEED).integers(0, ROWS, (LOOKUPS, lengths.sum())), lengths


SHAPES = (Shape("DLRM-RMC1", 10, 80, 32), Shape("DLRM-RMC2", 40, 80, 32), Shape("DLRM-RMC3", 10, 20, 32), Shape("WnD", 20, 1, 32))


@contextlib.contextmanager
def _served(shape: Shape, work_dir: Path, machines: Sequence[Machine] = ()) -> Iterator[Plan]:
    addresses = [f"{machine.address}:{PORT}" for machine in machines]
    plan = cut_plan(shape.tables, ROWS, shape.dim, sidecars=SIDECARS, parts=SIDECARS, addresses=addresses)
    rows = np.random.default_rng(SEED).standard_normal((ROWS, shape.dim)).astype(np.float32)
    directory = Path(tempfile.mkdtemp(prefix="plan-", dir=work_dir))
    try:
        configs = write_sidecars(plan, directory, lambda table: rows)
        with running_sidecars(configs, work_dir=directory, machines=machines):
            yield plan
    finally:
        shutil.rmtree(directory)


def network(shape: Shape, work_dir: Path) -> dict[str, Any]:
    """Response bytes per lookup of both ways of pooling, and the servers that a bag touches."""
    values, lengths = shape.lookups()
    bags = values.reshape(-1, shape.ids_per_bag) // (ROWS // SIDECARS)
    touched = float(np.mean([len(set(bag)) for bag in bags[:2000].tolist()]))
    with _served(shape, work_dir) as plan:
        sent = {pooling: _response_bytes(plan, pooling, values, lengths) for pooling in get_args(PoolingPlace)}
    return {
        "model": shape.name,
        "ids_per_bag": shape.ids_per_bag,
        "servers_touched": touched,
        "sidecar_bytes": sent["sidecar"],
        "ranker_bytes": sent["ranker"],
        "ratio": sent["ranker"] / sent["sidecar"],
        "expected_ratio": shape.ids_per_bag / touched,
    }


def _response_bytes(plan: Plan, pooling: PoolingPlace, values: Any, lengths: Any) -> float:
    with EmbeddingClient.connect(plan, lane="tcp", pooling=pooling) as client:
        parts = [(ids, lengths, None) for ids in values]
        timings = [client.lookup_parts([part], deadline_ms=PATIENT_MS).timings for part in parts]
        return sum(s.response_bytes for t in timings for s in t.sidecars) / len(parts)


def over_cables(shape: Shape, work_dir: Path) -> dict[str, Any]:
    """Both ways of pooling where ranker and sidecars are machines of their own, on cables of `CABLE.gbps`.

    Bytes per lookup that the ranker's network card counts, each way; latency and rate of one caller. Raises `CannotShape`.
    """
    with star(1 + SIDECARS, CABLE) as (ranker, *machines), _served(shape, work_dir, machines) as plan:
        # A pool's process is ended, not waited for, where this one is interrupted; Ctrl-C is this one's affair.
        with get_context("spawn").Pool(1, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as caller:
            found = caller.apply(_call_in_turn, (ranker, plan, *shape.lookups()))
        drops = ranker.dropped_packets()
    ratio = found["ranker"]["received_bytes"] / found["sidecar"]["received_bytes"]
    faster = found["ranker"]["p50_ms"] / found["sidecar"]["p50_ms"]
    cable = {"gbps": CABLE.gbps, "queue_bytes": CABLE.queue_bytes, "dropped_packets": drops}
    return {"model": shape.name, "cable": cable, **found, "ratio": ratio, "p50_ratio": faster}


def _call_in_turn(machine: Machine, plan: Plan, values: Any, lengths: Any) -> dict[str, dict[str, float]]:
    """In a process of the ranker's machine."""
    machine.enter()
    found: dict[str, dict[str, list[float]]] = {}
    with contextlib.ExitStack() as stack:
        clients: dict[str, EmbeddingClient] = {}
        for pooling in get_args(PoolingPlace):
            clients[pooling] = stack.enter_context(EmbeddingClient.connect(plan, lane="tcp", pooling=pooling))
            found[pooling] = {"received_bytes": [], "sent_bytes": [], "seconds": []}
            for ids in values[:FIRST_LOOKUPS]:
                clients[pooling].lookup(ids, lengths, deadline_ms=PATIENT_MS)
        for i in range(ROUNDS):
            for pooling, client in clients.items():
                before = machine.received_bytes(), machine.sent_bytes()
                for k in range(ROUND_LOOKUPS):
                    began = time.perf_counter()
                    client.lookup(values[(i * ROUND_LOOKUPS + k) % LOOKUPS], lengths, deadline_ms=PATIENT_MS)
                    found[pooling]["seconds"].append(time.perf_counter() - began)
                found[pooling]["received_bytes"].append((machine.received_bytes() - before[0]) / ROUND_LOOKUPS)
                found[pooling]["sent_bytes"].append((machine.sent_bytes() - before[1]) / ROUND_LOOKUPS)
    return {pooling: _summary(**taken) for pooling, taken in found.items()}


def _summary(received_bytes: list[float], sent_bytes: list[float], seconds: list[float]) -> dict[str, float]:
    p50, p99 = np.percentile(seconds, (50, 99)) * 1e3
    return {
        "received_bytes": float(np.mean(received_bytes)),
        "sent_bytes": float(np.mean(sent_bytes)),
        "p50_ms": round(float(p50), 3),
        "p99_ms": round(float(p99), 3),
        "lookups_per_s": round(len(seconds) / sum(seconds), 1),
    }
