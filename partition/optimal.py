"""`optimal`: pieces from the profile, an integer program for where they go, and the best of everything by expected latency.

Cutting and copying are decided by how much of a node's time a table takes: for each of several limits, tables above it are
copied where memory allows and cut by rows where not. Each set of pieces is placed greedily and by an integer program (HiGHS)
that makes the busiest node as idle as it can be under memory limits; pieces too light to matter stay where greedy put them.
The static strategies are candidates too, so that the result is never worse than theirs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_matrix

from sidepool.partition.inventory import CpuNode
from sidepool.partition.load_model import Demand, Piece, Placement
from sidepool.partition.strategies import by_load, capacity_balanced, cut_rows, load_balanced, net_specific, pack, whole_pieces
from sidepool.wire.errors import PlanError

# A piece may take this share of what a node takes on average: none is cut, ..., finest that still pays for its fan-out.
LIMITS = (float("inf"), 2.0, 1.0, 0.5, 0.25)
# Binary variables that HiGHS gets in one program: it finds good placements of this many in seconds, of ten times as many in hours.
MAX_VARIABLES = 2500
# Of memory that tables leave free, what copies may take.
COPY_SHARE = 0.8


@dataclass(frozen=True)
class Optimal:
    """A placement with its proof: the busiest node is at most `gap` above the lower bound for these pieces."""

    placement: Placement
    gap: float
    chosen: str


def optimal(
    wanted: Sequence[Demand], nodes: Sequence[CpuNode], score: Callable[[Placement], tuple[float, float]], time_limit_s: float
) -> Optimal:
    """The placement with the lowest `score` of all that were found within the time. Raises `PlanError` where nothing fits."""
    until = time.monotonic() + time_limit_s
    candidates: list[tuple[str, Placement]] = []
    fault: PlanError | None = None
    for strategy in (capacity_balanced, load_balanced, net_specific):
        try:
            candidates.append((strategy.__name__, strategy(wanted, nodes)))
        except PlanError as e:
            fault = e
    for i, limit in enumerate(LIMITS):
        name = f"pieces of at most {limit:g} of a node's mean load"
        left = until - time.monotonic()
        try:
            greedy = pack(_pieces(wanted, nodes, limit), nodes, by_load)
        except PlanError as e:
            fault = e
            continue
        candidates.append((name, greedy))
        if left > 1.0 and (better := _solve(greedy, left / (len(LIMITS) - i))) is not None:
            candidates.append((name + ", integer program", better))
    if not candidates:
        assert fault is not None
        raise fault
    chosen, best = min(candidates, key=lambda c: score(c[1]))
    return Optimal(best, _gap(best), chosen)


def _pieces(wanted: Sequence[Demand], nodes: Sequence[CpuNode], limit: float) -> list[Piece]:
    whole = whole_pieces(wanted, nodes)
    mean = sum(p.load(nodes[0]) for p in whole) / len(nodes)
    spare = COPY_SHARE * (sum(n.memory_bytes for n in nodes) - sum(p.bytes for p in whole))
    pieces: list[Piece] = []
    for piece in sorted(whole, key=lambda p: -p.load(nodes[0])):
        parts = min(len(nodes), -(-piece.load(nodes[0]) // (limit * mean)) if mean > 0 else 1)
        parts = int(max(parts, 1))
        if parts == 1:
            pieces.append(piece)
        elif (parts - 1) * piece.bytes <= spare:
            spare -= (parts - 1) * piece.bytes
            pieces.append(Piece(piece.demand, piece.rows, parts))
        elif piece.whole:
            pieces += cut_rows(piece.demand, parts)
        else:
            pieces.append(piece)
    return pieces


def _solve(greedy: Placement, time_limit_s: float) -> Placement | None:
    """The integer program over the heaviest pieces, the others staying where the greedy placement has them."""
    nodes, pieces = greedy.nodes, greedy.pieces
    order = sorted(range(len(pieces)), key=lambda i: -pieces[i].load(nodes[0]) * pieces[i].copies)
    free_pieces = order[: max(1, MAX_VARIABLES // len(nodes))]
    fixed_load, fixed_bytes = np.zeros(len(nodes)), np.zeros(len(nodes))
    for i in order[len(free_pieces) :]:
        for n in greedy.holders[i]:
            fixed_load[n] += pieces[i].load(nodes[n])
            fixed_bytes[n] += pieces[i].bytes
    size, width = len(free_pieces), len(nodes)
    x = np.arange(size * width).reshape(size, width)  # piece on node; the last variable is the load of the busiest node
    loads = np.array([[pieces[i].load(n) for n in nodes] for i in free_pieces])
    unit = max(float(loads.max()), 1e-12)
    held = np.array([pieces[i].bytes for i in free_pieces], float)
    memory = np.array([n.memory_bytes for n in nodes], float)
    last = size * width
    node_of, flat = np.tile(np.arange(width), size), x.ravel()
    constraints = [
        LinearConstraint(
            coo_matrix((np.ones(last), (np.repeat(np.arange(size), width), flat)), (size, last + 1)).tocsr(),
            [pieces[i].copies for i in free_pieces],
            [pieces[i].copies for i in free_pieces],
        ),
        LinearConstraint(
            coo_matrix((np.repeat(held, width) / memory[node_of], (node_of, flat)), (width, last + 1)).tocsr(),
            -np.inf,
            1.0 - fixed_bytes / memory,
        ),
        LinearConstraint(
            coo_matrix(
                (
                    np.append(loads.ravel() / unit, -np.ones(width)),
                    (np.append(node_of, np.arange(width)), np.append(flat, np.full(width, last))),
                ),
                (width, last + 1),
            ).tocsr(),
            -np.inf,
            -fixed_load / unit,
        ),
    ]
    found = milp(
        np.append(np.zeros(last), 1.0),
        constraints=constraints,
        integrality=np.append(np.ones(last), 0),
        bounds=Bounds(np.zeros(last + 1), np.append(np.ones(last), np.inf)),
        options={"time_limit": time_limit_s, "mip_rel_gap": 0.005},
    )
    if found.x is None:
        return None
    chosen = found.x[:last].reshape(size, width) > 0.5
    holders = list(greedy.holders)
    for row, i in enumerate(free_pieces):
        holders[i] = tuple(int(n) for n in np.flatnonzero(chosen[row]))
    return Placement(nodes, pieces, tuple(holders))


def _gap(placement: Placement) -> float:
    """How far the busiest node is above what no placement of these pieces can be below: the mean, or the heaviest copy."""
    nodes = placement.nodes
    busy = np.zeros(len(nodes))
    for piece, holders in zip(placement.pieces, placement.holders, strict=True):
        for n in holders:
            busy[n] += piece.load(nodes[n])
    best = [min(piece.load(n) for n in nodes) for piece in placement.pieces]
    mean = sum(b * p.copies for b, p in zip(best, placement.pieces, strict=True)) / len(nodes)
    bound = max(mean, max(best))
    return float(busy.max() / bound - 1.0) if bound > 0 else 0.0
