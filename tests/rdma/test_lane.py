"""The rdma lane answers exactly, whatever its shape, however bad its cable."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import cable
import pytest
from lane_world import SLOTS, assert_answers, attach, joined, make_client, make_server

from sidepool import _native


@pytest.mark.parametrize("piggyback", [False, True], ids=["dedicated", "piggybacked"])
@pytest.mark.parametrize("piece_bytes", [4 << 10, 1 << 20], ids=["many pieces", "one piece"])
def test_lookups_of_every_size_are_exact(piggyback: bool, piece_bytes: int) -> None:
    with joined(piggyback=piggyback, piece_bytes=piece_bytes) as both:
        # 1,500 samples take 528 KB, which is more than a slot: two chunks.
        for batch in (1, 2, 31, 500, 1500):
            assert_answers(both.client, batch, seed=batch)
        pieces = both.server_rdma("work_requests")
        assert pieces > 20 if piece_bytes == 4 << 10 else pieces == sum(lane["sent"] for lane in both.server.stats()["lanes"])


def test_one_slot_is_enough() -> None:
    with joined(slots=1) as both:
        for seed in range(20):
            assert_answers(both.client, 400, seed)


@pytest.mark.parametrize("engines", [1, 2, 4, 8, 16])
def test_lanes_spread_over_any_number_of_engines(engines: int) -> None:
    sidecars = max(3, engines)
    server, clients = make_server(engines=engines), [make_client() for _ in range(sidecars)]
    try:
        for client in clients:
            attach(client, server)
        assert max(e["lanes"] for e in server.stats()["engines"]) <= -(-sidecars // engines)
        with ThreadPoolExecutor(sidecars) as pool:
            for done in [pool.submit(assert_answers, client, 1 + i % 9, i) for i in range(10) for client in clients]:
                done.result()
    finally:
        for client in clients:
            client.close()
        server.close()


@pytest.mark.parametrize("ranker_engines", [1, 4])
def test_a_ranker_may_have_engines_of_its_own_for_its_lanes(ranker_engines: int) -> None:
    servers, client = [make_server() for _ in range(3)], make_client(3)
    try:
        for sidecar, server in enumerate(servers):
            attach(client, server, sidecar, engines=ranker_engines)
        assert sorted(e["lanes"] for e in client.stats()["rdma"]) == ([3] if ranker_engines == 1 else [0, 1, 1, 1])
        with ThreadPoolExecutor(4) as pool:
            for done in [pool.submit(assert_answers, client, 5, seed, 3) for seed in range(100)]:
                done.result()
    finally:
        client.close()
        for server in servers:
            server.close()


def test_more_callers_than_slots_take_turns() -> None:
    with joined(slots=2) as both, ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(assert_answers, both.client, 3, seed) for seed in range(100)]:
            done.result()


def test_a_cable_that_loses_packets_costs_nothing_but_time() -> None:
    options = {"peer_timeout_s": 8.0}
    with joined(ranker=options, **options) as both, cable.losing(2, "vA"), cable.losing(2, "vB"):
        for seed in range(2_000):
            assert_answers(both.client, 1 + seed % 60, seed)
            if seed % 50 == 49 and cable.dropped("vA") + cable.dropped("vB") > 10:
                break
        else:
            raise AssertionError("the cable lost next to nothing")
        assert both.client.lane_alive(0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device": "mlx5_0"}, "found 'mlx5_0', port 0: no such active port; allowed: auto, or an active port of "),
        ({"port": 2}, "found 'rxeB', port 2: no such active port"),
        ({"gid_index": 99}, "gid_index: found 99 on rxeB port 1; allowed: auto, or an entry of its table that is in use"),
    ],
)
def test_a_device_that_is_not_there_is_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(_native.NativeError) as caught:
        make_server(**change)
    assert message in caught.value.args[1]


def test_slots_that_do_not_fit_are_refused_by_name() -> None:
    server, client = make_server(), make_client()
    try:
        offer = client.offer_rdma({"device": "rxeA", "peer_timeout_s": 8.0}, 1, SLOTS, 64 << 10, 256 << 10)
        wrong_limits = {(8, 64 << 10, 256 << 10): "slots: found 16; allowed: 8", (16, 64 << 10, 128 << 10): "slot_stride: found"}
        for limits, message in wrong_limits.items():
            with pytest.raises(_native.NativeError) as caught:
                server.connect_rdma(*limits, offer.end)
            assert message in caught.value.args[1]
        for wrong, message in [(b"", "found 0 bytes; allowed: 128"), (bytes(128), "no end of wire version")]:
            with pytest.raises(_native.NativeError) as caught:
                server.connect_rdma(16, 64 << 10, 256 << 10, wrong)
            assert message in caught.value.args[1]
        assert server.stats()["engines"][0]["lanes"] == 0
        attach(client, server)
        assert_answers(client, 3, 1)
    finally:
        client.close()
        server.close()
