"""When a lane is moved, which one, and that a burst or an even load moves none."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from sidepool.sidecar.balancer import LANE_REST_PERIODS, REST_PERIODS, STEADY_PERIODS, Move, Policy

# lane -> (engine, kind, share of a second that it keeps its engine busy in every period)
Lanes = dict[int, tuple[int, str, float]]


class Simulation:
    """Engines that spend exactly what their lanes cost; moves are carried out at once."""

    def __init__(self, engines: int, lanes: Lanes) -> None:
        self.policy, self.lanes = Policy(), dict(lanes)
        self._engines = [0.0] * engines
        self._busy = dict.fromkeys(lanes, 0.0)

    def period(self, factor: float = 1.0) -> Move | None:
        for lane, (engine, _, share) in self.lanes.items():
            self._engines[engine] += share * factor * 1e9
            self._busy[lane] += share * factor * 1e9
        move = self.policy.next_move(self.stats())
        if move is not None:
            engine, kind, share = self.lanes[move.lane]
            assert engine == move.engine != move.target
            self.lanes[move.lane] = (move.target, kind, share)
        return move

    def stats(self) -> dict[str, Any]:
        gone = {"id": 0, "engine": -1, "kind": "tcp", "busy_ns": 5}
        lanes = [{"id": n, "engine": e, "kind": k, "busy_ns": int(self._busy[n])} for n, (e, k, _) in self.lanes.items()]
        return {"engines": [{"busy_ns": int(busy)} for busy in self._engines], "lanes": [*lanes, gone]}


def test_an_overloaded_engine_gives_the_lane_that_evens_things_out_and_then_rests() -> None:
    busy = {1: (0, "rdma", 0.5), 2: (0, "tcp", 0.35), 3: (0, "rdma", 0.05)}
    world = Simulation(3, {**busy, 4: (1, "rdma", 0.2), 5: (2, "rdma", 0.1)})
    moves = [world.period() for _ in range(60)]
    # 0.9 against 0.1: the lane of 0.35 leaves the least difference.
    assert moves[: STEADY_PERIODS + 1] == [*[None] * STEADY_PERIODS, Move(2, 0, 2)]
    assert not any(moves[STEADY_PERIODS + 1 :])


def test_a_burst_moves_nothing() -> None:
    world = Simulation(2, {1: (0, "rdma", 0.45), 2: (0, "rdma", 0.45)})
    for _ in range(20):
        for factor in (*[1.0] * (STEADY_PERIODS - 1), 0.1):
            assert world.period(factor) is None


def test_a_lane_that_is_the_whole_load_stays() -> None:
    world = Simulation(2, {1: (0, "rdma", 0.95), 2: (1, "rdma", 0.05)})
    assert not any(world.period() for _ in range(50))


def test_lanes_over_shared_memory_stay() -> None:
    world = Simulation(2, {1: (0, "shm", 0.5), 2: (0, "shm", 0.45)})
    assert not any(world.period() for _ in range(20))


@given(
    st.integers(2, 4).flatmap(
        lambda engines: st.tuples(
            st.just(engines),
            st.dictionaries(
                st.integers(1, 20),
                st.tuples(st.integers(0, engines - 1), st.sampled_from(["rdma", "tcp"]), st.floats(0.01, 0.4)),
                max_size=8,
            ),
        )
    )
)
def test_under_a_steady_load_moves_come_to_an_end_and_never_make_things_worse(case: tuple[int, Lanes]) -> None:
    engines, lanes = case
    world = Simulation(engines, lanes)

    def spread() -> float:
        loads = [sum(share for where, _, share in world.lanes.values() if where == e) for e in range(engines)]
        return sum(load**2 for load in loads)

    last_moved: dict[int, int] = {}
    for period in range(150):
        before = spread()
        move = world.period()
        if move is None:
            continue
        assert spread() < before
        assert period - max(last_moved.values(), default=-99) > REST_PERIODS
        assert period - last_moved.get(move.lane, -99) >= LANE_REST_PERIODS
        last_moved[move.lane] = period
    assert not any(world.period() for _ in range(LANE_REST_PERIODS + REST_PERIODS + STEADY_PERIODS))
