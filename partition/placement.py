"""Place whole tables on sidecars so that memory and pooling work are both balanced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sidepool.wire.errors import PlanError
from sidepool.wire.plan import Table


def place_tables(tables: Sequence[Table], loads: Mapping[str, float], sidecars: int) -> tuple[int, ...]:
    """The sidecar of every table: greedy, the table that weighs most first, onto the sidecar that then weighs least.

    loads: pooling work per sample, per table name, in any unit. A weight is the larger of two shares: of all bytes, and
    of all loads.
    Every sidecar gets at least one table. Raises `PlanError` if there are fewer tables than sidecars, or none wanted.
    """
    if not 1 <= sidecars <= len(tables):
        raise PlanError(
            f"sidecars: found {sidecars}; allowed: 1 to {len(tables)}, since each holds at least one whole table\n"
            f"remedy: --sidecars {len(tables)} (sidecars={len(tables)})"
        )
    all_bytes = sum(t.bytes for t in tables)
    all_loads = sum(loads.values()) or 1.0
    shares = [(t.bytes / all_bytes, loads[t.name] / all_loads) for t in tables]
    held = [(0.0, 0.0)] * sidecars
    owner = [0] * len(tables)
    for table in sorted(range(len(tables)), key=lambda i: -max(shares[i])):
        after = [(b + shares[table][0], work + shares[table][1]) for b, work in held]
        # An empty sidecar always weighs least, so none stays empty; ties go to the lower sum, then to the first.
        owner[table] = min(range(sidecars), key=lambda s: (max(after[s]), sum(after[s])))
        held[owner[table]] = after[owner[table]]
    return tuple(owner)
