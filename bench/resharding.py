"""What a change of plans costs lookups meanwhile: all tables change places between two sidecars, at the default rate."""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sidepool.bench.processes import running_sidecars
from sidepool.bench.shard_files import make_plan, write_sidecars
from sidepool.client import EmbeddingClient
from sidepool.partition.apply import Places, apply
from sidepool.wire.control_channel import ClientTls
from sidepool.wire.model import PLAN_FILE
from sidepool.wire.plan import Plan
from sidepool.wire.plan_source import FilePlanSource

# DLRM-RMC1 of `sidepool.bench.plan`, with rows for 192 MB per sidecar: on two cores, 24 seconds at the default rate.
TABLES, ROWS, DIM = 10, 300_000, 32
BATCH, IDS_PER_BAG = 64, 80
# Two callers with pauses: sidecars and callers together keep half of two cores busy, as a deployment with reserves is.
CALLERS, PERIOD_S = 2, 0.008
ROUNDS = 3
QUIET_S = 20.0
# The old plan leaves soon, so that rounds can follow one another.
PREVIOUS_EPOCH_S = 3.0
PATIENT_MS = 60_000.0


@dataclass
class Callers:
    """Lookups at a steady pace, every value checked; latencies are kept for whoever takes them."""

    client: EmbeddingClient
    latencies_s: list[float] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=lambda: {"lookups": 0, "failed": 0, "wrong": 0})

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._call, args=(i,)) for i in range(CALLERS)]
        for thread in self._threads:
            thread.start()

    def _call(self, caller: int) -> None:
        random = np.random.default_rng(caller)
        lengths = np.full(TABLES * BATCH, IDS_PER_BAG, np.int32)
        values = [random.integers(0, ROWS, TABLES * BATCH * IDS_PER_BAG) for _ in range(16)]
        wanted = np.repeat(np.arange(TABLES, dtype=np.float32) * IDS_PER_BAG, DIM)
        due = time.monotonic()
        while not self._stop.is_set():
            due = max(due + PERIOD_S, time.monotonic() - PERIOD_S)
            time.sleep(max(0.0, due - time.monotonic()))
            began, outcome = time.perf_counter(), "lookups"
            try:
                out = self.client.lookup(values[int(due / PERIOD_S) % len(values)], lengths, deadline_ms=PATIENT_MS).out
                ended = time.perf_counter()
                if not (out == wanted).all():
                    outcome = "wrong"
            except Exception:
                ended, outcome = time.perf_counter(), "failed"
            with self._lock:
                self.latencies_s.append(ended - began)
                self.counts[outcome] += 1

    def take_ms(self) -> NDArray[np.float64]:
        """The latencies since the last call."""
        with self._lock:
            taken, self.latencies_s = self.latencies_s, []
        return np.array(taken) * 1e3

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def resharding(work_dir: Path) -> dict[str, Any]:
    """P99 of lookups without and during a move, in turns; and the lookups that failed or were wrong."""
    plan = make_plan(TABLES, ROWS, DIM, 2)
    directory = Path(tempfile.mkdtemp(prefix="plan-", dir=work_dir))
    rounds: list[dict[str, float]] = []
    try:
        configs = write_sidecars(
            plan, directory, lambda table: np.full((ROWS, DIM), table, np.float32), {"previous_epoch_s": PREVIOUS_EPOCH_S}
        )
        plan_file = directory / PLAN_FILE
        with (
            running_sidecars(configs, work_dir=directory),
            EmbeddingClient.connect(plan_file, lane="tcp") as client,
            # A process of its own, as the tool has: its work must not take the callers' interpreter.
            ProcessPoolExecutor(1, mp_context=get_context("spawn")) as tool,
        ):
            tool.submit(swapped, plan).result()  # imports everything
            callers = Callers(client)
            try:
                for _ in range(ROUNDS):
                    time.sleep(PREVIOUS_EPOCH_S + 2.0)  # the plan before is gone, tables are promoted
                    rounds.append(_round(callers, tool, plan_file))
            finally:
                callers.stop()
    finally:
        shutil.rmtree(directory)
    p99 = {when: median(r[f"{when}_p99_ms"] for r in rounds) for when in ("quiet", "moving")}
    return {
        "moved_bytes": sum(t.bytes for t in plan.tables),
        "seconds": median(r["seconds"] for r in rounds),
        "quiet_p99_ms": p99["quiet"],
        "moving_p99_ms": p99["moving"],
        "slower": median(r["moving_p99_ms"] / r["quiet_p99_ms"] for r in rounds) - 1,
        "rounds": rounds,
        **callers.counts,
    }


def _round(callers: Callers, tool: Executor, plan_file: Path) -> dict[str, float]:
    callers.take_ms()
    time.sleep(QUIET_S)
    quiet = callers.take_ms()
    began = time.monotonic()
    tool.submit(_swap, plan_file).result()
    moving, seconds = callers.take_ms(), time.monotonic() - began
    found = {"seconds": seconds}
    for when, latencies in (("quiet", quiet), ("moving", moving)):
        found |= {f"{when}_p{p}_ms": round(float(np.percentile(latencies, p)), 3) for p in (50, 99)}
    return found


def _swap(plan_file: Path) -> None:
    """In the tool's process."""
    places = Places([FilePlanSource(plan_file)])
    apply(places, swapped(places.read()), ClientTls())


def swapped(plan: Plan) -> Plan:
    """Every shard on the other sidecar, under the next epoch."""
    first, second = (s.name for s in plan.sidecars)
    other = {first: second, second: first}
    shards = tuple(s.model_copy(update={"sidecar": other[s.sidecar]}) for s in plan.shards)
    return Plan.model_validate(plan.model_copy(update={"epoch": plan.epoch + 1, "shards": shards}).model_dump(), strict=False)
