"""Byte credits: nobody sends more than was granted, however slow the other is, and a later grant makes good a lost one."""

from __future__ import annotations

import struct
from concurrent.futures import ThreadPoolExecutor

import pytest
from lane_world import REQUEST_BYTES, RESPONSE_BYTES, assert_answers, bags, joined
from test_interop import RANKER_STRIDE, check_response, python_ranker, serving
from wire_peer import ASK, GRANT_AT, HEADER_BYTES, LAST, immediate, pooled_blocks, request_frame

WINDOW = 2 * RANKER_STRIDE


@pytest.mark.parametrize("piggyback", [False, True], ids=["dedicated", "piggybacked"])
def test_the_smallest_windows_only_make_senders_wait(piggyback: bool) -> None:
    tight = {"window_bytes": 1}  # raised to two slots
    with joined(piggyback=piggyback, ranker=tight, **tight) as both:
        with ThreadPoolExecutor(8) as pool:
            for done in [pool.submit(assert_answers, both.client, 600, seed) for seed in range(40)]:
                done.result()
        assert both.both("failures") == 0


def grant(limit: int) -> bytes:
    return struct.pack("<QQ", limit, 0)


def test_a_slow_ranker_gets_what_it_granted_and_the_rest_with_the_next_grant() -> None:
    batch, rows = 600, range(1, 9)  # whose requests fit the sidecar's own window
    size = sum(map(len, pooled_blocks(bags(batch, 1)))) + HEADER_BYTES
    with serving(piece_bytes=1 << 20) as server, python_ranker(server, window_bytes=WINDOW) as ranker:
        for lookup_id in rows:
            frame = request_frame(bags(batch, lookup_id, longest=1), slot=lookup_id, lookup_id=lookup_id)
            ranker.send(frame, immediate(ASK, lookup_id), to=lookup_id * REQUEST_BYTES)
            ranker.sent()
        fits = WINDOW // size
        assert 0 < fits < len(rows)
        first = [ranker.arrived() for _ in range(fits)]
        assert {a.kind for a in first} == {LAST}
        with pytest.raises(TimeoutError):
            ranker.arrived(within_s=3)
        # A grant that says less than before is no grant; one that was never sent is made good by a later one.
        control = ranker.other.control_address - ranker.other.slots_address
        for limit in (1, WINDOW + (len(rows) - fits) * size):
            ranker.data.write(
                1001, grant(limit), to=control, immediate=0, at=ranker.staging, key=ranker.other.control_rkey, plain=True
            )
            ranker.sent()
        rest = [ranker.arrived() for _ in range(len(rows) - fits)]
        assert {a.slot for a in first + rest} == set(rows)
        assert {a.length_bytes for a in first + rest} == {size}


def test_grants_ride_in_requests_and_responses() -> None:
    with serving() as server, python_ranker(server, window_bytes=WINDOW) as ranker:
        granted = WINDOW
        for lookup_id in range(1, 30):
            granted += RESPONSE_BYTES // 4
            frame = bytearray(request_frame(bags(150, lookup_id), slot=2, lookup_id=lookup_id))
            frame[GRANT_AT:HEADER_BYTES] = grant(granted)
            ranker.send(bytes(frame), immediate(ASK, 2), to=2 * REQUEST_BYTES)
            check_response(ranker, lookup_id, batch=150)
        # 29 responses of 53 KB are more than twice the window.
        payload = sum(map(len, pooled_blocks(bags(150, 29))))
        memory = ranker.slot(2)[HEADER_BYTES + payload :][:HEADER_BYTES].tobytes()
        limit, granted_ns = struct.unpack_from("<QQ", memory, GRANT_AT)
        assert limit >= ranker.other.window_bytes
        assert granted_ns > 0
