"""Place whole tables on sidecars so that memory and pooling work are both balanced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sidepool.wire.errors import PlanError
from sidepool.wire.plan import Table


def place_tables(
    tables: Sequence[Table], loads: Mapping[str, float], sidecars: int, together: Sequence[frozenset[str]] = ()
) -> tuple[int, ...]:
    """The sidecar of every table: greedy, the table that weighs most first, onto the sidecar that then weighs least.

    loads: pooling work per sample, per table name, in any unit. A weight is the larger of two shares: of all bytes, and
    of all loads. together: tables that must lie on one sidecar, which are placed as one; sets that overlap are one set.
    Every sidecar gets at least one table. Raises `PlanError` if there are fewer than sidecars to place, or none wanted.
    """
    groups = _groups(tables, together)
    if not 1 <= sidecars <= len(groups):
        joined = f" ({len(tables)} tables, some of which a program needs together)" if len(groups) < len(tables) else ""
        raise PlanError(
            f"sidecars: found {sidecars}; allowed: 1 to {len(groups)}{joined}, since each holds at least one whole table\n"
            f"remedy: --sidecars {len(groups)} (sidecars={len(groups)})"
        )
    all_bytes = sum(t.bytes for t in tables)
    all_loads = sum(loads.values()) or 1.0
    shares = [(sum(tables[i].bytes for i in g) / all_bytes, sum(loads[tables[i].name] for i in g) / all_loads) for g in groups]
    held = [(0.0, 0.0)] * sidecars
    owner = [0] * len(tables)
    for group in sorted(range(len(groups)), key=lambda i: -max(shares[i])):
        after = [(b + shares[group][0], work + shares[group][1]) for b, work in held]
        # An empty sidecar always weighs least, so none stays empty; ties go to the lower sum, then to the first.
        chosen = min(range(sidecars), key=lambda s: (max(after[s]), sum(after[s])))
        for table in groups[group]:
            owner[table] = chosen
        held[chosen] = after[chosen]
    return tuple(owner)


def _groups(tables: Sequence[Table], together: Sequence[frozenset[str]]) -> list[list[int]]:
    """Tables that go to the same sidecar, each set in table order, the sets by their first table."""
    set_of = {t.name: {i} for i, t in enumerate(tables)}
    for names in together:
        joined: set[int] = set().union(*(set_of[name] for name in names))
        for i in joined:
            set_of[tables[i].name] = joined
    groups = {min(found): sorted(found) for found in set_of.values()}
    return [groups[first] for first in sorted(groups)]
