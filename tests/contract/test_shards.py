"""Cut and copied tables on running sidecars, through every lane, in chunks, and with a replica that dies or stalls."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from lookup_world import SIDECARS, TABLES, World, expected, random_bags, write_world
from rdma_devices import DEVICES, RANKER_PATH, SIDECAR_SETTINGS
from sidecar_process import RunningSidecar, ready, wait_until_stopped

from sidepool.__main__ import main
from sidepool.client import EmbeddingClient
from sidepool.client.lanes import Lane, PoolingPlace
from sidepool.wire.access import load_access
from sidepool.wire.errors import Overloaded, TransportError
from sidepool.wire.plan import Plan, Shard, save_plan

PATIENT_MS = 60_000.0
# The smallest: lookups of some hundred samples travel in several chunks.
SMALL_SLOTS = {"request_slot_bytes": 65_536, "response_slot_bytes": 65_536}


def mixed() -> tuple[Shard, ...]:
    """Every kind: rows cut, columns cut, both, copied, copied and cut, whole."""
    left, right = SIDECARS
    return (
        Shard(table="plain", sidecar=left, rows=(0, 37), columns=(0, 16)),
        Shard(table="plain", sidecar=right, rows=(37, 100), columns=(0, 16)),
        Shard(table="half", sidecar=left, rows=(0, 40), columns=(0, 4)),
        Shard(table="half", sidecar=right, rows=(0, 40), columns=(4, 9)),
        Shard(table="zeroing", sidecar=left, rows=(0, 10), columns=(0, 1)),
        Shard(table="zeroing", sidecar=right, rows=(0, 10), columns=(0, 1)),
        Shard(table="defaulting", sidecar=right, rows=(0, 5), columns=(0, 20)),
        Shard(table="defaulting", sidecar=left, rows=(5, 12), columns=(0, 20)),
        Shard(table="defaulting", sidecar=left, rows=(0, 12), columns=(20, 33)),
        Shard(table="hashing", sidecar=left, rows=(0, 4), columns=(0, 4)),
        Shard(table="hashing", sidecar=right, rows=(0, 4), columns=(0, 4)),
        Shard(table="hashing", sidecar=right, rows=(4, 11), columns=(0, 4)),
        Shard(table="wide", sidecar=left, rows=(0, 6), columns=(0, 130)),
    )


def copied() -> tuple[Shard, ...]:
    """Every table on both sidecars, its rows cut in two where there are enough."""
    cuts = {t.name: [0, t.rows // 2, t.rows] for t in TABLES}
    return tuple(
        Shard(table=t.name, sidecar=s, rows=(a, b), columns=(0, t.dim))
        for t in TABLES
        for a, b in pairwise(cuts[t.name])
        for s in SIDECARS
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return write_world(tmp_path_factory.mktemp("cut"), settings=SMALL_SLOTS | (SIDECAR_SETTINGS if DEVICES else {}), shards=mixed())


@pytest.fixture(scope="module")
def served_plan(world: World) -> Iterator[Plan]:
    with ready(world.config(SIDECARS[0])) as (_, left), ready(world.config(SIDECARS[1])) as (_, right):
        yield world.at(left["grpc"], right["grpc"])


def assert_answers(client: EmbeddingClient, world: World, batch: int, seed: int, deadline_ms: float = PATIENT_MS) -> int:
    """Look random bags up and compare with torch; returns the chunks that it took."""
    bags = random_bags(world.plan, batch, seed=seed)
    result = client.lookup_parts([bags.part], deadline_ms=deadline_ms)
    pooled, sequences = expected(world.plan, world.rows, bags)
    assert result.errors == [None]
    np.testing.assert_allclose(result.out, pooled, rtol=1e-5, atol=1e-5)
    for rows, wanted in zip(result.sequences, sequences.values(), strict=True):
        np.testing.assert_array_equal(rows, wanted)
    assert result.degraded == ()
    return result.timings.chunks


@pytest.mark.parametrize("pooling", ["sidecar", "ranker"])
def test_cut_tables_give_what_torch_gives(lane: Lane, world: World, served_plan: Plan, pooling: PoolingPlace) -> None:
    shards = world.directory if lane == "local" else None
    with EmbeddingClient.connect(served_plan, lane=lane, shards_dir=shards, rdma=RANKER_PATH, pooling=pooling) as client:
        chunks = [assert_answers(client, world, batch, seed) for seed, batch in enumerate((0, 1, 7, 64, 500))]
        assert chunks[-1] > 1 or lane in ("local", "rdma")  # no slots, or larger ones
        assert client.stats()["out_of_range"] > 0  # of the tables whose rows are cut


def test_a_recorded_profile_names_rates_and_hot_rows(world: World, served_plan: Plan, tmp_path: Path) -> None:
    save_plan(served_plan, tmp_path / "plan.yaml")
    hot, lookups = 80, 400
    lengths = np.zeros((len(served_plan.features), 4), np.int32)
    lengths[0] = 3  # `summed`, of the table whose rows are cut
    with EmbeddingClient.connect(served_plan, lane="tcp") as client, ThreadPoolExecutor(1) as pool:
        options = ["profile", "--plan", str(tmp_path / "plan.yaml"), "--seconds", "3", "--out", str(tmp_path / "access.json")]
        watching = pool.submit(main, options)
        while not watching.done():
            for i in range(lookups):
                client.lookup(np.array([hot, hot, i % 100] * 4), lengths, np.ones(12, np.float32), deadline_ms=PATIENT_MS)
        assert watching.result() == 0
    found = load_access(tmp_path / "access.json")
    plain = next(t for t in found.tables if t.table == "plain")
    assert found.lookups_per_s > 0
    assert plain.rows_per_s == pytest.approx(3 * plain.bags_per_s, rel=0.5)  # bags: those of the busier half
    assert plain.hot_rows[0].row == hot
    assert plain.hot_rows[0].share == pytest.approx(2 / 3, abs=0.15)
    assert all(t.rows_per_s == 0 for t in found.tables if t.table != "plain")


@dataclass(frozen=True)
class Pair:
    """Two sidecars, each with everything."""

    world: World
    plan: Plan
    left: RunningSidecar
    right: RunningSidecar


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    world = write_world(tmp_path, settings=SMALL_SLOTS, shards=copied())
    with ready(world.config(SIDECARS[0])) as (left, at_left), ready(world.config(SIDECARS[1])) as (right, at_right):
        yield Pair(world, world.at(at_left["grpc"], at_right["grpc"]), left, right)
        right.send(signal.SIGCONT)


@pytest.mark.parametrize("network", ["shm", "tcp", "grpc"])
def test_a_stalled_replica_is_left_within_the_deadline(pair: Pair, network: Lane) -> None:
    world, plan, right = pair.world, pair.plan, pair.right
    with EmbeddingClient.connect(plan, lane=network) as client:
        for seed in range(20):  # both are asked
            assert_answers(client, world, 5, seed)
        right.send(signal.SIGSTOP)
        wait_until_stopped(right.process.pid)
        bags = random_bags(plan, 5, seed=1)
        wanted, _ = expected(plan, world.rows, bags)
        for _ in range(40):
            found = client.lookup(*bags.part, deadline_ms=2000.0)
            np.testing.assert_allclose(found.out, wanted, rtol=1e-5, atol=1e-5)
        assert client.stats()["failovers"] > 0
        assert client.stats()["lanes"][0]["in_flight_bytes"] == 0


def test_late_answers_are_hedged_within_the_budget(pair: Pair) -> None:
    world, plan, right = pair.world, pair.plan, pair.right
    with EmbeddingClient.connect(plan, lane="tcp", hedge_budget=0.05) as client:
        for seed in range(300):  # until the percentile of both is known
            assert_answers(client, world, 2, seed)
        right.send(signal.SIGSTOP)
        wait_until_stopped(right.process.pid)
        lookups, began = 40, client.stats()
        for seed in range(lookups):
            assert_answers(client, world, 2, seed, deadline_ms=4000.0)
            if client.stats()["failovers"] > began["failovers"]:
                break  # the budget is spent, and the replica left
        stats = client.stats()
        assert stats["hedges"] > began["hedges"]
        assert stats["hedges"] <= 10 + 0.05 * stats["lanes"][0]["sent"] + 0.05 * stats["lanes"][1]["sent"]


def test_a_leaving_replica_costs_nothing_and_without_any_it_is_an_error(pair: Pair) -> None:
    world, plan, right = pair.world, pair.plan, pair.right
    with EmbeddingClient.connect(plan, lane="tcp") as client:
        right.send(signal.SIGTERM)
        for seed in range(50):
            assert_answers(client, world, 3, seed)
        pair.left.send(signal.SIGTERM)
        bags = random_bags(plan, 2, seed=1)
        pair.left.wait()
        with pytest.raises((TransportError, Overloaded), match=r"sidecar '(left|right)'"):
            client.lookup(*bags.part, deadline_ms=1000.0)
