"""Which requests of an `execute` are worth beginning: those within the bound on ids whose answers can be there in time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from sidepool.triton_backend.incoming import Incoming
from sidepool.wire.errors import DeadlineExceeded, Overloaded, SidepoolError

# A quick batch says at once what is possible, a slow one little by little, and never more than so many times what was thought
# before: stalls are no rule. The first ones meet cold memory and code that is not loaded yet.
_FASTER, _SLOWER, _MOST = 1 / 2, 1 / 8, 4.0
_WARM = 8
# What a refusal takes off the estimate that it was founded on: were that wrong, nothing would be scored that could say so.
_DOUBT = 1 / 32

Refused = list[tuple[Incoming, SidepoolError]]


class Admission:
    """Belongs to the thread in which Triton calls the model."""

    def __init__(self, max_ids: int) -> None:
        """`max_ids`: of the requests of one `execute`, which is all that is under way; 0: no bound."""
        self._max_ids = max_ids
        self._usual_ns: dict[int, float] = {}
        """Time of a batch that goes well, by the power of two that its samples do not reach."""
        self._seen: Counter[int] = Counter()

    def sort(self, requests: Sequence[Incoming]) -> tuple[list[Incoming], Refused]:
        """Those to score, in their order, and the others with their errors: `Overloaded`, `DeadlineExceeded`."""
        kept, refused = self._within_bound(requests)
        size = sum(incoming.samples for incoming in kept).bit_length()
        usual_ns = self._usual_ns[size] if self._seen[size] >= _WARM else 0.0
        late = [incoming for incoming in kept if incoming.budget_ns < usual_ns]
        if not late:
            return kept, refused
        self._usual_ns[size] = usual_ns * (1 - _DOUBT)
        for incoming in late:
            left_ms = incoming.budget_ns / 1e6
            refused.append((incoming, DeadlineExceeded(f"{left_ms:g} ms were left; such a batch takes {usual_ns / 1e6:.1f} ms")))
        return [incoming for incoming in kept if incoming.budget_ns >= usual_ns], refused

    def learn(self, samples: int, elapsed_ns: int) -> None:
        """A batch of so many samples was scored in that time."""
        size = samples.bit_length()
        usual_ns = self._usual_ns.setdefault(size, float(elapsed_ns))
        self._seen[size] += 1
        if elapsed_ns < usual_ns:
            self._usual_ns[size] = usual_ns + (elapsed_ns - usual_ns) * _FASTER
        elif self._seen[size] > _WARM:
            self._usual_ns[size] = usual_ns + (min(elapsed_ns, _MOST * usual_ns) - usual_ns) * _SLOWER

    def _within_bound(self, requests: Sequence[Incoming]) -> tuple[list[Incoming], Refused]:
        if self._max_ids == 0 or sum(incoming.part[0].size for incoming in requests) <= self._max_ids:
            return list(requests), []
        ids = 0
        beyond: dict[int, Incoming] = {}
        for incoming in sorted(requests, key=lambda r: (-r.priority, r.budget_ns)):
            if ids and ids + incoming.part[0].size > self._max_ids:
                beyond[incoming.position] = incoming
            else:
                ids += incoming.part[0].size
        error = Overloaded(f"the requests at hand have more ids than the {self._max_ids} that max_ids allows")
        kept = [incoming for incoming in requests if incoming.position not in beyond]
        return kept, [(incoming, error) for incoming in beyond.values()]
