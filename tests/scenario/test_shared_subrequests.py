"""Engines that have nothing to do help with a large subrequest, and nobody can tell from the answer."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from sidepool import _native
from sidepool.wire.errors import Status

ROWS, DIM, BATCH = 50_000, 64, 512
# The client takes the table for a larger one, or it would refuse bad ids itself.
TAKEN_FOR = 2 * ROWS
# Engines that stay awake between lookups are there to help at once.
AWAKE_US = 100_000
PATIENCE_S = 60.0


class Served:
    """One huge feature behind several engines, and a client with one lane, so that all but one engine are idle."""

    def __init__(self, directory: Path, engines: int, rows: NDArray[np.float32]) -> None:
        tables = _native.TableSet(1, 1, 1)
        tables.add_table_array(0, rows, "error", 0)
        tables.add_feature(0, 0, "sum", False)
        tables.seal()
        cpus = [[cpu] for cpu in sorted(os.sched_getaffinity(0))]
        self.server = _native.SidecarServer(
            engines=engines, spin_us=AWAKE_US, max_lanes=2, max_frame_bytes=16 << 20, cpus=cpus if engines > 1 else []
        )
        self.server.publish(tables)
        path, token = str(directory / f"{engines}.sock"), secrets.token_bytes(16)
        self.server.listen_unix(path)
        self.server.expect(token, "shm", 4, 2 << 20, 2 << 20, PATIENCE_S)
        self.client = _native.LookupClient(
            epoch=1,
            sidecars=1,
            spin_us=0,
            degrade=False,
            rows=np.full(1, TAKEN_FOR, np.int64),
            dims=np.full(1, DIM, np.int32),
            poolings=["sum"],
            weighted=[False],
            out_of_range=["error"],
            sidecar_of_feature=np.zeros(1, np.int32),
        )
        self.client.attach_shm(0, path, token, PATIENCE_S)

    def look(self, values: NDArray[np.int64], lengths: NDArray[np.int32]) -> tuple[NDArray[np.float32], int]:
        """The pooled vectors and the status of the lookup."""
        out = np.empty((len(lengths), DIM), np.float32)
        verdicts, timings = np.empty((1, 5), np.int64), np.empty((2, 6), np.int64)
        parts = [(values, lengths, None)]
        return out, self.client.lookup(parts, out, (), int(PATIENCE_S * 1e9), 0, b"", verdicts, timings)[0]

    @property
    def helped(self) -> int:
        return sum(engine["helped"] for engine in self.server.stats()["engines"])

    def close(self) -> None:
        self.client.close()
        self.server.close()


@pytest.fixture(scope="module")
def rows() -> NDArray[np.float32]:
    return np.random.default_rng(1).standard_normal((ROWS, DIM), dtype=np.float32)


@pytest.fixture
def served(tmp_path: Path, rows: NDArray[np.float32]) -> Iterator[tuple[Served, Served]]:
    """The same table behind one engine and behind three."""
    both = Served(tmp_path, 1, rows), Served(tmp_path, 3, rows)
    yield both
    for one in both:
        one.close()


def bags(seed: int) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 200, BATCH, dtype=np.int32)
    return rng.integers(0, ROWS, lengths.sum()), lengths


def test_a_huge_feature_pooled_by_several_engines_equals_torchs_and_one_engines_bits(
    served: tuple[Served, Served], rows: NDArray[np.float32]
) -> None:
    alone, shared = served
    deadline = time.monotonic() + PATIENCE_S
    seed = 0
    while shared.helped < 20 and time.monotonic() < deadline:
        values, lengths = bags(seed)
        found, status = shared.look(values, lengths)
        assert status == Status.OK
        np.testing.assert_array_equal(found, alone.look(values, lengths)[0])
        offsets = torch.from_numpy(np.cumsum(lengths, dtype=np.int64) - lengths)
        pooled = torch.nn.functional.embedding_bag(torch.from_numpy(values), torch.from_numpy(rows), offsets, mode="sum")
        np.testing.assert_allclose(found, pooled.numpy(), rtol=1e-4, atol=1e-4)
        seed += 1
    assert shared.helped >= 20
    assert alone.helped == 0
    counted = [one.server.stats()["tables"][0] for one in served]
    assert counted[0] == counted[1]


def test_a_bad_id_in_a_late_bag_refuses_its_lookup_and_no_other(served: tuple[Served, Served]) -> None:
    shared = served[1]
    values, lengths = bags(7)
    spoilt = values.copy()
    spoilt[-1] = ROWS
    deadline = time.monotonic() + PATIENCE_S
    while shared.helped < 20 and time.monotonic() < deadline:
        assert [one.look(spoilt, lengths)[1] for one in served] == [Status.REJECTED] * 2
        answers = [one.look(values, lengths) for one in served]
        assert [status for _, status in answers] == [Status.OK] * 2
        np.testing.assert_array_equal(answers[0][0], answers[1][0])
    assert shared.helped >= 20
    counted = [one.server.stats()["tables"][0] for one in served]
    assert counted[0] == counted[1]
    assert counted[0]["out_of_range"] > 0


def test_engines_run_where_they_are_told_to() -> None:
    cpus = sorted(os.sched_getaffinity(0))
    before = set(os.listdir("/proc/self/task"))
    server = _native.SidecarServer(engines=2, spin_us=0, max_lanes=1, max_frame_bytes=1 << 20, cpus=[[cpus[0]], [cpus[-1]]])
    try:
        threads = [int(task) for task in os.listdir("/proc/self/task") if task not in before]
        deadline = time.monotonic() + PATIENCE_S
        wanted = sorted([{cpus[0]}, {cpus[-1]}], key=min)
        found: list[set[int]] = []
        while found != wanted and time.monotonic() < deadline:
            found = sorted((s for s in map(os.sched_getaffinity, threads) if len(s) == 1), key=min)
        # The acceptor goes where it likes; on a single CPU it cannot be told from the engines.
        assert found[: len(wanted)] == wanted or len(cpus) == 1
    finally:
        server.close()
