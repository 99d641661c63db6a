"""Whatever strangers send to whichever port, the sidecar lives, stays small, and answers the others.

`SIDEPOOL_HOSTILE_CASES=N pytest tests/fault/test_hostile_bytes.py` sends N cases to each port instead of a few. The core alone is
put through millions by `frames_test` (tests/native).
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

import grpc
import hostile
import numpy as np
import pytest
from lookup_world import SIDECARS, World, expected, random_bags, write_world
from sidecar_process import PATIENCE_S, RunningSidecar, ready

from sidepool import _native
from sidepool.bench.footprint import footprint
from sidepool.client import EmbeddingClient
from sidepool.wire import control_pb2
from sidepool.wire.plan import Plan

CASES = int(os.environ.get("SIDEPOOL_HOSTILE_CASES", "100"))
ROUND = 25
# Positions in the plan of features that `left` holds, and whether they are weighted.
HELD = [(0, False), (1, False), (3, False), (5, True), (6, False)]
# gRPC keeps buffers per connection for a while and its arenas grow; a single believed length would be far beyond.
GROWTH_BYTES = 48 << 20
METHODS = ("Lookup", "Connect", "Describe", "Stats", "Drain0", "Lookup/Lookup")


@dataclass(frozen=True)
class Target:
    """A sidecar under attack, and its ordinary clients."""

    world: World
    plan: Plan
    sidecar: RunningSidecar
    facts: dict[str, Any]
    clients: list[EmbeddingClient]
    silent: list[socket.socket]
    """Connections to the control port on which nothing was ever said, as old as the target."""

    def admit(self, lane: str) -> control_pb2.ConnectReply:
        request = control_pb2.ConnectRequest(
            lane=lane,
            plan_epoch=self.plan.epoch,
            plan_fingerprint=self.plan.fingerprint,
            wire_version=_native.WIRE_VERSION,
            slots=4,
        )
        reply: control_pb2.ConnectReply = self.sidecar.control.Connect(request, timeout=PATIENCE_S)
        return reply

    def check_others(self, seed: int) -> None:
        bags = random_bags(self.plan, 5, seed=seed)
        wanted, _ = expected(self.plan, self.world.rows, bags)
        for client in self.clients:
            found = client.lookup(bags.values, bags.lengths, bags.weights, deadline_ms=1000 * PATIENCE_S)
            np.testing.assert_allclose(found.out, wanted, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    world = write_world(tmp_path_factory.mktemp("world"))
    with contextlib.ExitStack() as stack:
        left, facts = stack.enter_context(ready(world.config(SIDECARS[0])))
        _, right = stack.enter_context(ready(world.config(SIDECARS[1])))
        plan = world.at(facts["grpc"], right["grpc"])
        clients = [stack.enter_context(EmbeddingClient.connect(plan, lane=lane)) for lane in ("shm", "tcp", "grpc")]
        silent = [stack.enter_context(hostile.connect(facts["grpc"])) for _ in range(50)]
        yield Target(world, plan, left, facts, clients, silent)


def attack_control_port(target: Target, random: Random) -> None:
    hostile.say(target.facts["grpc"], *random.choice([hostile.noise, hostile.http2])(random))


def attack_metrics_port(target: Target, random: Random) -> None:
    hostile.say(target.facts["metrics"], *random.choice([hostile.noise, hostile.http1])(random))


def attack_tcp_lane(target: Target, random: Random) -> None:
    kind, where = random.randrange(5), target.facts["tcp"]
    frames = [hostile.spoiled(random, hostile.frame(random, target.plan.epoch, HELD)) for _ in range(3)]
    if kind == 0:
        hostile.say(where, *hostile.noise(random))
    elif kind == 1:
        hello = random.choice([hostile.HELLO, hostile.HELLO_CREDITS])
        hostile.say(where, hostile.hello(random.randbytes(16), hello), *hostile.noise(random))
    elif kind == 2:  # before the connection for credits, without which there is no lane
        hostile.say(where, hostile.hello(target.admit("tcp").token), *frames)
    elif kind == 3:
        hostile.say_on_both(where, target.admit("tcp").token, frames, [])
    else:
        hostile.say_on_both(where, target.admit("tcp").token, frames, hostile.noise(random))


def attack_unix_socket(target: Target, random: Random) -> None:
    kind = random.randrange(4)
    if kind == 0:
        hostile.say(target.facts["unix"], *hostile.noise(random))
    elif kind == 1:
        hostile.say(target.facts["unix"], hostile.hello(random.randbytes(16)))
    elif kind == 2:  # a token of the other kind
        hostile.say(target.facts["unix"], hostile.hello(target.admit("tcp").token))
    else:  # an admitted lane must stay silent on its socket
        hostile.say(target.facts["unix"], hostile.hello(target.admit("shm").token), *hostile.noise(random))


@pytest.mark.parametrize("attack", [attack_control_port, attack_metrics_port, attack_tcp_lane, attack_unix_socket])
def test_strangers_on_a_port_hurt_nobody(target: Target, attack: Any) -> None:
    random = Random(7)
    pid = target.sidecar.process.pid
    for _ in range(ROUND):  # what is allocated once is allocated now
        attack(target, random)
    before = settled(target)
    for case in range(CASES):
        attack(target, random)
        if case % ROUND == 0:
            target.check_others(case)
    target.check_others(CASES)
    after = settled(target)
    assert target.sidecar.process.poll() is None
    assert target.sidecar.health() == 1
    assert after.sockets <= before.sockets
    assert after.lane_files == before.lane_files
    assert footprint(pid).rss - before.rss < GROWTH_BYTES


def settled(target: Target) -> Any:
    """The sidecar's footprint once handshakes and connections of strangers have timed out or been closed."""
    deadline = time.monotonic() + 10
    looks = []
    while len(looks) < 20 and time.monotonic() < deadline:
        looks.append(footprint(target.sidecar.process.pid))
        time.sleep(0.02)
    return min(looks, key=lambda look: (look.sockets, look.lane_files))


def test_spoiled_frames_over_grpc_are_answered_or_refused(target: Target) -> None:
    random = Random(11)
    seen = set()
    for case in range(4 * CASES):
        bytes_sent = hostile.spoiled(random, hostile.frame(random, target.plan.epoch, HELD))
        call = target.sidecar.control.Lookup.future(control_pb2.LookupFrame(frame=bytes_sent), timeout=PATIENCE_S)
        if call.exception() is None:
            answer = _native.inspect_frame(call.result().frames)
            assert answer["kind"] == "response"
            seen.add(answer["status"])
        else:
            assert call.code() is grpc.StatusCode.INVALID_ARGUMENT, call
            seen.add("refused")
        if case % (4 * ROUND) == 0:
            target.check_others(case)
    # Some were still good, some not frames at all, some asked for another epoch or for ids outside their tables.
    assert {"refused", 0, 1, 6} <= seen
    target.check_others(1)


def test_messages_that_are_no_protobuf_are_refused(target: Target) -> None:
    random = Random(13)
    for case in range(CASES):
        method = random.choice(METHODS)
        call = target.sidecar.channel.unary_unary(f"/sidepool.v1.Sidecar/{method}")
        with contextlib.suppress(grpc.RpcError):
            call(random.randbytes(int(np.exp(random.uniform(0, 11)))), timeout=PATIENCE_S)
        if case % ROUND == 0:
            target.check_others(case)
    target.check_others(2)


def test_silent_connections_to_the_metrics_port_are_bounded(target: Target) -> None:
    """Each would cost a thread for as long as it likes."""
    pid = target.sidecar.process.pid
    threads = len(os.listdir(f"/proc/{pid}/task"))
    with contextlib.ExitStack() as stack:
        strangers: list[socket.socket] = [stack.enter_context(hostile.connect(target.facts["metrics"])) for _ in range(200)]
        time.sleep(0.5)
        assert len(os.listdir(f"/proc/{pid}/task")) <= threads + 70
        target.check_others(3)
        assert len(strangers) == 200
        deadline = time.monotonic() + PATIENCE_S
        while True:  # they are cut off after a few seconds of silence, and scrapes work again
            with contextlib.suppress(OSError), hostile.connect(target.facts["metrics"]) as scraper:
                scraper.settimeout(PATIENCE_S)
                scraper.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
                if b"200 OK" in scraper.recv(4096):
                    break
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_unfinished_handshakes_keep_nobody_out_for_long(target: Target) -> None:
    """A stranger holds every place there is for handshakes; they lapse, and a new lane connects."""
    with contextlib.ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(hostile.connect(target.facts["tcp"]))
        target.check_others(4)
        with EmbeddingClient.connect(target.plan, lane="tcp", require_all=False) as late:
            bags = random_bags(target.plan, 2, seed=5)
            deadline = time.monotonic() + PATIENCE_S
            while True:
                with contextlib.suppress(Exception):
                    late.lookup(bags.values, bags.lengths, bags.weights)
                    break
                assert time.monotonic() < deadline
                time.sleep(0.05)


def test_silent_connections_to_the_control_port_are_closed(target: Target) -> None:
    for stranger in target.silent:
        stranger.settimeout(PATIENCE_S)
        with contextlib.suppress(ConnectionResetError):
            while stranger.recv(4096):  # the server's own greeting
                pass
    target.check_others(6)
