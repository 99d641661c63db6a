"""`sidepool bench plan`: what cutting, copying and placing tables costs and gains.

network: bytes per lookup with pooling at the sidecars and at the ranker, over tables whose rows are cut over all sidecars; counted
on the lanes, and over the shaped cables of machines in network namespaces, where such can be made. strategies: expected p99 of the
four strategies on a model whose tables are used very unevenly, and how long planning takes. failover: a replica is killed, or
stalls, under load: the slowest request. resharding: p99 of lookups while shards move, and without.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from sidepool.bench import machine
from sidepool.bench.ids import calibrated
from sidepool.bench.namespaces import CannotShape
from sidepool.bench.network import BATCH, ROWS, SHAPES, network, over_cables
from sidepool.bench.processes import running_sidecars
from sidepool.bench.resharding import resharding
from sidepool.bench.shard_files import cut_plan, write_sidecars
from sidepool.bench.stop_signals import stopped_by_signals
from sidepool.client import EmbeddingClient
from sidepool.partition.inventory import CpuNode, Inventory, Nic
from sidepool.partition.replan import STATIC, STRATEGIES, replan
from sidepool.wire.access import AccessProfile, TableAccess
from sidepool.wire.plan import Feature, Plan, Shard, SidecarAddress, Table

SEED = 3
# The skewed model: ids per bag, and seconds of a card of 200 Gb/s per row: its id, and its share of a bag of 64 fp32 values.
IDS_PER_BAG = 20
ROW_S = (8 + (4 + 256) / IDS_PER_BAG) / 25e9
# Failover: what callers give, and what is promised on top of it.
DEADLINE_MS, GRACE_MS = 200.0, 10.0
LOAD_THREADS, LOAD_S = 2, 4.0
# What a change of plans may add to the p99 of lookups.
MOST_SLOWER = 0.25


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `sidepool bench plan`."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")
    parser.add_argument("--work-dir", type=Path, default=Path("build"), help="where shards go meanwhile (default: build)")


def run(args: argparse.Namespace) -> int:
    """Measure, print, write JSON; 1 where a promise is not kept."""
    args.work_dir.mkdir(parents=True, exist_ok=True)
    with stopped_by_signals():
        results = _measured(args.work_dir)
    kept = {
        "optimal": results["strategies"]["optimal"] <= 0.8 * min(results["strategies"][s] for s in STATIC),
        "planning": results["planning"]["seconds"] <= 60,
        "resharding": results["resharding"]["slower"] <= MOST_SLOWER
        and results["resharding"]["failed"] == results["resharding"]["wrong"] == 0,
        "failover": all(f["slowest_ms"] <= DEADLINE_MS + GRACE_MS and f["failed"] == 0 for f in results["failover"]),
    }
    print(json.dumps({"kept": kept}))
    if args.json:
        args.json.write_text(json.dumps(results | {"kept": kept}, indent=1) + "\n", encoding="utf-8")
    return 0 if all(kept.values()) else 1


def _measured(work_dir: Path) -> dict[str, Any]:
    """Every part, printed as soon as it is there."""
    results: dict[str, Any] = {"machine": machine.describe(SEED), "network": [], "cables": [], "failover": []}

    def say(part: Any) -> Any:
        print(json.dumps(part), flush=True)
        return part

    for shape in SHAPES:
        results["network"].append(say(network(shape, work_dir)))
    try:
        for shape in SHAPES:
            results["cables"].append(say(over_cables(shape, work_dir)))
    except CannotShape as e:
        say({"cables": f"skipped: {e}"})
    results["strategies"] = say(strategies(200, 16))
    results["planning"] = say(planning_s(1000, 64))
    for how in ("killed", "stalled"):
        results["failover"].append(say(failover(how, work_dir)))
    results["resharding"] = say(resharding(work_dir))
    return results


def skewed(tables: int, nodes: int) -> tuple[Plan, Inventory, AccessProfile]:
    """Tables of log-uniform size whose use is as uneven as that of rows in Meta's traces.

    The most used one alone keeps a machine 70 % busy, or all tables together keep all machines 40 % busy, whichever is less.
    """
    random = np.random.default_rng(SEED)
    rows = np.exp(random.uniform(np.log(1e4), np.log(5e6), tables)).astype(int)
    uses = np.unique(np.concatenate(calibrated(1, 4_000_000, 2_000_000, SEED)), return_counts=True)[1]
    weight = random.choice(uses, tables).astype(float)
    share = weight / weight.sum()
    rates = share * min(0.4 * nodes, 0.7 / share.max()) / ROW_S
    named = [Table(name=f"t{i}", rows=int(r), dim=64) for i, r in enumerate(rows)]
    plan = Plan(
        epoch=1,
        model="skewed",
        tables=tuple(named),
        features=tuple(Feature(name=t.name, table=t.name) for t in named),
        sidecars=(SidecarAddress(name="all", address="127.0.0.1:1"),),
        shards=tuple(Shard(table=t.name, sidecar="all", rows=(0, t.rows), columns=(0, t.dim)) for t in named),
    )
    memory = int(1.5 * sum(t.bytes for t in named) / nodes) + max(t.bytes for t in named)
    machines = tuple(
        CpuNode(name=f"n{i}", address=f"10.0.0.{i}:50151", memory_bytes=memory, cores=32, nics=(Nic(name="eth0", gbps=200),))
        for i in range(nodes)
    )
    access = tuple(
        TableAccess(table=t.name, bags_per_s=r / IDS_PER_BAG, rows_per_s=r, net=f"net{i % 4}")
        for i, (t, r) in enumerate(zip(named, rates, strict=True))
    )
    return plan, Inventory(cpu_nodes=machines), AccessProfile(model="skewed", lookups_per_s=2000, tables=access)


def strategies(tables: int, nodes: int) -> dict[str, float]:
    """Expected p99 in ms of every strategy."""
    plan, inventory, access = skewed(tables, nodes)
    return {s: replan(plan, inventory, access, s, time_limit_s=20).p99_ns / 1e6 for s in STRATEGIES}


def planning_s(tables: int, nodes: int) -> dict[str, float | None]:
    """How long `optimal` takes with its default limit, and its gap."""
    plan, inventory, access = skewed(tables, nodes)
    began = time.monotonic()
    found = replan(plan, inventory, access, "optimal")
    return {"tables": tables, "nodes": nodes, "seconds": time.monotonic() - began, "gap": found.gap}


def failover(how: str, work_dir: Path) -> dict[str, Any]:
    """Two replicas of everything, callers with a deadline; one replica dies or stalls in the middle."""
    plan = cut_plan(10, ROWS, 32, sidecars=2, parts=2, copies=2)
    rows = np.ones((ROWS, 32), np.float32)
    directory = Path(tempfile.mkdtemp(prefix="plan-", dir=work_dir))
    slowest, counts = [0.0] * LOAD_THREADS, {"requests": 0, "failed": 0, "wrong": 0}
    lock, stop = threading.Lock(), threading.Event()
    try:
        configs = write_sidecars(plan, directory, lambda table: rows)
        with running_sidecars(configs, work_dir=directory) as sidecars, EmbeddingClient.connect(plan, lane="tcp") as client:

            def load(thread: int) -> None:
                ids = np.random.default_rng(thread).integers(0, ROWS, (BATCH, 10))
                while not stop.is_set():
                    began, outcome = time.monotonic(), "requests"
                    try:
                        if not (client.lookup_fixed(ids, deadline_ms=DEADLINE_MS).out == 1).all():
                            outcome = "wrong"
                    except Exception:
                        outcome = "failed"
                    slowest[thread] = max(slowest[thread], time.monotonic() - began)
                    with lock:
                        counts[outcome] += 1

            threads = [threading.Thread(target=load, args=(t,)) for t in range(LOAD_THREADS)]
            for thread in threads:
                thread.start()
            time.sleep(LOAD_S / 2)
            victim = sidecars[1]
            if how == "killed":
                victim.kill()
            else:
                assert victim.pid is not None
                os.kill(victim.pid, signal.SIGSTOP)
            time.sleep(LOAD_S / 2)
            stop.set()
            for thread in threads:
                thread.join()
            if victim.pid is not None:
                os.kill(victim.pid, signal.SIGCONT)
    finally:
        shutil.rmtree(directory)
    return {"replica": how, "deadline_ms": DEADLINE_MS, "slowest_ms": 1e3 * max(slowest), **counts}
