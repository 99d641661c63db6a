"""Sidecars that are killed or frozen under load behind a real Triton, and a Triton that is killed itself."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from numpy.typing import NDArray
from served_dlrm import Served, served
from sidecar_process import wait_until_stopped

from sidepool.__main__ import main
from sidepool.bench.deployment import DISAGGREGATED
from sidepool.bench.footprint import footprint
from sidepool.bench.processes import Sidecar
from sidepool.bench.resharding import swapped
from sidepool.bench.traffic import Caller, infer_inputs
from sidepool.wire import control_pb2, control_pb2_grpc
from sidepool.wire.plan import load_plan, save_plan

pytestmark = pytest.mark.triton

CLIENTS = 6
DEADLINE_MS = 500
# What scheduling, Triton's queue and the client may add on a machine with fewer cores than busy processes.
MARGIN_S = 1.0
# What is promised: a second after the sidecar's return. The test machine may be busy, so the test allows a little more.
RETURN_S = 2.0
PATIENCE_S = 30.0


@dataclass(frozen=True)
class Outcome:
    """One request: when it began and ended (monotonic seconds), and the error's code, or nothing for right scores."""

    begin: float
    end: float
    code: str


class Load:
    """Clients that send requests through Triton without pause; every score is compared with the model's own."""

    def __init__(self, running: Served) -> None:
        self._running = running
        seeds = range(8)
        self._requests = [infer_inputs(running.request(1 + seed, seed)) for seed in seeds]
        self._expected = [running.expected(1 + seed, seed) for seed in seeds]
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._work, args=(i,), name=f"load-{i}") for i in range(CLIENTS)]
        self.outcomes: list[list[Outcome]] = [[] for _ in range(CLIENTS)]

    def _work(self, client: int) -> None:
        caller = Caller(self._running.deployment.server.grpc, DISAGGREGATED)
        try:
            turn = client
            while not self._stop.is_set():
                turn = (turn + 1) % len(self._requests)
                begin = time.monotonic()
                code = self._infer(caller, self._requests[turn], self._expected[turn])
                self.outcomes[client].append(Outcome(begin, time.monotonic(), code))
        finally:
            caller.close()

    def _infer(self, caller: Caller, inputs: list[object], expected: NDArray[np.float32]) -> str:
        try:
            scores = caller.infer(inputs, parameters={"deadline_ms": DEADLINE_MS})
        except triton.InferenceServerException as e:
            found = re.search(r"\[([A-Z]+)\]", str(e))
            return found[1] if found else str(e)
        return "" if np.allclose(scores, expected, atol=1e-5) else "WRONG SCORES"

    @contextmanager
    def running(self) -> Iterator[Load]:
        for thread in self._threads:
            thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            for thread in self._threads:
                thread.join()

    def since(self, moment: float, code: str | None = None) -> list[list[Outcome]]:
        """Per client the outcomes (with `code`) of requests sent after `moment`."""
        return [[o for o in mine.copy() if o.begin > moment and code in (None, o.code)] for mine in self.outcomes]

    def wait(self, reached: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not reached():
            assert time.monotonic() < deadline, [mine[-3:] for mine in self.outcomes]
            time.sleep(0.005)

    def wait_for_right_answers(self, moment: float, count: int) -> None:
        """Until every client has had `count` right answers to requests sent after `moment`."""
        self.wait(lambda: all(len(mine) >= count for mine in self.since(moment, "")))

    def seconds_until_right(self, moment: float) -> float:
        """From `moment` until every client had its first right answer to a request sent after it."""
        return max(mine[0].end for mine in self.since(moment, "")) - moment

    def codes(self) -> set[str]:
        return {o.code for mine in self.outcomes for o in mine}

    def slowest_s(self, moment: float) -> float:
        """The longest that any request took which ended after `moment`."""
        return max(o.end - o.begin for mine in self.outcomes for o in mine if o.end > moment)


@pytest.fixture(scope="module", params=["shm", "tcp"])
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(jagged=False, directory=tmp_path_factory.mktemp("deployment"), lane=request.param) as found:
        yield found


def test_a_sidecar_killed_under_load_fails_requests_in_time_until_it_is_back(running: Served) -> None:
    sidecar = running.deployment.sidecars[1]
    with Load(running).running() as load:
        load.wait_for_right_answers(0.0, 10)
        sidecar.kill()
        lost = time.monotonic()
        load.wait(lambda: all(len(mine) >= 20 for mine in load.since(lost, "TRANSPORT")))
        running.deployment.server.get_json("/v2/health/ready")  # raises unless the answer is 200
        running.deployment.server.get_json(f"/v2/models/{DISAGGREGATED}/ready")
        started = time.monotonic()
        sidecar.start()
        sidecar.wait_ready()
        back = time.monotonic()
        load.wait_for_right_answers(back, 20)
    assert load.codes() <= {"", "TRANSPORT", "DEADLINE"}
    assert not any(o.code == "" for mine in load.since(lost) for o in mine if o.end < started), "answered without the sidecar"
    assert load.slowest_s(lost) < DEADLINE_MS / 1e3 + MARGIN_S
    seconds = load.seconds_until_right(back)
    print(f"lookups succeed {1e3 * seconds:.0f} ms after the return; slowest request {1e3 * load.slowest_s(lost):.0f} ms")
    assert seconds < RETURN_S
    assert all(not o.code for mine in load.since(back + seconds) for o in mine), "once back, it stays"


def test_a_frozen_sidecar_costs_requests_their_budget_and_no_more(running: Served) -> None:
    pid = running.deployment.sidecars[1].pid
    assert pid is not None
    with Load(running).running() as load:
        load.wait_for_right_answers(0.0, 10)
        os.kill(pid, signal.SIGSTOP)
        try:
            wait_until_stopped(pid)
            frozen = time.monotonic()
            load.wait(lambda: all(len(mine) >= 3 for mine in load.since(frozen)))
            running.deployment.server.get_json("/v2/health/ready")
        finally:
            os.kill(pid, signal.SIGCONT)
        thawed = time.monotonic()
        load.wait_for_right_answers(thawed, 20)
    # Lookups that were given up hold their credits until the sidecar answers them; with all of them out, the next ones
    # wait for a credit instead of an answer, for as long.
    assert load.codes() <= {"", "DEADLINE", "OVERLOADED"}
    assert any(o.code == "DEADLINE" for mine in load.since(frozen) for o in mine)
    # One batch is executed at a time: a request may wait for the whole budget of the batch before its own.
    assert load.slowest_s(frozen) < 2 * DEADLINE_MS / 1e3 + MARGIN_S
    seconds = load.seconds_until_right(thawed)
    print(f"lookups succeed {1e3 * seconds:.0f} ms after SIGCONT; slowest request {1e3 * load.slowest_s(frozen):.0f} ms")
    assert seconds < RETURN_S


def test_a_change_of_plans_is_noticed_by_no_request(running: Served) -> None:
    deployment, sidecars = running.deployment, running.deployment.sidecars
    save_plan(swapped(load_plan(deployment.directory / "plan.yaml")), deployment.directory / "next.yaml")
    with Load(running).running() as load:
        load.wait_for_right_answers(0.0, 10)
        assert main(["plan", "apply", str(deployment.directory / "next.yaml"), "--deployment", str(deployment.directory)]) == 0
        before = [counted_rows(sidecar) for sidecar in sidecars]  # from now on, of the new plan only
        load.wait(lambda: all(counted_rows(sidecar) > rows for sidecar, rows in zip(sidecars, before, strict=True)))
        load.wait_for_right_answers(time.monotonic(), 10)
    assert load.codes() == {""}
    running.check_serving()


def test_a_killed_triton_leaves_no_lane_and_no_descriptor(running: Served) -> None:
    """The last test of a deployment: its Triton does not come back."""
    server, sidecars = running.deployment.server, running.deployment.sidecars
    running.check_serving()
    assert [lanes(sidecar) for sidecar in sidecars] == [1, 1]
    with Load(running).running() as load:
        load.wait_for_right_answers(0.0, 5)
        server.kill()
        killed = time.monotonic()
        load.wait(lambda: all(any(o.code for o in mine) for mine in load.since(killed)))
    deadline = time.monotonic() + PATIENCE_S
    while any(lanes(sidecar) for sidecar in sidecars):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    print(f"lanes freed {1e3 * (time.monotonic() - killed):.0f} ms after the kill")
    for sidecar in sidecars:
        used = held(sidecar)
        sidecar.stop()
        sidecar.start()
        sidecar.wait_ready()
        assert lanes(sidecar) == 0
        assert used == held(sidecar), "a sidecar that has just started holds the same"


def stats(sidecar: Sidecar) -> Any:
    with grpc.insecure_channel(str(sidecar.facts()["grpc"])) as channel:
        stub = control_pb2_grpc.SidecarStub(channel)  # type: ignore[no-untyped-call]
        return json.loads(stub.Stats(control_pb2.StatsRequest(), timeout=PATIENCE_S).json)["stats"]


def lanes(sidecar: Sidecar) -> int:
    """Lanes a sidecar says are open."""
    return sum(engine["lanes"] for engine in stats(sidecar)["engines"])


def counted_rows(sidecar: Sidecar) -> int:
    """Rows read under its newest plan, and under others while they were that."""
    return sum(table["rows"] for table in stats(sidecar)["tables"])


def held(sidecar: Sidecar) -> tuple[int, int]:
    """Sockets and lane files of a sidecar, once connections that were just closed are gone."""
    assert sidecar.pid is not None
    looks = []
    for _ in range(20):
        looks.append(footprint(sidecar.pid))
        time.sleep(0.02)
    return min((look.sockets, look.lane_files) for look in looks)
