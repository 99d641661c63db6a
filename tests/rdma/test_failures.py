"""A lane whose peer, cable or rights are gone dies alone: its lookups fail as transport errors, its memory is freed."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from pathlib import Path

import cable
import pytest
from lane_process import CROWD, hear, other_process, tell
from lane_world import (
    REQUEST_BYTES,
    RESPONSE_BYTES,
    SLOTS,
    assert_answers,
    attach,
    bags,
    joined,
    look_up,
    make_client,
    make_server,
    path,
    wait_until,
)

from sidepool.wire.errors import Status

# The shortest that a slow guest keeps without false alarms.
TIMEOUT_S = 4.0
OPTIONS = {"peer_timeout_s": TIMEOUT_S}


def lanes(server: object) -> int:
    return sum(engine["lanes"] for engine in server.stats()["engines"])  # type: ignore[attr-defined]


def test_a_link_that_goes_down_ends_its_lanes_and_a_new_lane_works_when_it_is_back() -> None:
    elsewhere, caller = make_server(device="rxe0"), make_client()
    try:
        attach(caller, elsewhere, device="rxe0")
        with joined(ranker=OPTIONS, **OPTIONS) as both:
            assert_answers(both.client, 3, 1)
            with cable.link_down("vB"):
                status, _ = look_up(both.client, bags(3, 2))
                assert status == Status.TRANSPORT
                assert not both.client.lane_alive(0)
                assert both.client.wait_lane_lost(TIMEOUT_S) == 0
                wait_until(lambda: lanes(both.server) == 0)
                assert_answers(caller, 3, 3)
            attach(both.client, both.server)
            assert_answers(both.client, 3, 4)
            assert both.both("failures") == 2
    finally:
        caller.close()
        elsewhere.close()


def test_a_silence_shorter_than_the_patience_loses_nothing() -> None:
    with joined(ranker={"peer_timeout_s": 30.0}, peer_timeout_s=30.0) as both:
        assert_answers(both.client, 3, 1)
        asking = threading.Thread(target=assert_answers, args=(both.client, 3, 2))
        with cable.losing(100, "vA"), cable.losing(100, "vB"):
            asking.start()
            time.sleep(3)  # twelve keepalives
            assert asking.is_alive()
        asking.join()
        assert both.both("failures") == 0


def test_a_ranker_that_was_killed_is_noticed_and_its_memory_freed() -> None:
    with joined(**OPTIONS) as both, other_process("ask", TIMEOUT_S) as ranker:
        tell(ranker, both.server.connect_rdma(SLOTS, REQUEST_BYTES, RESPONSE_BYTES, hear(ranker)))
        wait_until(lambda: both.server.stats()["statuses"]["OK"] > 10)
        assert lanes(both.server) == 2
        ranker.kill()
        assert_answers(both.client, 3, 1)
        wait_until(lambda: lanes(both.server) == 1)
        assert_answers(both.client, 3, 2)
        assert both.both("failures") == 1


def lanes_while_removed(device: str, command: list[str], *, ends_lanes: bool) -> subprocess.Popen[bytes]:
    """What becomes of a lane on `device` while `command` removes that; the removal, which has only our ends to wait for."""
    with joined(device=device, ranker={"device": device, **OPTIONS}, **OPTIONS) as both:
        assert_answers(both.client, 3, 1)
        removal = subprocess.Popen(command)
        if ends_lanes:
            wait_until(lambda: look_up(both.client, bags(3, 2))[0] == Status.TRANSPORT)
            assert both.client.stats()["lanes"][0]["lost"] == "the queue pair refuses the operation"
            wait_until(lambda: lanes(both.server) == 0)
        else:
            time.sleep(1)
            assert_answers(both.client, 3, 2)
        assert removal.poll() is None
        return removal


# SoftRoCE tells no process that a device is to go: it waits until none has it open. Without its interface it cannot send.
@pytest.mark.parametrize("removed", ["interface", "device"])
def test_a_device_that_is_removed_takes_its_own_lanes_with_it_and_is_not_held(removed: str) -> None:
    with cable.removable_device() as (device, interface), joined() as elsewhere:
        command = ["ip", "link", "delete", interface] if removed == "interface" else ["rdma", "link", "delete", device]
        removal = lanes_while_removed(device, command, ends_lanes=removed == "interface")
        assert removal.wait(30) == 0
        assert_answers(elsewhere.client, 3, 3)


def resources() -> tuple[dict[str, int], str]:
    """What the sidecar's device holds, and the memory that this process has pinned."""
    told = json.loads(subprocess.run(["rdma", "-j", "resource", "show"], check=True, stdout=subprocess.PIPE, text=True).stdout)
    (held,) = [{kind: device[kind] for kind in ("pd", "cq", "qp", "mr")} for device in told if device["ifname"] == "rxeB"]
    return held, Path("/proc/self/status").read_text().partition("VmPin:")[2].partition("\n")[0]


def test_dead_rankers_leave_no_memory_and_no_device_resources_behind() -> None:
    with joined(**OPTIONS) as both:
        assert_answers(both.client, 3, 1)
        before = resources()
        with other_process("crowd", TIMEOUT_S) as rankers:
            for _ in range(CROWD):
                tell(rankers, both.server.connect_rdma(1, REQUEST_BYTES, RESPONSE_BYTES, hear(rankers)))
            assert hear(rankers) == b""
            wait_until(lambda: lanes(both.server) == CROWD + 1)  # the last one is on its way to its engine
            assert resources()[0]["qp"] == before[0]["qp"] + 2 * CROWD
            rankers.kill()
            rankers.wait()
        wait_until(lambda: lanes(both.server) == 1)
        assert_answers(both.client, 3, 2)
        # A lane is gone from the statistics before its queue pairs are.
        wait_until(lambda: resources() == before)
        assert both.server_rdma("failures") == CROWD


def test_a_ranker_that_never_came_after_its_connect_is_forgotten() -> None:
    with joined(**OPTIONS) as both:
        offer = both.client.offer_rdma(path("rxeA"), 1, SLOTS, REQUEST_BYTES, RESPONSE_BYTES)
        both.server.connect_rdma(SLOTS, REQUEST_BYTES, RESPONSE_BYTES, offer.end)
        del offer
        wait_until(lambda: lanes(both.server) == 2)
        wait_until(lambda: lanes(both.server) == 1)
        assert_answers(both.client, 3, 1)


def test_a_sidecar_that_was_killed_fails_what_was_asked_of_it() -> None:
    client = make_client()
    offer = client.offer_rdma(path("rxeA", peer_timeout_s=TIMEOUT_S), 1, SLOTS, REQUEST_BYTES, RESPONSE_BYTES)
    with other_process("serve", TIMEOUT_S) as sidecar:
        tell(sidecar, offer.end)
        client.attach_rdma(0, offer, hear(sidecar))
        assert_answers(client, 3, 1)
        sidecar.kill()
        sidecar.wait()
        assert look_up(client, bags(3, 2))[0] == Status.TRANSPORT
    assert client.stats()["lanes"][0]["lost"] == "the peer does not answer (retries exceeded)"
    client.close()


@pytest.mark.parametrize("closes", ["ranker", "sidecar"])
def test_an_end_that_closes_says_so_and_the_other_need_not_find_out(closes: str) -> None:
    server, client = make_server(), make_client()
    attach(client, server)
    assert_answers(client, 3, 1)
    begin = time.monotonic()
    if closes == "ranker":
        client.close()
        wait_until(lambda: lanes(server) == 0)
        server.close()
    else:
        server.close()
        assert client.wait_lane_lost(60) == 0
        assert client.stats()["lanes"][0]["lost"] == "the sidecar closed the lane"
        client.close()
    assert time.monotonic() - begin < 30  # of a patience of 60 s: it was told


def test_slots_given_up_by_their_callers_come_back() -> None:
    with joined(slots=2) as both:
        for seed in range(40):
            look_up(both.client, bags(300, seed), budget_ns=1)
        for seed in range(10):
            assert_answers(both.client, 300, seed)
