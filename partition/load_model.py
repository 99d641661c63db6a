"""What a placement costs: bytes, rows, network and utilisation per sidecar, and the latency of a lookup.

A lookup waits for the slowest of the sidecars it touches. Each is an M/M/1 queue as fast as its cores or its network card,
whichever is busier; waiting times of different sidecars are taken as independent. Absolute values are estimates, made to
compare placements.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sidepool.partition.inventory import CpuNode
from sidepool.wire.access import AccessProfile, HotRow, TableAccess
from sidepool.wire.plan import Pooling, Table

# One core: a row of 256 bytes takes 7 ns where it is fetched ahead (docs/performance.md: 472 us for 66,560 rows), of which the
# bytes are most; a bag adds its store. A subrequest costs a round trip on tcp, and its handling (README: lanes).
ROW_NS, BYTE_NS, BAG_NS = 2.0, 0.02, 10.0
SUBREQUEST_NS = 10_000.0
ROUND_TRIP_NS = 20_000.0
# Each further access switch between ranker and sidecar, both ways (assumed: two store-and-forward hops).
OTHER_RACK_NS = 4_000.0
ID_BYTES, LENGTH_BYTES, VALUE_BYTES = 8, 4, 4
# Choices among replicas that a latency is averaged over: enough for the third digit of a quantile.
DRAWS = 64


@dataclass(frozen=True)
class Demand:
    """A table as a planner sees it, per lookup."""

    table: Table
    bags: float
    rows: float
    net: str
    pooled: bool
    hot_rows: tuple[HotRow, ...] = ()

    def share(self, rows: tuple[int, int]) -> float:
        """The share of the ids that a row range takes: hot rows where they are, the rest evenly."""
        hot = sum(h.share for h in self.hot_rows)
        inside = sum(h.share for h in self.hot_rows if rows[0] <= h.row < rows[1])
        return inside + max(0.0, 1.0 - hot) * (rows[1] - rows[0]) / self.table.rows


@dataclass(frozen=True)
class Piece:
    """A shard that is to be placed on `copies` sidecars."""

    demand: Demand
    rows: tuple[int, int]
    copies: int = 1

    @property
    def whole(self) -> bool:
        return self.rows == (0, self.demand.table.rows)

    @property
    def bytes(self) -> int:
        return (self.rows[1] - self.rows[0]) * self.demand.table.row_bytes

    @property
    def looked_up(self) -> float:
        """Rows per lookup."""
        return self.demand.rows * (1.0 if self.whole else self.demand.share(self.rows))

    @property
    def bags(self) -> float:
        """Bags per lookup that have ids in it: all of a whole table's; of a cut one's, as if ids were spread at random."""
        if self.whole or self.demand.bags == 0:
            return self.demand.bags
        per_bag = self.demand.rows / self.demand.bags
        return float(self.demand.bags * (1.0 - (1.0 - min(1.0, self.demand.share(self.rows))) ** per_bag))

    @property
    def cpu_ns(self) -> float:
        """One core's time per lookup."""
        return self.looked_up * (ROW_NS + BYTE_NS * self.demand.table.row_bytes) + self.bags * BAG_NS

    @property
    def wire_bytes(self) -> float:
        """Request and response per lookup."""
        returned = self.bags if self.demand.pooled else self.looked_up
        return self.looked_up * ID_BYTES + self.bags * LENGTH_BYTES + returned * self.demand.table.dim * VALUE_BYTES

    def load(self, node: CpuNode) -> float:
        """Seconds per lookup that keep the busier of the node's cores and its card busy, for one of its copies."""
        return max(self.cpu_ns / 1e9 / node.cores, self.wire_bytes / node.bytes_per_s) / self.copies


@dataclass(frozen=True)
class Placement:
    """Pieces, and the nodes (by position) that hold each."""

    nodes: tuple[CpuNode, ...]
    pieces: tuple[Piece, ...]
    holders: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class NodeLoad:
    """One sidecar under the profile's load."""

    bytes: int
    rows_per_s: float
    network_bytes_per_s: float
    cpu: float
    """Utilisation of its cores, 0 to 1 (above: not possible)."""
    network: float
    fan_out: float
    """Share of lookups that touch it."""

    @property
    def busy(self) -> float:
        return max(self.cpu, self.network)


def demands(tables: Sequence[Table], access: AccessProfile, poolings: Mapping[str, Pooling]) -> list[Demand]:
    """Tables with their share of a lookup; a table that the profile does not name is never asked."""
    rate = access.lookups_per_s or 1.0
    known = {a.table: a for a in access.tables}
    found = []
    for table in tables:
        a = known.get(table.name, TableAccess(table=table.name, bags_per_s=0.0, rows_per_s=0.0))
        pooled = poolings.get(table.name) is not Pooling.NONE
        found.append(Demand(table, a.bags_per_s / rate, a.rows_per_s / rate, a.net or "", pooled, a.hot_rows))
    return found


def node_loads(placement: Placement, lookups_per_s: float) -> list[NodeLoad]:
    """What every node of a placement has to do."""
    size = len(placement.nodes)
    held, rows, wire, cpu, asked = (np.zeros(size) for _ in range(5))
    for piece, holders in zip(placement.pieces, placement.holders, strict=True):
        at = list(holders)
        held[at] += piece.bytes
        rows[at] += piece.looked_up / piece.copies
        wire[at] += piece.wire_bytes / piece.copies
        cpu[at] += piece.cpu_ns / piece.copies
        asked[at] = np.maximum(asked[at], 1.0 / piece.copies if piece.bags > 0 else 0.0)
    return [
        NodeLoad(
            bytes=int(held[i]),
            rows_per_s=float(rows[i] * lookups_per_s),
            network_bytes_per_s=float(wire[i] * lookups_per_s),
            cpu=float((cpu[i] + asked[i] * SUBREQUEST_NS) * lookups_per_s / 1e9 / node.cores),
            network=float(wire[i] * lookups_per_s / node.bytes_per_s),
            fan_out=float(asked[i]),
        )
        for i, node in enumerate(placement.nodes)
    ]


def latency_ns(
    placement: Placement, lookups_per_s: float, quantiles: Sequence[float], racks: frozenset[str] = frozenset()
) -> list[float]:
    """Expected quantiles of a lookup's latency, infinite where a node has more to do than it can. `racks`: the rankers'."""
    loads = node_loads(placement, lookups_per_s)
    if any(load.busy >= 1 for load in loads):
        return [float("inf")] * len(quantiles)
    service = _service_ns(placement)  # [draws, nodes]
    fixed = np.array([ROUND_TRIP_NS + (OTHER_RACK_NS if racks and n.rack not in racks else 0.0) for n in placement.nodes])
    busy = np.array([load.busy for load in loads])
    cores = np.array([n.cores for n in placement.nodes])
    mean = np.maximum((service * (service > 0)).mean(axis=0), 1.0)
    slope = cores * (1.0 - busy) / mean  # of the waiting time's tail: P(wait > x) = busy * exp(-slope * x)
    floor = np.where(service > 0, service + fixed, 0.0)

    def reached(t: float) -> float:
        left = t - floor
        each = np.where(left < 0, 0.0, 1.0 - busy * np.exp(-slope * np.maximum(left, 0.0)))
        return float(np.where(service > 0, each, 1.0).prod(axis=1).mean())

    return [_solve(reached, q) for q in quantiles]


def _service_ns(placement: Placement) -> NDArray[np.float64]:
    """Time that a lookup takes at each node it touches, 0 at the others, for draws of the replicas chosen."""
    random = np.random.default_rng(0)
    service = np.zeros((DRAWS, len(placement.nodes)))
    chosen: dict[tuple[int, ...], NDArray[np.int64]] = {}
    every = np.arange(DRAWS)
    for piece, holders in zip(placement.pieces, placement.holders, strict=True):
        if piece.bags == 0:
            continue
        if holders not in chosen:  # a lookup chooses once per set of holders
            chosen[holders] = np.array(holders)[random.integers(0, len(holders), DRAWS)]
        at = chosen[holders]
        speed = np.array([n.bytes_per_s for n in placement.nodes])[at]
        service[every, at] += piece.cpu_ns + piece.wire_bytes / speed * 1e9
    return np.where(service > 0, service + SUBREQUEST_NS, 0.0)


def _solve(reached: Callable[[float], float], quantile: float) -> float:
    low, high = 0.0, 1e6
    while reached(high) < quantile:
        high *= 2
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if reached(middle) < quantile else (low, middle)
    return high
