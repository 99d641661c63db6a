"""What a client does when a sidecar is down, dies, comes back, drains, or serves another plan."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from lookup_world import SIDECARS, Bags, World, expected, random_bags, write_world
from sidecar_process import ready, wait_until_stopped

from sidepool.bench.triton_server import free_ports
from sidepool.client import EmbeddingClient, Pooled
from sidepool.client.lanes import Lane
from sidepool.wire import control_pb2
from sidepool.wire.errors import DeadlineExceeded, Overloaded, PlanError, TransportError
from sidepool.wire.plan import OnMissingShard, Plan

LEFT, RIGHT = SIDECARS
# What is promised: a second after a sidecar's return. The test machine may be busy, so the tests allow a little more.
RETURN_S = 2.0
PATIENT_MS = 20_000.0


@pytest.fixture(params=["shm", "tcp", "grpc"])
def lane(request: pytest.FixtureRequest) -> Lane:
    name: Lane = request.param
    return name


@pytest.fixture
def ports() -> tuple[int, int]:
    left, right = free_ports(2)
    return left, right


@pytest.fixture
def world(tmp_path: Path, ports: tuple[int, int]) -> World:
    return write_world(tmp_path, ports=ports)


@pytest.fixture
def plan(world: World, ports: tuple[int, int]) -> Plan:
    return world.at(*(f"127.0.0.1:{port}" for port in ports))


@pytest.fixture(autouse=True)
def _nothing_is_left_running() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    left = [t.name for t in set(threading.enumerate()) - before if t.name.startswith("sidepool")]
    assert left == []


def ask(client: EmbeddingClient, bags: Bags) -> Pooled:
    return client.lookup(bags.values, bags.lengths, bags.weights, deadline_ms=PATIENT_MS)


def assert_answers(client: EmbeddingClient, world: World) -> None:
    bags = random_bags(world.plan, 4, seed=1)
    np.testing.assert_allclose(ask(client, bags).out, expected(world.plan, world.rows, bags)[0], rtol=1e-5, atol=1e-5)


def seconds_until_it_answers(client: EmbeddingClient, world: World) -> float:
    """How long lookups go on failing, each as retryable; what they then give is checked."""
    begin, answered = time.monotonic(), False
    while not answered and time.monotonic() - begin < 30:
        with contextlib.suppress(TransportError, DeadlineExceeded, Overloaded):
            assert_answers(client, world)
            answered = True
    assert answered
    return time.monotonic() - begin


def test_a_sidecar_that_is_down_at_connect_is_named(world: World, plan: Plan, lane: Lane) -> None:
    with ready(world.config(LEFT)):
        begin = time.monotonic()
        with pytest.raises(
            TransportError, match=f"sidecar 'right' \\({plan.sidecars[1].address}\\): cannot be connected: unavailable"
        ):
            EmbeddingClient.connect(plan, lane=lane)
        assert time.monotonic() - begin < 3


def test_a_sidecar_may_come_up_after_the_client(world: World, plan: Plan, lane: Lane) -> None:
    with ready(world.config(LEFT)), EmbeddingClient.connect(plan, lane=lane, require_all=False) as client:
        bags = random_bags(world.plan, 4, seed=1)
        with pytest.raises(TransportError, match=r"sidecar 'right' \(127.0.0.1:\d+\): it was not connected, or was lost"):
            ask(client, bags)
        with ready(world.config(RIGHT)):
            assert seconds_until_it_answers(client, world) < RETURN_S


def test_a_killed_sidecar_fails_lookups_by_name_until_it_is_back(world: World, plan: Plan, lane: Lane) -> None:
    with ready(world.config(LEFT)):
        with ready(world.config(RIGHT)) as (right, _):
            client = EmbeddingClient.connect(plan, lane=lane)
            assert_answers(client, world)
            right.process.kill()
            right.process.wait()
        with client:
            begin = time.monotonic()
            with pytest.raises(TransportError, match="sidecar 'right'"):
                ask(client, random_bags(world.plan, 4, seed=1))
            assert time.monotonic() - begin < 5
            with ready(world.config(RIGHT)):
                assert seconds_until_it_answers(client, world) < RETURN_S


def test_a_frozen_sidecar_costs_the_budget_and_no_more(world: World, plan: Plan, lane: Lane) -> None:
    with ready(world.config(LEFT)), ready(world.config(RIGHT)) as (right, _), EmbeddingClient.connect(plan, lane=lane) as client:
        assert_answers(client, world)
        right.send(signal.SIGSTOP)
        try:
            wait_until_stopped(right.process.pid)
            bags = random_bags(world.plan, 4, seed=1)
            begin = time.monotonic()
            with pytest.raises(DeadlineExceeded, match=r"sidecar 'right'.*budget ran out"):
                client.lookup(bags.values, bags.lengths, bags.weights, deadline_ms=200)
            assert 0.15 < time.monotonic() - begin < 2
        finally:
            right.send(signal.SIGCONT)
        assert seconds_until_it_answers(client, world) < RETURN_S


def test_a_draining_sidecar_refuses_as_retryable(world: World, plan: Plan, lane: Lane) -> None:
    with ready(world.config(LEFT)), ready(world.config(RIGHT)) as (right, _), EmbeddingClient.connect(plan, lane=lane) as client:
        assert right.control.Drain(control_pb2.DrainRequest(timeout_s=5), timeout=10).drained
        with pytest.raises(Overloaded, match="sidecar 'right'"):
            ask(client, random_bags(world.plan, 4, seed=1))


def test_another_plan_is_refused_at_connect(tmp_path: Path, world: World, plan: Plan, lane: Lane) -> None:
    with ready(world.config(LEFT)), ready(world.config(RIGHT)):
        later = plan.model_copy(update={"epoch": 4})
        same_epoch = plan.model_copy(update={"model": "other"})
        for wrong, said in ((later, "plan_epoch: found 4; allowed: 3"), (same_epoch, "plan_fingerprint: found")):
            for require_all in (True, False):
                with pytest.raises(PlanError, match=f"sidecar 'left'.*{said}"):
                    EmbeddingClient.connect(wrong, lane=lane, require_all=require_all)


def test_a_sidecar_that_returns_with_another_plan_is_logged_as_an_error(
    tmp_path: Path, world: World, plan: Plan, ports: tuple[int, int], lane: Lane, caplog: pytest.LogCaptureFixture
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    moved_on = write_world(other, epoch=9, ports=ports)
    with ready(world.config(LEFT)):
        with ready(world.config(RIGHT)) as (right, _):
            client = EmbeddingClient.connect(plan, lane=lane)
            right.process.kill()
            right.process.wait()
        with contextlib.ExitStack() as stack, client:
            with pytest.raises(TransportError, match="sidecar 'right'"):
                ask(client, random_bags(world.plan, 4, seed=1))  # a grpc lane notices a loss when it is used
            stack.enter_context(ready(moved_on.config(RIGHT)))
            deadline = time.monotonic() + 10
            while not any(r.levelno == logging.ERROR and "plan_epoch" in r.message for r in caplog.records):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            with pytest.raises(TransportError, match="sidecar 'right'"):
                ask(client, random_bags(world.plan, 4, seed=1))


def test_a_lost_sidecars_features_are_zero_and_named_under_degrade(tmp_path: Path, ports: tuple[int, int], lane: Lane) -> None:
    directory = tmp_path / "degrading"
    directory.mkdir()
    world = write_world(directory, on_missing_shard=OnMissingShard.DEGRADE, ports=ports)
    plan = world.at(*(f"127.0.0.1:{port}" for port in ports))
    with ready(world.config(LEFT)), EmbeddingClient.connect(plan, lane=lane, require_all=False) as client:
        bags = random_bags(world.plan, 4, seed=1)
        found = ask(client, bags)
        wanted, _ = expected(world.plan, world.rows, bags)
        held_right = {f.name for f in plan.features if f.table in ("half", "defaulting", "hashing")}
        assert set(found.degraded) == held_right
        for feature, (begin, end) in zip(plan.features, plan.out_columns, strict=True):
            columns = found.out[:, begin:end]
            if feature.name in held_right:
                assert not columns.any()
            else:
                np.testing.assert_allclose(columns, wanted[:, begin:end], rtol=1e-5, atol=1e-5)
        assert not found.sequences["read"].any()


def test_waiting_for_a_lost_sidecar_takes_no_processor_time(world: World, plan: Plan, lane: Lane) -> None:
    with ready(world.config(LEFT)), EmbeddingClient.connect(plan, lane=lane, require_all=False):
        time.sleep(0.5)
        begin = time.process_time()
        time.sleep(1.0)
        assert time.process_time() - begin < 0.3
