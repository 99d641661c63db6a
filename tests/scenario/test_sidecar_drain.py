"""A sidecar that is stopped or reloaded under load answers correctly or refuses as retryable, never anything else."""

from __future__ import annotations

import json
import signal
import socket
import threading
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from sidecar_process import PATIENCE_S, ready
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


def test_a_lookup_in_flight_when_the_process_is_asked_to_stop_is_answered(tmp_path: Path) -> None:
    artifact = write_small_artifact(tmp_path, address=free_address())
    # One large frame per lookup: long enough in the sidecar to be seen there.
    artifact.write_config(listen={"grpc": artifact.plan.sidecars[0].address}, slots=1, request_slot_bytes=96 * MIB)
    ids = np.random.default_rng(1).integers(0, 50, 4_000_000)
    with ready(artifact.config) as (sidecar, _), EmbeddingClient.connect(artifact.plan, lane="tcp") as client:
        caller = Caller(client, ids, 40_000, artifact)
        caller.start()
        while caller.is_alive():
            started = caller.started
            stats = json.loads(sidecar.control.Stats(control_pb2.StatsRequest(), timeout=PATIENCE_S).json)["stats"]
            if any(engine["queued"] + engine["in_flight"] > 0 for engine in stats["engines"]):
                break
        sidecar.send(signal.SIGTERM)
        caller.join(PATIENCE_S)
        assert sidecar.wait() == 0
    assert caller.wrong == 0
    assert caller.right >= started >= 1
    assert caller.error is not None
    assert caller.error.retryable


def test_a_reload_under_load_answers_under_one_epoch_or_says_which_one_it_serves(tmp_path: Path) -> None:
    address = free_address()
    old = write_small_artifact(tmp_path, address=address)
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
