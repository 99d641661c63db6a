"""Credits of the tcp lane, seen by a ranker that is written from docs/wire-format.md: what it does not grant does not come."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

import numpy as np
import pytest
from golden.make_frames import MAGIC, VERSION, request

from sidepool import _native

PATIENCE_S = 30.0
# Long enough for a loopback answer, and short enough to wait for one that must not come.
SILENCE_S = 0.3
EPOCH, DIM, ROWS, SLOTS = 7, 16, 100, 8
SLOT_BYTES = 64 << 10
WINDOW = 2 * SLOT_BYTES
HELLO, RESPONSE, GRANT, HELLO_CREDITS = 1, 4, 6, 7
BATCH = 500
RESPONSE_BYTES = 128 + BATCH * DIM * 4
LAST_PIECE = 1


def grant(limit: int, kind: int = GRANT) -> bytes:
    return struct.pack("<IBBHQ96sQQ", MAGIC, VERSION, kind, 0, 128, b"", limit, 0)


def hello(kind: int, token: bytes, window: int = 0) -> bytes:
    return struct.pack("<IBBH16sQ", MAGIC, VERSION, kind, 0, token, window).ljust(64, b"\0")


def read(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = connection.recv(size - len(data))
        if not more:
            raise ConnectionError
        data += more
    return data


def assert_dropped(connection: socket.socket) -> None:
    with suppress(ConnectionError):
        while connection.recv(1 << 20):
            pass


@dataclass
class Ranker:
    """A lane's data connection and, where the sidecar wants one, that for credits."""

    data: socket.socket
    credits: socket.socket | None
    request_window: int

    def ask(self, number: int, granted: int = 0, batch: int = BATCH) -> None:
        ids = [(number + i) % ROWS for i in range(batch)]
        frame = bytearray(request(slot=number % SLOTS, lookup_id=number, epoch=EPOCH, batch=batch, features=[(0, 1, [], ids, [])]))
        frame[40:48] = int(PATIENCE_S * 1e9).to_bytes(8, "little")  # the budget
        frame[112:120] = granted.to_bytes(8, "little")
        self.data.sendall(frame)

    def grant(self, limit: int) -> None:
        (self.credits or self.data).sendall(grant(limit))

    def answer(self) -> tuple[int, int, int]:
        """(lookup, pooled bytes wrong, bytes) of the next response, which is one piece."""
        header = read(self.data, 128)
        _, _, kind, flags, size, _, status, number = struct.unpack_from("<IBBHQIiQ", header)
        assert (kind, flags, status) == (RESPONSE, LAST_PIECE, 0)
        pooled = np.frombuffer(read(self.data, size - 128), np.float32).reshape(-1, DIM)
        expected = (number + np.arange(len(pooled))) % ROWS
        return number, int((pooled != expected[:, None]).sum()), size

    def granted(self, header: bytes) -> int:
        """The sidecar's newest grant, wherever it is told."""
        return int(struct.unpack_from("<Q", read(self.credits, 128) if self.credits else header, 112)[0])

    def assert_silent(self) -> None:
        self.data.settimeout(SILENCE_S)
        with pytest.raises(TimeoutError):
            self.data.recv(1)
        self.data.settimeout(PATIENCE_S)


@contextmanager
def joined(*, dedicated: bool, window: int = WINDOW) -> Iterator[tuple[_native.SidecarServer, Ranker]]:
    server = _native.SidecarServer(engines=1, spin_us=5, max_lanes=4, max_frame_bytes=1 << 20)
    with ExitStack() as stack:
        stack.callback(server.close)
        tables = _native.TableSet(EPOCH, 1, 1)
        tables.add_table_array(0, np.repeat(np.arange(ROWS, dtype=np.float32), DIM).reshape(ROWS, DIM), "error", 0)
        tables.add_feature(0, 0, "sum", False)
        tables.seal()
        server.publish(tables)
        address = ("127.0.0.1", server.listen_tcp("127.0.0.1", 0, dedicated=dedicated, window_bytes=1, control_traffic_class=192))
        token = os.urandom(16)
        server.expect(token, "tcp", SLOTS, SLOT_BYTES, SLOT_BYTES, PATIENCE_S)
        data = stack.enter_context(socket.create_connection(address, timeout=PATIENCE_S))
        data.sendall(hello(HELLO, token, window))
        ack = read(data, 64)
        assert (ack[48], ack[50]) == (int(dedicated), 192)
        credits = None
        if dedicated:
            credits = stack.enter_context(socket.create_connection(address, timeout=PATIENCE_S))
            credits.sendall(hello(HELLO_CREDITS, token))
            assert read(credits, 64)[8:12] == bytes(4)
        yield server, Ranker(data, credits, 2 * SLOT_BYTES)


@pytest.fixture(params=[True, False], ids=["dedicated", "piggybacked"])
def dedicated(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def test_a_slow_ranker_gets_what_it_granted_and_the_rest_with_a_later_grant(dedicated: bool) -> None:
    fits = WINDOW // RESPONSE_BYTES
    assert 0 < fits < SLOTS - 1
    with joined(dedicated=dedicated) as (server, ranker):
        for number in range(1, SLOTS):
            ranker.ask(number)
        first = [ranker.answer() for _ in range(fits)]
        ranker.assert_silent()
        (lane,) = server.stats()["lanes"]
        assert (lane["received"], lane["credit_waits"]) == (SLOTS - 1, 1)
        left = SLOTS - 1 - fits
        assert (lane["queued"], lane["in_flight"], lane["leaving_bytes"]) == (0, left, left * RESPONSE_BYTES)
        # Limits only rise: an older one is no grant. One that never came is made good by a later one.
        for limit in (0, 1, WINDOW):
            ranker.grant(limit)
        ranker.assert_silent()
        ranker.grant(WINDOW + RESPONSE_BYTES)
        rest = [ranker.answer()]
        ranker.assert_silent()
        ranker.grant(1 << 60)
        rest += [ranker.answer() for _ in range(SLOTS - 2 - fits)]
        assert sorted(first + rest) == [(number, 0, RESPONSE_BYTES) for number in range(1, SLOTS)]
        assert server.in_flight() == 0
        (lane,) = server.stats()["lanes"]
        assert (lane["in_flight"], lane["leaving_bytes"]) == (0, 0)


def test_a_lane_that_waits_for_credit_costs_no_processor_time(dedicated: bool) -> None:
    with joined(dedicated=dedicated) as (_, ranker):
        for number in range(1, SLOTS):
            ranker.ask(number)
        for _ in range(WINDOW // RESPONSE_BYTES):
            ranker.answer()
        ranker.assert_silent()
        before = os.times()
        ranker.assert_silent()
        after = os.times()
        # A spinning engine would take all of it.
        assert (after.user + after.system) - (before.user + before.system) < SILENCE_S / 3


def test_the_sidecar_grants_what_it_has_answered(dedicated: bool) -> None:
    with joined(dedicated=dedicated, window=1 << 40) as (_, ranker):
        sent, granted = 0, ranker.request_window
        for number in range(1, 60):
            size = 192 + BATCH * 8 + (-(BATCH * 8)) % 64
            sent += size
            assert sent <= granted
            ranker.ask(number)
            header = read(ranker.data, 128)
            read(ranker.data, RESPONSE_BYTES - 128)
            # Dedicated grants come a quarter of a window apart, all others with every response.
            if not dedicated or granted - sent < size:
                granted = ranker.granted(header)
        assert sent > ranker.request_window


def test_requests_beyond_the_grant_end_the_lane(dedicated: bool) -> None:
    with joined(dedicated=dedicated, window=0) as (server, ranker):
        # Response credit is not what stops these: a status costs a header only.
        server.drain()
        asked = [(0, 1, [], [0] * 7000, [])]
        flood = b"".join(request(slot=i, lookup_id=1 + i, epoch=EPOCH, batch=7000, features=asked) for i in range(SLOTS))
        with suppress(ConnectionError):
            ranker.data.sendall(flood)
        assert_dropped(ranker.data)
        (lane,) = server.stats()["lanes"]
        assert (lane["engine"], lane["request_bytes"] < len(flood)) == (-1, True)


BAD_GRANTS = {
    "noise": bytes(range(128)),
    "a response": grant(1, kind=RESPONSE),
    "another length": grant(1)[:8] + (256).to_bytes(8, "little") + grant(1)[16:],
}


@pytest.mark.parametrize("bad", BAD_GRANTS)
def test_what_is_no_grant_ends_the_lane_and_only_the_lane(bad: str, dedicated: bool) -> None:
    with joined(dedicated=dedicated) as (server, ranker):
        (ranker.credits or ranker.data).sendall(BAD_GRANTS[bad])
        assert_dropped(ranker.data)
        assert sum(engine["lanes"] for engine in server.stats()["engines"]) == 0


def test_a_grant_on_the_data_connection_of_a_lane_with_two_ends_it() -> None:
    with joined(dedicated=True) as (_, ranker):
        ranker.data.sendall(grant(1 << 40))
        assert_dropped(ranker.data)


@pytest.mark.parametrize("late", ["says something", "hangs up", "another token"])
def test_a_lane_exists_only_with_its_second_connection(late: str) -> None:
    server = _native.SidecarServer(engines=1, spin_us=5, max_lanes=4, max_frame_bytes=1 << 20)
    address, token = ("127.0.0.1", server.listen_tcp("127.0.0.1", 0, dedicated=True)), os.urandom(16)
    server.expect(token, "tcp", SLOTS, SLOT_BYTES, SLOT_BYTES, PATIENCE_S)
    try:
        with (
            socket.create_connection(address, timeout=PATIENCE_S) as data,
            socket.create_connection(address, timeout=PATIENCE_S) as second,
        ):
            data.sendall(hello(HELLO, token))
            read(data, 64)
            if late == "says something":
                data.sendall(grant(1))
                assert_dropped(data)
            elif late == "hangs up":
                data.close()
            second.sendall(hello(HELLO_CREDITS, os.urandom(16) if late == "another token" else token))
            # An acknowledgement may come first, where the other's end is seen a moment later.
            assert_dropped(second)
            assert server.stats()["engines"][0]["lanes"] == 0
    finally:
        server.close()
