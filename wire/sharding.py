"""The shards of a plan as a lookup meets them: distinct shards of a table, each with the sidecars that hold a replica.

The shards of a table tile it: bands of columns `[begin, end)`, each cut into row ranges `[begin, end)` of its own. TorchRec's kinds
are forms of that.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sidepool.wire.errors import PlanError

if TYPE_CHECKING:
    from sidepool.wire.plan import Plan, Shard, Table

# Frames carry a shard's number among those of its table in 16 bits.
MAX_SHARDS_PER_TABLE = 65_536


class Sharding(enum.StrEnum):
    """How a table is spread (TorchRec's words; `grid` is both cut)."""

    TABLE_WISE = "table_wise"
    ROW_WISE = "row_wise"
    COLUMN_WISE = "column_wise"
    TABLE_ROW_WISE = "table_row_wise"
    """Row ranges on the sidecars of one node."""
    GRID = "grid"
    REPLICATED = "replicated"
    """Whole, on several sidecars."""


@dataclass(frozen=True, slots=True)
class PlacedShard:
    """A distinct shard of a table; `number` as frames name it, `sidecars` (plan indices, ascending) hold its replicas."""

    number: int
    rows: tuple[int, int]
    columns: tuple[int, int]
    sidecars: tuple[int, ...]

    @property
    def row_count(self) -> int:
        return self.rows[1] - self.rows[0]

    @property
    def column_count(self) -> int:
        return self.columns[1] - self.columns[0]

    def bytes(self, table: Table) -> int:
        """Bytes of its rows as they are stored."""
        return self.row_count * table.row_format.row_bytes(self.column_count)


def place_shards(shards: Iterable[Shard], sidecar_index: dict[str, int]) -> tuple[PlacedShard, ...]:
    """The distinct shards of one table, by columns, then rows."""
    holders: dict[tuple[tuple[int, int], tuple[int, int]], list[int]] = {}
    for shard in shards:
        holders.setdefault((shard.columns, shard.rows), []).append(sidecar_index[shard.sidecar])
    return tuple(
        PlacedShard(number, rows, columns, tuple(sorted(holders[columns, rows])))
        for number, (columns, rows) in enumerate(sorted(holders))
    )


def sharding_of(plan: Plan, table: int) -> Sharding:
    """The kind of a table of a valid plan."""
    shards = plan.placed_shards[table]
    if len(shards) == 1:
        return Sharding.TABLE_WISE if len(shards[0].sidecars) == 1 else Sharding.REPLICATED
    if plan.rows_cut(table):
        if len({s.columns for s in shards}) > 1:
            return Sharding.GRID
        nodes = {plan.sidecars[holder].node for s in shards for holder in s.sidecars}
        return Sharding.TABLE_ROW_WISE if len(nodes) == 1 and None not in nodes else Sharding.ROW_WISE
    return Sharding.COLUMN_WISE


def check_tiling(table: Table, shards: Sequence[Shard], where: str) -> None:
    """Refuse shards that do not tile their table, or that one sidecar holds twice; raises `PlanError`."""
    prefix = f"{where}: shards of table {table.name!r}:"
    seen: set[tuple[str, tuple[int, int], tuple[int, int]]] = set()
    for shard in shards:
        key = (shard.sidecar, shard.rows, shard.columns)
        if key in seen:
            raise PlanError(f"{prefix} found {key} twice; allowed: replicas on different sidecars")
        seen.add(key)
    bands: dict[tuple[int, int], set[tuple[int, int]]] = {}
    for shard in shards:
        bands.setdefault(shard.columns, set()).add(shard.rows)
    _check_cover(bands, table.dim, f"{prefix} columns")
    for columns, rows in sorted(bands.items()):
        _check_cover(rows, table.rows, f"{prefix} rows of columns {list(columns)}")
    if str(table.row_format) == "int4" and (odd := [c for c in bands if c[0] % 2]):
        raise PlanError(f"{prefix} columns: found {list(odd[0])}; allowed: an even first column (int4 stores two values a byte)")
    if (count := sum(map(len, bands.values()))) > MAX_SHARDS_PER_TABLE:
        raise PlanError(f"{prefix} found {count} different ones; allowed: at most {MAX_SHARDS_PER_TABLE}")


def _check_cover(ranges: Iterable[tuple[int, int]], size: int, what: str) -> None:
    at = 0
    for begin, end in sorted(ranges):
        if begin != at or end <= begin:
            raise PlanError(f"{what}: found [{begin}, {end}]; allowed: from {at} on, so that [0, {size}] is covered once")
        at = end
    if at != size:
        raise PlanError(f"{what}: found nothing from {at} on; allowed: ranges that cover [0, {size}]")
