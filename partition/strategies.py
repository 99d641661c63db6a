"""The static strategies: tables are placed whole, and cut only where no node has room for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from sidepool.partition.inventory import CpuNode
from sidepool.partition.load_model import Demand, Piece, Placement
from sidepool.wire.errors import PlanError

Weight = Callable[[Piece, CpuNode], float]
"""What a piece adds to a node's fill: the fullest node is kept as empty as it can be."""


def by_bytes(piece: Piece, node: CpuNode) -> float:
    """Share of the node's memory."""
    return piece.bytes / node.memory_bytes


def by_load(piece: Piece, node: CpuNode) -> float:
    """Seconds of the node's cores or card per lookup; bytes decide between idle tables."""
    return piece.load(node) + 1e-15 * by_bytes(piece, node)


def capacity_balanced(wanted: Sequence[Demand], nodes: Sequence[CpuNode]) -> Placement:
    """Equal shares of memory."""
    return pack(whole_pieces(wanted, nodes), nodes, by_bytes)


def load_balanced(wanted: Sequence[Demand], nodes: Sequence[CpuNode]) -> Placement:
    """Equal shares of the busier of pooling and network."""
    return pack(whole_pieces(wanted, nodes), nodes, by_load)


def net_specific(wanted: Sequence[Demand], nodes: Sequence[CpuNode]) -> Placement:
    """Bin-packing by consumer net: each net gets nodes of its own in proportion to its bytes, so that a net's lookup touches few.

    With fewer nodes than nets, or where a net's tables do not fit its share, nets share nodes.
    """
    pieces = whole_pieces(wanted, nodes)
    nets = sorted({d.net for d in wanted}, key=lambda net: -sum(p.bytes for p in pieces if p.demand.net == net))
    if len(nets) > len(nodes):
        return pack(pieces, nodes, by_bytes)
    total = sum(p.bytes for p in pieces)
    allowed: dict[str, list[int]] = {}
    first = 0
    for i, net in enumerate(nets):
        share = sum(p.bytes for p in pieces if p.demand.net == net) / total
        left = len(nodes) - first - (len(nets) - i - 1)  # one at least for each net to come
        count = left if i == len(nets) - 1 else max(1, min(left, round(share * len(nodes))))
        allowed[net] = list(range(first, first + count))
        first += count
    try:
        return pack(pieces, nodes, by_bytes, lambda piece: allowed[piece.demand.net])
    except PlanError:
        return pack(pieces, nodes, by_bytes)


def whole_pieces(wanted: Sequence[Demand], nodes: Sequence[CpuNode]) -> list[Piece]:
    """Every table whole, or in the fewest equal row ranges that a half-empty largest node has room for."""
    room = max(node.memory_bytes for node in nodes)
    pieces: list[Piece] = []
    for demand in wanted:
        parts = 1 if demand.table.bytes <= room else -(-2 * demand.table.bytes // room)
        pieces += cut_rows(demand, parts)
    return pieces


def cut_rows(demand: Demand, parts: int) -> list[Piece]:
    """Row ranges of equal shares of the ids, as far as hot rows let them be."""
    rows = demand.table.rows
    parts = min(parts, rows)
    edges = [0]
    for k in range(1, parts):
        low, high = edges[-1] + 1, rows - (parts - k)
        while low < high:  # the first edge before which k parts' share lies
            middle = (low + high) // 2
            low, high = (middle + 1, high) if demand.share((0, middle)) < k / parts else (low, middle)
        edges.append(low)
    edges.append(rows)
    return [Piece(demand, (a, b)) for a, b in pairwise(edges)]


def pack(
    pieces: Sequence[Piece], nodes: Sequence[CpuNode], weight: Weight, allowed: Callable[[Piece], Sequence[int]] | None = None
) -> Placement:
    """Greedy: the heaviest piece first, each copy onto the node with room that is then least full. Raises `PlanError`."""
    fill = [0.0] * len(nodes)
    free = [node.memory_bytes for node in nodes]
    holders: list[tuple[int, ...]] = [()] * len(pieces)
    for i in sorted(range(len(pieces)), key=lambda i: (-weight(pieces[i], nodes[0]), -pieces[i].bytes)):
        piece = pieces[i]
        for _ in range(piece.copies):
            fitting = [
                n for n in (allowed(piece) if allowed else range(len(nodes))) if free[n] >= piece.bytes and n not in holders[i]
            ]
            if not fitting:
                raise PlanError(_does_not_fit(piece, nodes, free, pieces))
            best = min(fitting, key=lambda n: (fill[n] + weight(piece, nodes[n]), n))
            fill[best] += weight(piece, nodes[best])
            free[best] -= piece.bytes
            holders[i] = tuple(sorted((*holders[i], best)))
    return Placement(tuple(nodes), tuple(pieces), tuple(holders))


def _does_not_fit(piece: Piece, nodes: Sequence[CpuNode], free: Sequence[int], pieces: Sequence[Piece]) -> str:
    needed, there = sum(p.bytes * p.copies for p in pieces), sum(n.memory_bytes for n in nodes)
    what = f"table {piece.demand.table.name!r}, rows [{piece.rows[0]}, {piece.rows[1]}]: {piece.bytes} bytes do not fit"
    short = f"; all tables need {needed - there} bytes more than there are" if needed > there else ""
    return f"{what}; most that a node has left: {max(free)} bytes, {piece.bytes - max(free)} too few{short}"
