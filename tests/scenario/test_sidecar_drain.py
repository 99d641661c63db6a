"""A sidecar that is stopped or reloaded under load answers correctly or refuses as retryable, never anything else."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from sidecar_process import PATIENCE_S, RunningSidecar, ready, wait_until_stopped
from slow_ranker import look_up_once
from small_artifact import SmallArtifact, write_small_artifact

from sidepool.client.embedding import EmbeddingClient
from sidepool.client.lanes import Lane
from sidepool.wire import control_pb2
from sidepool.wire.errors import PlanError, SidepoolError

MIB = 1 << 20
LANES: list[Lane] = ["shm", "tcp", "grpc"]


def free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return f"127.0.0.1:{probe.getsockname()[1]}"


def engine_counters(sidecar: RunningSidecar) -> dict[str, int]:
    """The first engine's counters now."""
    reply = sidecar.control.Stats(control_pb2.StatsRequest(), timeout=PATIENCE_S)
    counters: dict[str, int] = json.loads(reply.json)["stats"]["engines"][0]
    return counters


class Caller(threading.Thread):
    """Looks the same bags up again and again until a lookup fails; counts what it started and what came back right."""

    def __init__(self, client: EmbeddingClient, ids: NDArray[np.int64], bags: int, artifact: SmallArtifact) -> None:
        super().__init__(name="caller")
        self._client = client
        self._ids = np.concatenate([ids % 50, ids % 30])
        self._lengths = np.full((2, bags), ids.size // bags, np.int32)
        users = artifact.rows["users"][self._ids[: ids.size].reshape(bags, -1)].sum(axis=1, dtype=np.float64)
        items = artifact.rows["items"][self._ids[ids.size :].reshape(bags, -1)].mean(axis=1, dtype=np.float64)
        self._expected = np.concatenate([users, items], axis=1)
        self._tolerance = 1e-5 * (1 + np.abs(self._expected).max())
        self.started = self.right = self.wrong = 0
        self.error: SidepoolError | None = None

    def run(self) -> None:
        try:
            while True:
                self.started += 1
                pooled = self._client.lookup(self._ids, self._lengths, deadline_ms=1000 * PATIENCE_S).out
                right = bool(np.allclose(pooled, self._expected, rtol=0, atol=self._tolerance))
                self.right += right
                self.wrong += not right
        except SidepoolError as e:
            self.error = e


@pytest.mark.parametrize("lane", LANES)
def test_a_drain_under_load_refuses_only_as_retryable(tmp_path: Path, lane: Lane) -> None:
    artifact = write_small_artifact(tmp_path, address=free_address())
    ids = np.random.default_rng(1).integers(0, 1 << 40, 512)
    with ready(artifact.config) as (sidecar, _), EmbeddingClient.connect(artifact.plan, lane=lane) as client:
        callers = [Caller(client, ids, 64, artifact) for _ in range(3)]
        for caller in callers:
            caller.start()
        while min(caller.right for caller in callers) < 20 and all(caller.is_alive() for caller in callers):
            threading.Event().wait(0.001)
        sidecar.send(signal.SIGTERM)
        for caller in callers:
            caller.join(PATIENCE_S)
        assert sidecar.wait() == 0
        assert not any("drain given up" in line for line in sidecar.stderr)
    for caller in callers:
        assert caller.wrong == 0
        assert caller.right >= 20
        assert caller.error is not None
        assert caller.error.retryable, caller.error


@pytest.mark.parametrize("lane", ["shm", "tcp"])
def test_lookups_in_flight_when_the_process_is_asked_to_stop_are_answered(tmp_path: Path, lane: Lane) -> None:
    artifact = write_small_artifact(tmp_path, address=free_address())
    # Large frames both ways: lookups are seen queueing in the sidecar, and responses do not fit a socket at once.
    artifact.write_config(listen={"grpc": artifact.plan.sidecars[0].address}, slots=4, request_slot_bytes=32 * MIB)
    ids = np.random.default_rng(1).integers(0, 50, 1_500_000)
    with ready(artifact.config) as (sidecar, _), EmbeddingClient.connect(artifact.plan, lane=lane) as client:
        callers = [Caller(client, ids, 150_000, artifact) for _ in range(4)]
        for caller in callers:
            caller.start()
        seen = 0
        while seen < 2 and all(caller.is_alive() for caller in callers):
            started = sum(caller.started for caller in callers)
            seen = engine_counters(sidecar)["in_flight"]
        sidecar.send(signal.SIGTERM)
        for caller in callers:
            caller.join(PATIENCE_S)
        assert sidecar.wait() == 0
    assert [caller.wrong for caller in callers] == [0] * 4
    # Of what had been started, only what had not reached the sidecar yet may have been refused.
    assert sum(caller.right for caller in callers) >= started - (4 - seen)
    assert all(caller.error is not None and caller.error.retryable for caller in callers)


@pytest.mark.parametrize("lane", LANES)
def test_what_a_lane_has_counted_stays_counted_when_it_closes(tmp_path: Path, lane: Lane) -> None:
    artifact = write_small_artifact(tmp_path, address=free_address())
    with ready(artifact.config) as (sidecar, _):

        def lane_counters() -> tuple[int, int, int]:
            reply = json.loads(sidecar.control.Stats(control_pb2.StatsRequest(), timeout=PATIENCE_S).json)
            lanes = [counted for counted in reply["stats"]["lanes"] if counted["kind"] == lane]
            live = sum(counted["engine"] >= 0 for counted in lanes)
            return live, sum(counted["received"] for counted in lanes), sum(counted["sent"] for counted in lanes)

        live_at_most = 0 if lane == "grpc" else 1  # the grpc lane is calls, which no engine owns
        for rounds in (1, 2):
            with EmbeddingClient.connect(artifact.plan, lane=lane) as client:
                client.lookup(np.zeros(2, np.int64), np.ones((2, 1), np.int32))
                live, received, sent = lane_counters()
                assert (live, received) == (live_at_most, rounds)
                assert sent >= rounds
            deadline = time.monotonic() + PATIENCE_S
            while lane_counters()[0] > 0 and time.monotonic() < deadline:
                threading.Event().wait(0.001)
            assert lane_counters()[:2] == (0, rounds)


def wait_until(sidecar: RunningSidecar, counter: str, value: int) -> None:
    """Wait until an engine counter has reached `value`."""
    deadline = time.monotonic() + PATIENCE_S
    while engine_counters(sidecar)[counter] < value:
        assert time.monotonic() < deadline, f"{counter} did not reach {value}"
        threading.Event().wait(0.0005)


def test_a_response_that_a_slow_ranker_has_not_taken_yet_is_in_flight(tmp_path: Path) -> None:
    artifact = write_small_artifact(tmp_path, address=free_address())
    address = artifact.plan.sidecars[0].address
    artifact.write_config(listen={"grpc": address}, slots=1, request_slot_bytes=32 * MIB, response_slot_bytes=64 * MIB)
    bags = 1_000_000  # a response of 48 MB, far above what sockets hold
    ids = np.concatenate([np.arange(bags, dtype=np.int64) % 50, np.arange(bags, dtype=np.int64) % 30])
    out = tmp_path / "pooled.npy"
    ranker = multiprocessing.get_context("spawn").Process(
        target=look_up_once, args=(artifact.plan, ids, np.ones((2, bags), np.int32), out)
    )
    with ready(artifact.config) as (sidecar, _):
        ranker.start()
        try:
            wait_until(sidecar, "in_flight", 1)
            assert ranker.pid is not None
            os.kill(ranker.pid, signal.SIGSTOP)
            wait_until_stopped(ranker.pid)
            wait_until(sidecar, "served", 1)
            assert engine_counters(sidecar)["in_flight"] == 1
            sidecar.send(signal.SIGTERM)
            sidecar.wait_for("asked to stop")
            os.kill(ranker.pid, signal.SIGCONT)
            ranker.join(PATIENCE_S)
            assert sidecar.wait() == 0
        finally:
            ranker.kill()
            ranker.join()
    expected = np.concatenate([artifact.rows["users"][ids[:bags]], artifact.rows["items"][ids[bags:]].astype(np.float32)], axis=1)
    np.testing.assert_array_equal(np.load(out), expected)


def test_a_reload_under_load_answers_under_one_epoch_or_says_which_one_it_serves(tmp_path: Path) -> None:
    address = free_address()
    old = write_small_artifact(tmp_path, address=address)
    old.write_config(listen={"grpc": address}, previous_epoch_s=0)
    ids = np.random.default_rng(1).integers(0, 1 << 40, 512)
    with ready(old.config) as (sidecar, _), EmbeddingClient.connect(old.plan, lane="shm") as client:
        caller = Caller(client, ids, 64, old)
        caller.start()
        new = write_small_artifact(tmp_path / "new", epoch=2, seed=1, address=address)
        old.write_config(listen={"grpc": address}, plan="new/plan.yaml", shards="new/shards")
        sidecar.send(signal.SIGHUP)
        assert sidecar.wait_for("reloaded")["plan_epoch"] == 2
        caller.join(PATIENCE_S)
        assert caller.wrong == 0
        assert isinstance(caller.error, PlanError)
        with EmbeddingClient.connect(new.plan, lane="shm") as renewed:
            again = Caller(renewed, ids, 64, new)
            again.start()
            while again.right < 3 and again.is_alive():
                threading.Event().wait(0.001)
            sidecar.send(signal.SIGTERM)
            again.join(PATIENCE_S)
    assert (again.wrong, again.right >= 3) == (0, True)
