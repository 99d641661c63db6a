"""Which requests the ranker begins, and what it tells the others at once."""

from __future__ import annotations

import numpy as np

from sidepool.triton_backend.admission import Admission
from sidepool.triton_backend.incoming import Incoming
from sidepool.wire.errors import DeadlineExceeded, Overloaded

MS = 1_000_000


def waiting(position: int, *, ids: int = 4, budget_ms: float = 1000, priority: int = 0, samples: int = 2) -> Incoming:
    return Incoming(position, (np.zeros((1, ids), np.int64), None, None), {}, {}, samples, int(budget_ms * MS), priority, None)


def positions(kept: list[Incoming]) -> list[int]:
    return [incoming.position for incoming in kept]


def test_beyond_the_bound_the_least_urgent_are_refused_and_order_is_kept() -> None:
    requests = [waiting(0, budget_ms=80), waiting(1, budget_ms=20), waiting(2, budget_ms=90, priority=1), waiting(3, budget_ms=40)]
    kept, refused = Admission(12).sort(requests)
    assert positions(kept) == [1, 2, 3]
    assert [(incoming.position, type(error)) for incoming, error in refused] == [(0, Overloaded)]
    assert positions(Admission(16).sort(requests)[0]) == positions(Admission(0).sort(requests)[0]) == [0, 1, 2, 3]


def test_a_request_alone_is_never_too_large() -> None:
    kept, refused = Admission(3).sort([waiting(7, ids=1000)])
    assert positions(kept) == [7]
    assert refused == []


def test_a_budget_shorter_than_such_batches_take_is_refused_at_once() -> None:
    admission = Admission(0)
    requests = [waiting(0, budget_ms=5), waiting(1, budget_ms=50), waiting(2, budget_ms=5)]
    for _ in range(7):
        admission.learn(6, 20 * MS)
    assert positions(admission.sort(requests)[0]) == [0, 1, 2]  # too little is known yet
    admission.learn(6, 20 * MS)
    kept, refused = admission.sort(requests)
    assert positions(kept) == [1]
    assert all(isinstance(error, DeadlineExceeded) for _, error in refused)
    assert str(refused[0][1]) == "5 ms were left; such a batch takes 20.0 ms"
    assert positions(admission.sort(requests[:1])[0]) == [0]  # a smaller batch is another matter


def test_an_estimate_that_refuses_everything_is_given_up() -> None:
    admission = Admission(0)
    for _ in range(8):
        admission.learn(2, 800 * MS)
    tries = 0
    while not admission.sort([waiting(0, budget_ms=50)])[0]:
        tries += 1
        assert tries < 100
    for _ in range(5):
        admission.learn(2, 10 * MS)
    admission.learn(2, 10_000 * MS)  # a stall
    assert positions(admission.sort([waiting(0, budget_ms=50)])[0]) == [0]
