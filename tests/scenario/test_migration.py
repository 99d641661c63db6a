"""Lanes of a running sidecar are moved between its engines, by call and by command, while lookups flow."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from lookup_world import SIDECARS, World, expected, random_bags, write_world
from sidecar_process import PATIENCE_S, RunningSidecar, ready

from sidepool.client import EmbeddingClient
from sidepool.wire.control_pb2 import MigrateRequest, StatsRequest
from sidepool.wire.plan import Plan

ENGINES = 3


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return write_world(tmp_path_factory.mktemp("world"), engines=ENGINES)


@pytest.fixture(scope="module")
def served(world: World) -> Iterator[tuple[RunningSidecar, str, Plan]]:
    with ready(world.config(SIDECARS[0])) as (left, line), ready(world.config(SIDECARS[1])) as (_, right):
        yield left, line["grpc"], world.at(line["grpc"], right["grpc"])


def live_lanes(sidecar: RunningSidecar) -> list[dict[str, Any]]:
    stats = json.loads(sidecar.control.Stats(StatsRequest()).json)["stats"]
    return [lane for lane in stats["lanes"] if lane["id"]]


def the_lane(sidecar: RunningSidecar) -> dict[str, Any]:
    """The only lane, once it has an engine."""
    deadline = time.monotonic() + PATIENCE_S
    while not (lanes := live_lanes(sidecar)):
        assert time.monotonic() < deadline
    (lane,) = lanes
    return lane


def test_a_tcp_lane_goes_round_while_every_answer_stays_right(served: tuple[RunningSidecar, str, Plan], world: World) -> None:
    left, _, plan = served
    cases = [(bags := random_bags(plan, 1 + seed % 30, seed=seed), expected(plan, world.rows, bags)[0]) for seed in range(20)]
    stop, done = threading.Event(), [0] * 4
    with EmbeddingClient.connect(plan, lane="tcp") as client:

        def look_up(thread: int) -> None:
            while not stop.is_set():
                bags, pooled = cases[done[thread] % len(cases)]
                found = client.lookup(bags.values, bags.lengths, bags.weights, deadline_ms=PATIENCE_S * 1e3)
                np.testing.assert_allclose(found.out, pooled, rtol=1e-5, atol=1e-5)
                done[thread] += 1

        threads = [threading.Thread(target=look_up, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for _ in range(40):
            lane = the_lane(left)
            target = (lane["engine"] + 1) % ENGINES
            left.control.Migrate(MigrateRequest(lane=lane["id"], engine=target))
            while (now := the_lane(left))["engine"] != target:
                assert now["id"] == lane["id"]
            before = sum(done)
            while sum(done) < before + 4 and all(t.is_alive() for t in threads):
                time.sleep(0.001)
        stop.set()
        for thread in threads:
            thread.join()
        assert min(done) > 10
        stats = json.loads(left.control.Stats(StatsRequest()).json)["stats"]
        assert sum(engine["moved"] for engine in stats["engines"]) == 40
        assert sum(stats["blackout_us"]["counts"]) == 40


def test_what_cannot_be_moved_is_named(served: tuple[RunningSidecar, str, Plan]) -> None:
    left, _, plan = served
    with EmbeddingClient.connect(plan, lane="shm"):
        lane = the_lane(left)
        wrong = {
            (lane["id"], ENGINES): "engine: found 3; allowed: 0 to 2",
            (lane["id"] + 50, 0): f"lane: found {lane['id'] + 50}; allowed: the number of an open lane",
            (lane["id"], (lane["engine"] + 1) % ENGINES): "an shm lane stays with its engine",
        }
        for (number, engine), message in wrong.items():
            with pytest.raises(grpc.RpcError) as caught:
                left.control.Migrate(MigrateRequest(lane=number, engine=engine))
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert message in caught.value.details()


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sidepool", "sidecar", "migrate", *arguments],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


def test_the_command_moves_a_lane_and_says_what_is_wrong(served: tuple[RunningSidecar, str, Plan], tmp_path: Path) -> None:
    left, address, plan = served
    with EmbeddingClient.connect(plan, lane="tcp"):
        lane = the_lane(left)
        target = (lane["engine"] + 1) % ENGINES
        moved = command("--at", address, "--lane", str(lane["id"]), "--to", str(target))
        assert (moved.returncode, moved.stdout) == (0, f"lane {lane['id']} moves to engine {target}\n")
        while the_lane(left)["engine"] != target:
            pass
        refused = command("--at", address, "--lane", "999", "--to", "0")
        assert refused.returncode != 0
        assert "lane: found 999; allowed: the number of an open lane" in refused.stderr
        missing = command("--at", address)
        assert missing.returncode == 2
        assert "migrate: found no --lane, --to; allowed: --at HOST:PORT --lane N --to ENGINE" in missing.stderr
