"""Moves lanes from an engine that has too much to do to the one that has least, while requests flow."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from sidepool import _native
from sidepool.sidecar import logs

# An engine's load is looked at once a second: longer than any burst of subrequests that its queue absorbs.
PERIOD_S = 1.0
# Below this share of its time an engine's queue stays short, whatever the others do (M/M/1: 2.3 waiting at 0.7).
OVERLOADED = 0.7
# What the busiest engine must have above the least busy one, and what a move must leave of that at most: half of the gap
# would be ideal, and less than a quarter is not worth a blackout.
GAP = 0.25
# Periods that must all agree before a lane moves, and that pass before the next move: one burst moves nothing, and a move's
# own effect is seen before it is judged.
STEADY_PERIODS = 3
REST_PERIODS = 5
# A lane that has moved stays where it is for this long: two engines cannot throw it to each other.
LANE_REST_PERIODS = 30
MOVABLE = ("rdma", "tcp")


@dataclass(frozen=True)
class Move:
    """What to do: `lane` from one engine to another."""

    lane: int
    engine: int
    target: int


@dataclass(frozen=True)
class _Sample:
    engines: tuple[int, ...]
    lanes: Mapping[int, tuple[int, str, int]]


class Policy:
    """Decides from successive `stats()`, a period apart. Pure: no clock, no server."""

    def __init__(self) -> None:
        self._samples: deque[_Sample] = deque(maxlen=STEADY_PERIODS + 1)
        self._rest = 0
        self._resting_lanes: dict[int, int] = {}

    def next_move(self, stats: Mapping[str, Any]) -> Move | None:
        """Take in the counters of one more period; a move if every one of the last periods calls for it."""
        lanes = {lane["id"]: (lane["engine"], lane["kind"], lane["busy_ns"]) for lane in stats["lanes"] if lane["id"]}
        self._samples.append(_Sample(tuple(engine["busy_ns"] for engine in stats["engines"]), lanes))
        self._resting_lanes = {lane: left - 1 for lane, left in self._resting_lanes.items() if left > 1 and lane in lanes}
        if self._rest > 0:
            self._rest -= 1
            return None
        if len(self._samples) <= STEADY_PERIODS:
            return None
        samples = list(self._samples)
        moves = {self._wanted(before, after) for before, after in pairwise(samples)}
        if len(moves) != 1 or None in moves:
            return None
        (pair,) = moves
        assert pair is not None
        move = self._choose(*pair)
        if move is not None:
            self._rest = REST_PERIODS
            self._resting_lanes[move.lane] = LANE_REST_PERIODS
        return move

    def _wanted(self, before: _Sample, after: _Sample) -> tuple[int, int] | None:
        """(overloaded engine, least loaded one) of one period."""
        shares = [(b - a) / (PERIOD_S * 1e9) for a, b in zip(before.engines, after.engines, strict=True)]
        busiest, idlest = max(range(len(shares)), key=shares.__getitem__), min(range(len(shares)), key=shares.__getitem__)
        apart = shares[busiest] - shares[idlest]
        return (busiest, idlest) if shares[busiest] >= OVERLOADED and apart >= GAP else None

    def _choose(self, engine: int, target: int) -> Move | None:
        """The lane whose going comes closest to halving the gap; None where every lane is too heavy or too light for that."""
        first, last = self._samples[0], self._samples[-1]
        gap = (last.engines[engine] - first.engines[engine]) - (last.engines[target] - first.engines[target])
        best: tuple[float, int] | None = None
        for lane, (where, kind, busy) in last.lanes.items():
            if where != engine or kind not in MOVABLE or lane in self._resting_lanes or lane not in first.lanes:
                continue
            left = abs(gap - 2 * (busy - first.lanes[lane][2]))
            if left <= (1 - GAP) * gap and (best is None or left < best[0]):
                best = (left, lane)
        return None if best is None else Move(best[1], engine, target)


class Balancer:
    """A thread that asks the policy once a period and moves lanes as it says."""

    def __init__(self, server: _native.SidecarServer) -> None:
        self._server = server
        self._policy = Policy()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="balancer", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop. Moves that have begun end by themselves."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(PERIOD_S):
            move = self._policy.next_move(self._server.stats())
            if move is None:
                continue
            try:
                self._server.migrate(move.lane, move.target)
            except _native.NativeError as e:  # gone meanwhile, or the target has no room
                logs.info("lane not moved", lane=move.lane, reason=e.args[1])
            else:
                logs.info("lane moves", lane=move.lane, engine=move.engine, target=move.target)
