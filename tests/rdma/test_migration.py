"""A lane moves between engines while lookups flow: none is lost, none is answered twice or wrongly."""

from __future__ import annotations

import itertools
import threading
from functools import partial

import cable
import numpy as np
import pytest
from lane_world import Joined, assert_answers, attach, bags, joined, look_up, make_client, wait_until

from sidepool import _native
from sidepool.wire.errors import Status

# Made beforehand: the guest's time should go into lookups.
ASKED = [(bags(1 + seed % 7, seed), bags(1 + seed % 7, seed).expected) for seed in range(50)]


def lane_of(server: _native.SidecarServer) -> tuple[int, int]:
    """(number, engine) of the only lane; (0, -1) while it is on its way."""
    live = [(lane["id"], lane["engine"]) for lane in server.stats()["lanes"] if lane["id"]]
    return live[0] if live else (0, -1)


def settled_lane(server: _native.SidecarServer) -> tuple[int, int]:
    wait_until(lambda: lane_of(server)[0] != 0)
    return lane_of(server)


class Load:
    """Lookups from several threads until told to stop, every answer compared."""

    def __init__(self, client: _native.LookupClient, threads: int = 6) -> None:
        self._client = client
        self._stop = threading.Event()
        self.done, self.bad = itertools.count(), 0
        self._threads = [threading.Thread(target=self._run, args=(i,)) for i in range(threads)]
        for thread in self._threads:
            thread.start()

    def _run(self, first: int) -> None:
        for i in itertools.count(first):
            if self._stop.is_set():
                return
            asked, expected = ASKED[i % len(ASKED)]
            status, out = look_up(self._client, asked)
            if status != 0 or not np.array_equal(out, expected):
                self.bad += 1
                return
            next(self.done)

    def stop(self) -> int:
        """Lookups done, all of them right."""
        self._stop.set()
        for thread in self._threads:
            thread.join()
        assert self.bad == 0
        return next(self.done)


def move_around(both: Joined, moves: int, engines: int) -> None:
    def settled(number: int, target: int) -> bool:
        return lane_of(both.server) == (number, target)

    for _ in range(moves):
        number, engine = settled_lane(both.server)
        target = (engine + 1) % engines
        both.server.migrate(number, target)
        wait_until(partial(settled, number, target))


def moved(both: Joined) -> int:
    return sum(e["moved"] for e in both.server.stats()["engines"])


def sent(both: Joined) -> int:
    return sum(lane["sent"] for lane in both.server.stats()["lanes"])


def wait_for_an_answer(both: Joined) -> None:
    before = sent(both)
    wait_until(lambda: sent(both) > before)


def test_ten_thousand_lookups_across_twenty_moves_are_all_right() -> None:
    with joined(engines=3) as both:
        load = Load(both.client)
        while sent(both) < 10_000:
            move_around(both, 1, engines=3)
            wait_for_an_answer(both)  # a lane that moves on before has one blackout of both moves
        done, stats = load.stop(), both.server.stats()
        assert done >= 10_000 - 6
        assert moved(both) >= 20
        # Everything was asked once and answered once.
        assert stats["statuses"]["OK"] == both.client.stats()["lanes"][0]["sent"] == both.client.stats()["lanes"][0]["received"]
        blackouts = sum(stats["blackout_us"]["counts"])
        assert moved(both) - 1 <= blackouts <= moved(both)
        assert both.both("failures") == 0


@pytest.mark.parametrize("trouble", ["piggybacked", "large", "losing"])
def test_moves_lose_nothing_with_credits_in_frames_large_responses_or_a_bad_cable(trouble: str) -> None:
    options = {"piggyback": trouble == "piggybacked", "piece_bytes": 4 << 10, "window_bytes": 1, "peer_timeout_s": 8.0}
    with joined(engines=2, ranker={"window_bytes": 1, "peer_timeout_s": 8.0}, **options) as both:
        load = Load(both.client, threads=4)
        large = threading.Thread(target=lambda: [assert_answers(both.client, 500, seed) for seed in range(30)])
        if trouble == "large":
            large.start()
        if trouble == "losing":
            with cable.losing(2, "vA"), cable.losing(2, "vB"):
                move_around(both, 4, engines=2)
        else:
            move_around(both, 10, engines=2)
        if trouble == "large":
            large.join()
        assert load.stop() > 0
        assert both.both("failures") == 0


def test_an_idle_lane_moves_too_and_its_old_engine_may_sleep() -> None:
    with joined(engines=2) as both:
        move_around(both, 3, engines=2)
        assert_answers(both.client, 3, 1)


def test_moves_that_cannot_be_are_refused_by_name() -> None:
    with joined(engines=2) as both:
        number, engine = settled_lane(both.server)
        both.server.migrate(number, engine)  # already there: nothing to do
        for wrong, message in [
            ((number, 2), "engine: found 2; allowed: 0 to 1"),
            ((99, 0), "lane: found 99; allowed: the number of an"),
        ]:
            with pytest.raises(_native.NativeError) as caught:
                both.server.migrate(*wrong)
            assert caught.value.args[0] == Status.REJECTED
            assert message in caught.value.args[1]


def test_a_lane_that_ends_during_its_move_harms_nobody() -> None:
    with joined(engines=2) as both:
        for _ in range(5):
            other = make_client()
            attach(other, both.server)
            load = Load(other, threads=2)
            load.stop()
            number, engine = max((lane["id"], lane["engine"]) for lane in both.server.stats()["lanes"])
            both.server.migrate(number, 1 - engine)
            other.close()
            wait_until(lambda: sum(e["lanes"] for e in both.server.stats()["engines"]) == 1)
            assert_answers(both.client, 3, 1)
