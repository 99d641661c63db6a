"""The native ends understand an end that was written from the specification alone, on either side."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from lane_world import (
    DIMS,
    REQUEST_BYTES,
    RESPONSE_BYTES,
    SLOTS,
    attach,
    bags,
    joined,
    look_up,
    make_client,
    make_server,
    path,
    wait_until,
)
from verbs_peer import ibv
from wire_peer import (
    ASK,
    BYE,
    HEADER_BYTES,
    LAST,
    PIECE,
    WINDOW_BYTES,
    End,
    Response,
    WirePeer,
    immediate,
    pooled_blocks,
    read_request,
    request_frame,
    response_header,
)

from sidepool import _native
from sidepool.wire.errors import Status

RANKER_STRIDE = RESPONSE_BYTES + HEADER_BYTES


@contextmanager
def python_ranker(server: _native.SidecarServer, *, receives: int | None = None, **changes: int) -> Iterator[WirePeer]:
    ranker = WirePeer.open("rxeA", slots=SLOTS, stride=RANKER_STRIDE)
    with ranker.data:
        theirs = End.unpack(server.connect_rdma(SLOTS, REQUEST_BYTES, RESPONSE_BYTES, ranker.end(**changes).pack()))
        ranker.connect(theirs, receives=receives)
        yield ranker


@contextmanager
def serving(**options: object) -> Iterator[_native.SidecarServer]:
    server = make_server(piggyback=True, **options)
    try:
        yield server
    finally:
        server.close()


def gone(server: _native.SidecarServer) -> bool:
    return server.stats()["engines"][0]["lanes"] == 0


def ask(ranker: WirePeer, slot: int, lookup_id: int, batch: int) -> None:
    frame = request_frame(bags(batch, lookup_id), slot=slot, lookup_id=lookup_id)
    ranker.send(frame, immediate(ASK, slot), to=slot * REQUEST_BYTES)


def check_response(ranker: WirePeer, lookup_id: int, batch: int) -> int:
    """Collects the pieces of one response and compares it; returns how many there were."""
    got, pieces = 0, 0
    while True:
        arrived = ranker.arrived()
        pieces += 1
        got += arrived.length_bytes
        if arrived.kind == LAST:
            break
        assert arrived.kind == PIECE
    blocks = b"".join(pooled_blocks(bags(batch, lookup_id)))
    assert got == len(blocks) + HEADER_BYTES
    memory = ranker.slot(arrived.slot)
    assert memory[HEADER_BYTES : HEADER_BYTES + len(blocks)].tobytes() == blocks
    header = Response.unpack(memory[HEADER_BYTES + len(blocks) :][:HEADER_BYTES].tobytes())
    assert (header.status, header.lookup_id, header.slot, header.first, header.count) == (0, lookup_id, arrived.slot, 0, len(DIMS))
    assert (arrived.done, header.frame_bytes, header.flags) == (len(DIMS), got, 1)
    return pieces


def test_a_ranker_written_from_the_specification_is_answered() -> None:
    with serving() as server, python_ranker(server) as ranker:
        for lookup_id in range(1, 40):
            ask(ranker, lookup_id % SLOTS, lookup_id, batch=lookup_id)
            assert check_response(ranker, lookup_id, batch=lookup_id) == 1
        ask(ranker, 3, 99, batch=500)
        # 176,000 bytes. This ranker has receives for 40 pieces of its 4 MiB window, so pieces are of 105 KB and more.
        assert check_response(ranker, 99, batch=500) == 2


def test_a_ranker_that_says_bye_is_let_go_and_a_sidecar_that_ends_says_bye() -> None:
    with serving() as server:
        with python_ranker(server) as ranker:
            ranker.send(b"", immediate(BYE), to=0)
            wait_until(lambda: gone(server))
        with python_ranker(server) as ranker:
            server.close()
            assert ranker.arrived().kind == BYE


@pytest.mark.parametrize(
    "bad",
    [
        "a slot twice",
        "a slot that is none",
        "no frame",
        "another length",
        "another slot's frame",
        "an unknown kind",
        "credit that it has not",
    ],
)
def test_a_ranker_that_breaks_the_rules_loses_its_lane_and_nobody_else(bad: str) -> None:
    with joined(piggyback=True, window_bytes=2 * REQUEST_BYTES) as others, python_ranker(others.server) as ranker:
        frame = request_frame(bags(2, 1), slot=1, lookup_id=1)
        slot = immediate(ASK, 1)
        to = REQUEST_BYTES
        if bad == "a slot twice":  # an answer makes a slot free, so both must come while the engine is held up by another
            ranker.send(request_frame(bags(2000, 1, longest=1), slot=0, lookup_id=2), immediate(ASK, 0), to=0)
            for _ in range(30):
                ranker.send(frame, slot, to=to)
        elif bad == "a slot that is none":
            ranker.send(b"", immediate(ASK, SLOTS), to=0)
        elif bad == "no frame":
            ranker.send(bytes(128), slot, to=to)
        elif bad == "another length":
            ranker.send(frame + bytes(64), slot, to=to)
        elif bad == "another slot's frame":
            ranker.send(frame, immediate(ASK, 2), to=2 * REQUEST_BYTES)
        elif bad == "an unknown kind":
            ranker.send(frame, immediate(PIECE, 1), to=to)
        else:
            large = request_frame(bags(2000, 1, longest=1), slot=0, lookup_id=1)
            assert len(large) * 3 > 2 * REQUEST_BYTES > len(large)
            for i in range(3):  # none of which is answered before all have come: the engine is held up by the first
                large = request_frame(bags(2000, 1, longest=1), slot=i, lookup_id=1 + i)
                ranker.send(large, immediate(ASK, i), to=i * REQUEST_BYTES)
        wait_until(lambda: others.server.stats()["engines"][0]["lanes"] == 1)
        status, out = look_up(others.client, bags(5, 5))
        assert status == 0
        np.testing.assert_array_equal(out, bags(5, 5).expected)


@pytest.mark.parametrize("bad", ["key", "address"])
def test_a_write_outside_the_lanes_own_slots_is_refused_by_the_device(bad: str) -> None:
    with joined(piggyback=True) as others, python_ranker(others.server) as ranker:
        frame = request_frame(bags(2, 1), slot=1, lookup_id=1)
        other_key = ranker.other.slots_rkey ^ 0x101
        to = REQUEST_BYTES if bad == "key" else SLOTS * REQUEST_BYTES
        ranker.send(frame, immediate(ASK, 1), to=to, key=other_key if bad == "key" else None)
        assert ranker.data.completion().status == ibv.IBV_WC_REM_ACCESS_ERR
        wait_until(lambda: others.server.stats()["engines"][0]["lanes"] == 1)
        assert look_up(others.client, bags(5, 5))[0] == 0


def test_one_lane_cannot_write_with_another_lanes_key() -> None:
    with serving() as server, python_ranker(server) as victim, python_ranker(server) as ranker:
        there = victim.other.slots_address - ranker.other.slots_address
        ranker.send(b"mine now" * 8, immediate(ASK, 1), to=there, key=victim.other.slots_rkey)
        assert ranker.data.completion().status == ibv.IBV_WC_REM_ACCESS_ERR
        ask(victim, 0, 1, batch=3)
        assert check_response(victim, 1, batch=3) == 1


class PythonSidecar:
    """Answers the native ranker's requests, on a thread."""

    def __init__(self, client: _native.LookupClient, *, receives: int | None = None) -> None:
        self.peer = WirePeer.open("rxeB", slots=SLOTS, stride=REQUEST_BYTES)
        offer = client.offer_rdma(path("rxeA"), 1, SLOTS, REQUEST_BYTES, RESPONSE_BYTES)
        self.peer.connect(End.unpack(offer.end), receives=receives)
        client.attach_rdma(0, offer, self.peer.end().pack())
        self.consumed = 0

    def take(self) -> tuple[int, int, list[bytes], int]:
        """(slot, lookup id, blocks of the answer, batch) of the next request."""
        arrived = self.peer.arrived()
        assert arrived.kind == ASK
        lookup_id, asked = read_request(self.peer.slot(arrived.slot).tobytes())
        self.consumed += arrived.length_bytes
        return arrived.slot, lookup_id, pooled_blocks(asked), asked.lengths.shape[1]

    def answer(
        self, slot: int, lookup_id: int, blocks: list[bytes], batch: int, *, pieces: int, wrong: dict[str, int] | None = None
    ) -> None:
        at, base = HEADER_BYTES, slot * RANKER_STRIDE
        for done in range(1, pieces):
            self.peer.send(blocks[done - 1], immediate(PIECE, slot, done), to=base + at)
            self.peer.sent()
            at += len(blocks[done - 1])
        payload = sum(map(len, blocks))
        grant = self.consumed + WINDOW_BYTES
        fields = {"slot": slot, "lookup_id": lookup_id, "batch": batch, "payload_bytes": payload, "grant": grant}
        frame = b"".join(blocks[pieces - 1 :]) + response_header(**{**fields, **(wrong or {})})
        self.peer.send(frame, immediate(LAST, slot, len(blocks)), to=base + at)


@contextmanager
def asking(client: _native.LookupClient, batches: list[int]) -> Iterator[list[tuple[int, bool]]]:
    """Look the batches up on a thread; the list gets (status, exact) of each."""
    found: list[tuple[int, bool]] = []

    def run() -> None:
        for seed, batch in enumerate(batches):
            asked = bags(batch, seed)
            status, out = look_up(client, asked)
            found.append((status, bool(np.array_equal(out, asked.expected))))

    thread = threading.Thread(target=run)
    thread.start()
    yield found
    thread.join()


def test_a_sidecar_written_from_the_specification_is_understood() -> None:
    client = make_client()
    batches = [1, 3, 20, 100]
    sidecar = PythonSidecar(client)
    with sidecar.peer.data:
        with asking(client, batches) as found:
            for i, _ in enumerate(batches):
                sidecar.answer(*sidecar.take(), pieces=1 + i % 3)
        assert found == [(0, True)] * len(batches)
        client.close()
        assert sidecar.peer.arrived().kind == BYE


@pytest.mark.parametrize(
    "bad",
    [{"lookup_id": 12345}, {"slot": 9}, {"payload_bytes": 64}, {"count": 1}, {"count": 9}, {"status": 77}],
    ids=str,
)
def test_a_response_that_is_wrong_ends_the_lane_with_a_transport_error(bad: dict[str, int]) -> None:
    client = make_client()
    sidecar = PythonSidecar(client)
    with sidecar.peer.data:
        with asking(client, [4]) as found:
            sidecar.answer(*sidecar.take(), pieces=1, wrong=bad)
        assert found == [(4, False)]
        assert client.stats()["lanes"][0]["lost"] == "the sidecar sent bytes that are no response"
        client.close()


def test_a_sidecar_that_sends_more_than_it_was_granted_loses_the_lane() -> None:
    client = make_client()
    sidecar = PythonSidecar(client)
    with sidecar.peer.data:
        with asking(client, [4]) as found:
            slot, *_ = sidecar.take()
            for _ in range(6):  # four slots are granted
                sidecar.peer.send(bytes(RESPONSE_BYTES), immediate(PIECE, slot, 0), to=slot * RANKER_STRIDE)
        assert found == [(4, False)]
        assert client.stats()["lanes"][0]["lost"] == "the sidecar sent more than it was granted"
        client.close()


def test_a_peer_without_receives_loses_its_lane_and_nobody_else() -> None:
    client = make_client(2)
    try:
        with joined(piggyback=True) as others:
            attach(client, others.server, 1)  # on the engine of the lane that fails
            sidecar = PythonSidecar(client, receives=0)
            with sidecar.peer.data:
                assert look_up(client, bags(4, 1), sidecars=2)[0] == Status.TRANSPORT
                assert client.stats()["lanes"][0]["lost"] == "the peer does not post receives"
            asked = bags(4, 2).only(1)
            status, out = look_up(client, asked, sidecars=2)
            assert status == 0
            np.testing.assert_array_equal(out, asked.expected)
            with python_ranker(others.server, receives=0) as ranker:
                wait_until(lambda: others.server.stats()["engines"][0]["lanes"] == 3)
                ask(ranker, 0, 1, batch=3)
                wait_until(lambda: others.server.stats()["engines"][0]["lanes"] == 2)
                assert look_up(others.client, bags(5, 5))[0] == 0
    finally:
        client.close()


IMPOSSIBLE_ENDS = [
    ({"magic": 1}, "no end of wire version 1"),
    ({"link_layer": 1}, "link layer: found 1; allowed: 2 (Ethernet)"),
    ({"mtu": 0}, "mtu: found 0; allowed: 1 to 5"),
    ({"mtu": 6}, "mtu: found 6; allowed: 1 to 5"),
    ({"data_qpn": 0}, "queue pair numbers: found 0 and"),
    ({"data_qpn": 1 << 24}, "queue pair numbers: found 16777216 and"),
    ({"receives": 0}, "receives: found 0; allowed: 24 to 65536"),
    ({"receives": (1 << 32) - 1}, "receives: found 4294967295; allowed: 24 to 65536"),
    ({"slots": 0}, "slots: found 0; allowed: 16"),
    ({"slot_stride": 0}, "slot_stride: found 0; allowed:"),
    ({"window_bytes": 0}, "window_bytes: found 0; allowed: from one slot to 64 slots"),
    ({"window_bytes": (1 << 64) - 1}, "window_bytes: found 18446744073709551615; allowed: from one slot to 64 slots"),
]


def test_ends_that_cannot_be_are_refused_by_name_at_either_side() -> None:
    server, client = make_server(), make_client()
    try:
        offer = client.offer_rdma(path("rxeA"), 1, SLOTS, REQUEST_BYTES, RESPONSE_BYTES)
        mine = End.unpack(offer.end)
        theirs = End.unpack(server.connect_rdma(SLOTS, REQUEST_BYTES, RESPONSE_BYTES, offer.end))
        for change, message in IMPOSSIBLE_ENDS:
            with pytest.raises(_native.NativeError) as caught:
                server.connect_rdma(SLOTS, REQUEST_BYTES, RESPONSE_BYTES, mine._replace(**change).pack())
            assert message in caught.value.args[1]
            with pytest.raises(_native.NativeError) as caught:
                client.attach_rdma(0, offer, theirs._replace(**change).pack())
            assert message in caught.value.args[1]
        with pytest.raises(_native.NativeError) as caught:
            server.connect_rdma(SLOTS, REQUEST_BYTES, RESPONSE_BYTES, mine._replace(control_qpn=0).pack())
        assert "control queue pair: found 0; allowed: one, since this sidecar's credits are dedicated" in caught.value.args[1]
        assert server.stats()["engines"][0]["lanes"] == 1
        client.attach_rdma(0, offer, theirs.pack())
        assert look_up(client, bags(5, 5))[0] == 0
    finally:
        client.close()
        server.close()


def test_an_end_at_an_address_where_nobody_is_gets_no_lane() -> None:
    nowhere = bytes(10) + b"\xff\xff" + bytes([10, 9, 0, 77])
    with joined(piggyback=True) as others:
        ranker = WirePeer.open("rxeA", slots=SLOTS, stride=RANKER_STRIDE)
        with ranker.data, pytest.raises(_native.NativeError, match=r"cannot connect a queue pair .*: Connection timed out"):
            others.server.connect_rdma(SLOTS, REQUEST_BYTES, RESPONSE_BYTES, ranker.end()._replace(gid=nowhere).pack())
        assert others.server.stats()["engines"][0]["lanes"] == 1
        assert look_up(others.client, bags(5, 5))[0] == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"slots_address": (1 << 64) - 64},
        {"slots_rkey": 0},
        {"control_address": 0, "control_rkey": 1},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_ends_that_lie_cost_their_own_lane_and_nobody_elses(wrong: dict[str, int]) -> None:
    with joined(piggyback=True, peer_timeout_s=4.0) as others:
        ranker = WirePeer.open("rxeA", slots=SLOTS, stride=RANKER_STRIDE)
        with ranker.data:
            lie = ranker.end()._replace(**wrong)
            ranker.connect(End.unpack(others.server.connect_rdma(SLOTS, REQUEST_BYTES, RESPONSE_BYTES, lie.pack())))
            ask(ranker, 0, 1, batch=3)
            wait_until(lambda: others.server.stats()["engines"][0]["lanes"] == 1)
            assert look_up(others.client, bags(5, 5))[0] == 0
