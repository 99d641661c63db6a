"""What a subrequest costs, counted: figures that hold on any processor."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from lane_world import Joined, assert_answers, bags, joined, look_up

LOOKUPS = 1000


@pytest.fixture(params=[False, True], ids=["dedicated", "piggybacked"])
def both(request: pytest.FixtureRequest) -> Iterator[Joined]:
    with joined(piggyback=request.param) as found:
        assert_answers(found.client, 4, 0)
        yield found


def counts(both: Joined) -> dict[str, int]:
    keys = ("work_requests", "credit_writes", "doorbells", "signalled", "receives", "receive_doorbells", "registrations")
    return {key: both.both(key) for key in keys}


def test_a_subrequest_is_two_work_requests_and_a_sixteenth_of_a_completion(both: Joined) -> None:
    before = counts(both)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda seed: look_up(both.client, bags(4, seed)), range(LOOKUPS)))
    spent = {key: count - before[key] for key, count in counts(both).items()}
    assert sum(lane["sent"] for lane in both.server.stats()["lanes"]) == LOOKUPS + 1
    assert spent["work_requests"] == 2 * LOOKUPS
    # Small frames never fill a quarter of a window, so what credit writes there are, are keepalives.
    sends = spent["work_requests"] + spent["credit_writes"]
    assert spent["signalled"] <= sends / 16 + 4  # the four queues' remainders
    assert spent["doorbells"] <= sends
    assert spent["receive_doorbells"] <= 2 * LOOKUPS / 16 + 2
    assert spent["registrations"] == 0


def test_a_queue_pair_gets_one_doorbell_a_poll_round(both: Joined) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda seed: look_up(both.client, bags(4, seed)), range(LOOKUPS)))
    engines = [*(e["rdma"] for e in both.server.stats()["engines"]), *both.client.stats()["rdma"]]
    assert [e["most_doorbells"] for e in engines] == [1, 1]


def test_what_the_provider_offers_in_thread_domains_is_told(both: Joined) -> None:
    # SoftRoCE has none; the fields must say so, as they must say True on a provider that has them.
    assert not both.server.stats()["engines"][0]["rdma"]["thread_domain"]
    assert not both.client.stats()["rdma"][0]["thread_domain"]
