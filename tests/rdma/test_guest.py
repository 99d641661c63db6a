"""The guest's devices do what the other tests rely on, seen by pyverbs alone."""

from __future__ import annotations

import cable
import numpy as np
import pytest
from verbs_peer import Completion, Peer, ibv, pair

PAIRS = [("rxe0", "rxe0"), ("rxeA", "rxeB")]


def arrived(peer: Peer) -> Completion:
    """The next completion, which must be of a write that came in."""
    done = peer.completion()
    assert (done.status, done.opcode) == (ibv.IBV_WC_SUCCESS, ibv.IBV_WC_RECV_RDMA_WITH_IMM)
    return done


@pytest.mark.parametrize("devices", PAIRS, ids="-".join)
@pytest.mark.parametrize("size_bytes", [1, 4096, 65536, 500_000])
def test_a_write_and_its_answer_arrive_whole_with_their_immediates(devices: tuple[str, str], size_bytes: int) -> None:
    question, answer = np.random.default_rng(size_bytes).bytes(2 * size_bytes)[:size_bytes], bytes(range(256)) * 4
    with pair(*devices) as (a, b):
        a.post_receive(1)
        b.post_receive(2)
        a.write(3, question, to=128, immediate=0xDEADBEE0, at=4096)
        assert arrived(b) == Completion(2, 0, ibv.IBV_WC_RECV_RDMA_WITH_IMM, size_bytes, 0xDEADBEE0)
        assert b.memory[128 : 128 + size_bytes].tobytes() == question
        assert not b.memory[:128].any()
        assert not b.memory[128 + size_bytes :].any()
        assert a.completion().wr_id == 3
        b.write(4, answer, to=len(a.memory) - len(answer), immediate=7, at=len(b.memory) - len(answer))
        assert (arrived(a).immediate, a.memory[-len(answer) :].tobytes()) == (7, answer)


def test_packets_between_two_devices_cross_the_cable() -> None:
    before = cable.received_packets("vB")
    with pair("rxeA", "rxeB") as (a, b):
        b.post_receive(1)
        a.write(2, bytes(100_000), to=0, immediate=0)
        arrived(b)
    assert cable.received_packets("vB") - before >= 100_000 // 4096


def test_a_thousand_writes_survive_a_cable_that_loses_every_twentieth_packet() -> None:
    with pair("rxeA", "rxeB", timeout=12) as (a, b), cable.losing(5):
        for number in range(1000):
            payload = number.to_bytes(4, "little") * 50
            b.post_receive(number)
            a.write(number, payload, to=number * 256, immediate=number)
            assert (arrived(b).immediate, a.completion().status) == (number, ibv.IBV_WC_SUCCESS)
            assert b.memory[number * 256 :][: len(payload)].tobytes() == payload
        assert cable.dropped() >= 10


# With its own interface down, SoftRoCE's sender finds no route and fails at once; it does not retry.
@pytest.mark.parametrize(
    ("end", "status"), [("vB", ibv.IBV_WC_RETRY_EXC_ERR), ("vA", ibv.IBV_WC_LOC_QP_OP_ERR)], ids=["theirs", "ours"]
)
def test_a_link_that_goes_down_ends_the_write_and_works_again_when_it_comes_up(end: str, status: int) -> None:
    with pair("rxeA", "rxeB", timeout=12, retries=2) as (a, b):
        b.post_receive(1)
        with cable.link_down(end):
            a.write(2, b"lost", to=0, immediate=0)
            assert a.completion().status == status
            # Only here: a packet that waited for the link may arrive when it is back, long after the sender gave up.
            assert not b.memory.any()
    test_packets_between_two_devices_cross_the_cable()


@pytest.mark.parametrize(
    ("key", "to"), [(0x999, 0), (None, (1 << 20) - 10)], ids=["a key that is not theirs", "beyond their memory"]
)
def test_a_write_that_the_other_did_not_allow_is_refused_and_changes_nothing(key: int | None, to: int) -> None:
    with pair("rxeA", "rxeB") as (a, b):
        b.post_receive(1)
        a.write(2, b"not yours, not yours", to=to, immediate=0, key=key)
        assert a.completion().status == ibv.IBV_WC_REM_ACCESS_ERR
        assert not b.memory.any()
