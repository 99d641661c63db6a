"""What `sidepool bench pool` looks up: shapes, batches of ids, and the request frames that a client makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sidepool import _native
from sidepool.bench.ids import GENERATORS, Ids
from sidepool.wire.errors import Status

# MLPerf DLRM-v2's ids per bag; table sizes are ours, see `SHAPES`.
MLPERF_IDS = (3, 2, 1, 2, 6, 1, 1, 1, 1, 7, 3, 8, 1, 6, 9, 5, 1, 1, 1, 12, 100, 27, 10, 3, 1, 1)
# Distinct batches are looked up in turn until they have touched this much: twice a last-level cache of 32 MiB, so that no
# contender finds its rows there only because the benchmark repeats itself.
CYCLE_BYTES = 64 << 20
# Below 9,000 batches even one row from each of 26 tables reaches `CYCLE_BYTES`.
MAX_BATCHES = 9000
MIN_BATCHES = 4
# Any value: no subrequest of the benchmark waits.
BUDGET_NS = 10**12
# One frame per batch, however large: what one slot may hold (`kMaxSlotBytes`).
SLOT_BYTES = 1 << 30


@dataclass(frozen=True)
class Shape:
    """`ids[t]` ids per bag of table t, `batch` bags each. All tables have the same number of rows, of the same dim."""

    name: str
    rows: int
    dim: int
    batch: int
    ids: tuple[int, ...]

    @property
    def tables(self) -> int:
        return len(self.ids)

    @property
    def batches(self) -> int:
        row_bytes = self.batch * sum(self.ids) * self.dim * 4
        return max(MIN_BATCHES, min(MAX_BATCHES, CYCLE_BYTES // row_bytes))


def _grid(batch: int, ids: int) -> Shape:
    return Shape(f"26 x {batch}x{ids}", 200_000, 64, batch, (ids,) * 26)


# fp32 tables of 1.0 to 1.3 GB: tens of times a last-level cache, and two copies leave room on a small machine. RMC1 to RMC3
# are the models of Gupta et al., "The Architectural Implications of Facebook's DNN-Based Personalized Recommendation" (2020);
# their batch is ours. MLPerf's batch of 200 is its most frequent query.
SHAPES = (
    *(_grid(*size) for size in ((1, 1), (16, 1), (128, 1), (16, 20), (128, 20), (512, 20))),
    Shape("RMC1", 1_000_000, 32, 64, (80,) * 8),
    Shape("RMC2", 160_000, 64, 64, (120,) * 32),
    Shape("RMC3", 1_000_000, 32, 64, (20,) * 10),
    Shape("MLPerf", 100_000, 128, 200, MLPERF_IDS),
)
# Accesses of a whole trace: enough for the hottest bucket of the calibrated ids to hold its share, few enough for all of them
# to have rows of their own in the smallest tables.
TRACE_ACCESSES = 16_000_000


@dataclass(frozen=True)
class Batch:
    """Jagged, as TorchRec has it: `values [nnz]`, `lengths [tables * batch]`, both feature-major."""

    values: Ids
    lengths: NDArray[np.int32]


def make_traces(kind: str, shape: Shape, seed: int) -> list[Ids]:
    """One trace of ids per table."""
    accesses = min(TRACE_ACCESSES // shape.tables, 2 * shape.rows)
    return GENERATORS[kind](shape.tables, shape.rows, accesses, seed)


def make_batches(shape: Shape, traces: Sequence[Ids]) -> list[Batch]:
    """Successive stretches of each table's trace, which begins again at its end."""
    lengths = np.repeat(np.array(shape.ids, np.int32), shape.batch)
    needed = [shape.batches * shape.batch * ids for ids in shape.ids]
    columns = [np.resize(trace, n).reshape(shape.batches, -1) for trace, n in zip(traces, needed, strict=True)]
    return [Batch(np.concatenate([column[i] for column in columns]), lengths) for i in range(shape.batches)]


def encode(shape: Shape, batches: Sequence[Batch], sidecar_of_table: Sequence[int]) -> list[list[bytes]]:
    """The request frames of all batches, per sidecar, as a client routes and encodes them."""
    sidecars = max(sidecar_of_table) + 1
    client = _native.LookupClient(
        epoch=1,
        sidecars=sidecars,
        spin_us=0,
        degrade=False,
        rows=np.full(shape.tables, shape.rows, np.int64),
        dims=np.full(shape.tables, shape.dim, np.int32),
        poolings=["sum"] * shape.tables,
        weighted=[False] * shape.tables,
        out_of_range=["error"] * shape.tables,
        sidecar_of_feature=np.array(sidecar_of_table, np.int32),
    )
    for sidecar in range(sidecars):
        client.attach_external(sidecar, 1, SLOT_BYTES, SLOT_BYTES)
    out = np.empty((shape.batch, shape.tables * shape.dim), np.float32)
    verdicts, timings = np.empty((1, 5), np.int64), np.empty((1 + sidecars, 6), np.int64)

    def post(batch: Batch) -> None:
        client.lookup([(batch.values, batch.lengths, None)], out, (), BUDGET_NS, 0, b"", verdicts, timings)

    frames: list[list[bytes]] = [[] for _ in range(sidecars)]
    with ThreadPoolExecutor(1) as poster:
        for batch in batches:
            posted = poster.submit(post, batch)
            for sidecar in range(sidecars):
                frames[sidecar].append(_take(client, sidecar))
            posted.result()
    client.close()
    return frames


def _take(client: _native.LookupClient, sidecar: int) -> bytes:
    taken = client.take(sidecar, 10.0)
    if taken is None:
        raise RuntimeError(f"the client sent nothing to sidecar {sidecar}")
    ticket, frame, _ = taken
    # Nobody answers; the lookup ends with this status, and the lane stays.
    client.deliver(sidecar, ticket, None, Status.OVERLOADED)
    return frame
