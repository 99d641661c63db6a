"""A sidecar's engines and a ranker's client in one process, joined by rdma lanes over the guest's two devices."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rdma_devices import PATIENT_S

from sidepool import _native

EPOCH = 7
DIMS = (16, 64, 8)
ROWS = 50
SLOTS, REQUEST_BYTES, RESPONSE_BYTES = 16, 64 << 10, 256 << 10
BUDGET_NS = int(PATIENT_S * 1e9)

_random = np.random.default_rng(11)
# Small integers: sums are exact in any order.
TABLES = tuple(_random.integers(-8, 8, (ROWS, dim)).astype(np.float32) for dim in DIMS)


def path(device: str, **options: Any) -> dict[str, Any]:
    """Native options of one end."""
    return {"device": device, "peer_timeout_s": PATIENT_S, "piece_bytes": 16 << 10, **options}


def make_server(*, engines: int = 1, spin_us: int = 5, **options: Any) -> _native.SidecarServer:
    server = _native.SidecarServer(engines=engines, spin_us=spin_us, max_lanes=256, max_frame_bytes=1 << 20)
    tables = _native.TableSet(EPOCH, len(DIMS), len(DIMS))
    for i, rows in enumerate(TABLES):
        tables.add_table_array(i, rows, "error", 0)
        tables.add_feature(i, i, "sum", False)
    tables.seal()
    server.publish(tables)
    server.listen_rdma({**path("rxeB"), **options})
    return server


def make_client(sidecars: int = 1, *, spin_us: int = 20) -> _native.LookupClient:
    """A client whose sidecars all hold everything: features go to the first one, or one feature to each."""
    return _native.LookupClient(
        epoch=EPOCH,
        sidecars=sidecars,
        spin_us=spin_us,
        degrade=False,
        rows=np.full(len(DIMS), ROWS, np.int64),
        dims=np.array(DIMS, np.int32),
        poolings=["sum"] * len(DIMS),
        weighted=[False] * len(DIMS),
        out_of_range=["error"] * len(DIMS),
        sidecar_of_feature=(np.arange(len(DIMS)) % sidecars).astype(np.int32),
    )


def attach(
    client: _native.LookupClient,
    server: _native.SidecarServer,
    sidecar: int = 0,
    *,
    slots: int = SLOTS,
    engines: int = 1,
    **options: Any,
) -> None:
    offer = client.offer_rdma({**path("rxeA"), **options}, engines, slots, REQUEST_BYTES, RESPONSE_BYTES)
    end = server.connect_rdma(slots, REQUEST_BYTES, RESPONSE_BYTES, offer.end)
    client.attach_rdma(sidecar, offer, end)


@dataclass
class Joined:
    server: _native.SidecarServer
    client: _native.LookupClient

    def server_rdma(self, key: str) -> int:
        return sum(engine["rdma"][key] for engine in self.server.stats()["engines"])

    def ranker_rdma(self, key: str) -> int:
        return sum(engine[key] for engine in self.client.stats()["rdma"])

    def both(self, key: str) -> int:
        return self.server_rdma(key) + self.ranker_rdma(key)


@contextmanager
def joined(
    *, engines: int = 1, ranker_engines: int = 1, slots: int = SLOTS, ranker: dict[str, Any] | None = None, **options: Any
) -> Iterator[Joined]:
    """One lane; `options` of the sidecar's end, `ranker` of the other."""
    server, client = make_server(engines=engines, **options), make_client()
    try:
        attach(client, server, slots=slots, engines=ranker_engines, **(ranker or {}))
        yield Joined(server, client)
    finally:
        client.close()
        server.close()


@dataclass(frozen=True)
class Bags:
    values: NDArray[np.int64]
    lengths: NDArray[np.int32]

    @property
    def expected(self) -> NDArray[np.float32]:
        batch, at, columns = self.lengths.shape[1], 0, []
        for rows, lengths in zip(TABLES, self.lengths, strict=True):
            owners = np.repeat(np.arange(batch), lengths)
            pooled = np.zeros((batch, rows.shape[1]), np.float32)
            np.add.at(pooled, owners, rows[self.values[at : at + owners.size]])
            at += owners.size
            columns.append(pooled)
        return np.concatenate(columns, axis=1)

    def only(self, feature: int) -> Bags:
        """The bags of one feature, those of the others empty: a lookup that asks only who holds it."""
        begin = int(self.lengths[:feature].sum())
        lengths = np.zeros_like(self.lengths)
        lengths[feature] = self.lengths[feature]
        return Bags(self.values[begin : begin + int(lengths.sum())], lengths)


def bags(batch: int, seed: int, longest: int = 4) -> Bags:
    random = np.random.default_rng(seed)
    lengths = random.integers(1, longest + 1, (len(DIMS), batch), dtype=np.int32)
    return Bags(random.integers(0, ROWS, int(lengths.sum())), lengths)


def look_up(
    client: _native.LookupClient, asked: Bags, *, sidecars: int = 1, budget_ns: int = BUDGET_NS
) -> tuple[int, NDArray[np.float32]]:
    """(status, what came), the output preset to NaN."""
    out = np.full((asked.lengths.shape[1], sum(DIMS)), np.nan, np.float32)
    verdicts, timings = np.zeros((1, 5), np.int64), np.zeros((1 + sidecars, 6), np.int64)
    parts = [(asked.values, asked.lengths.reshape(-1), None)]
    status, _ = client.lookup(parts, out, [], budget_ns, 0, b"", verdicts, timings)
    assert verdicts[0, 0] == 0
    return status, out


def assert_answers(client: _native.LookupClient, batch: int, seed: int, sidecars: int = 1) -> None:
    asked = bags(batch, seed)
    status, out = look_up(client, asked, sidecars=sidecars)
    assert status == 0
    np.testing.assert_array_equal(out, asked.expected)


def wait_until(happened: Callable[[], bool], within_s: float = PATIENT_S) -> None:
    deadline = time.monotonic() + within_s
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)
