"""A thousand client processes are killed at every moment of a lane's life; the sidecar keeps nothing of them."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from sidecar_process import PATIENCE_S, RunningSidecar, ready
from small_artifact import SmallArtifact, write_small_artifact

from sidepool import _native
from sidepool.bench.footprint import Footprint, footprint
from sidepool.client import EmbeddingClient
from sidepool.client.lanes import Lane
from sidepool.wire import control_pb2

DEATHS = 500  # per lane
MOMENTS = ("attached", "answered", "asking")
# Arenas of the gRPC library fill during the first deaths; what grows afterwards would be theirs.
WARM_UP = 100
GROWTH_BYTES = 4 << 20
PROGRAM = Path(__file__).parents[1] / "dying_clients.py"


@pytest.fixture
def artifact(tmp_path: Path) -> SmallArtifact:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    return write_small_artifact(tmp_path, address=address)


@contextmanager
def graveyard() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([sys.executable, str(PROGRAM)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.communicate(timeout=PATIENCE_S)


def admitted(sidecar: RunningSidecar, artifact: SmallArtifact, lane: str) -> control_pb2.ConnectReply:
    plan = artifact.plan
    request = control_pb2.ConnectRequest(
        lane=lane, plan_epoch=plan.epoch, plan_fingerprint=plan.fingerprint, wire_version=_native.WIRE_VERSION
    )
    reply: control_pb2.ConnectReply = sidecar.control.Connect(request, timeout=PATIENCE_S)
    return reply


def bury(yard: subprocess.Popen[str], sidecar: RunningSidecar, artifact: SmallArtifact, lane: str, deaths: int) -> None:
    assert yard.stdin is not None
    assert yard.stdout is not None
    for i in range(deaths):
        reply = admitted(sidecar, artifact, lane)
        order = {"lane": lane, "address": reply.address, "token": reply.token.hex(), "moment": MOMENTS[i % len(MOMENTS)]}
        yard.stdin.write(json.dumps(order) + "\n")
        yard.stdin.flush()
        assert yard.stdout.readline() == "\n"


def settled(sidecar: RunningSidecar, lanes: int) -> Footprint:
    """What the sidecar holds once it has `lanes` lanes and nothing in flight."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        stats = json.loads(sidecar.control.Stats(control_pb2.StatsRequest(), timeout=PATIENCE_S).json)["stats"]
        (engine,) = stats["engines"]
        if engine["lanes"] == lanes and not engine["in_flight"]:
            return footprint(sidecar.process.pid)
        assert time.monotonic() < deadline, engine
        time.sleep(0.01)


@pytest.mark.parametrize("lane", ["shm", "tcp"])
def test_five_hundred_killed_clients_per_lane_leave_nothing(artifact: SmallArtifact, lane: Lane) -> None:
    ids = np.arange(50)
    bags = np.array([50, 0], np.int32)
    expected = artifact.rows["users"].sum(axis=0)
    with ready(artifact.config) as (sidecar, _), EmbeddingClient.connect(artifact.plan, lane=lane) as survivor, graveyard() as yard:
        bury(yard, sidecar, artifact, lane, WARM_UP)
        before = settled(sidecar, lanes=1)
        for _ in range(4):
            bury(yard, sidecar, artifact, lane, (DEATHS - WARM_UP) // 4)
            pooled = survivor.lookup(ids, bags, deadline_ms=1000 * PATIENCE_S).out
            np.testing.assert_allclose(pooled[0, :8], expected, rtol=1e-4, atol=1e-4)
        after = settled(sidecar, lanes=1)
    assert (after.sockets, after.lane_files) == (before.sockets, before.lane_files)
    assert after.descriptors == before.descriptors
    assert after.rss - before.rss < GROWTH_BYTES
    print(f"RSS {before.rss} -> {after.rss}, {after.descriptors} descriptors")
