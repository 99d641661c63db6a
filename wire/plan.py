"""The plan: the versioned map table → shards → sidecars that both ends of a lookup agree on.

A plan is immutable. Positions in `tables`, `features` and `sidecars` are the indices that frames carry,
so two ends may talk to each other only under the same epoch.
"""

from __future__ import annotations

import enum
import hashlib
import json
import re
import zlib
from collections import Counter
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from sidepool.wire.config import MAX_YAML_BYTES, FormatVersion, Frozen, decode, dump_yaml, load_yaml
from sidepool.wire.errors import PlanError
from sidepool.wire.program import Program, validate_programs
from sidepool.wire.sharding import PlacedShard, check_tiling, place_shards

# One row must fit a cache-friendly scratch line; the widest published embedding (4096) is far below.
MAX_DIM = 4096
# Frames carry feature indices and batch sizes as 32-bit numbers; these bounds keep every product within 64 bits.
MAX_FEATURES = 65_536
MAX_ROWS = 1 << 48

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.\-/]{0,255}$")]


def _known_address(address: str) -> str:
    found = re.fullmatch(r"(?:[^\s:]+|\[[0-9a-fA-F:]+\]):([0-9]{1,5})", address)
    if found is None or not 1 <= int(found[1]) <= 65535:
        raise PydanticCustomError("address", "host:port, ports 1 to 65535")
    return address


Address = Annotated[str, Field(max_length=300), AfterValidator(_known_address)]
"""`host:port`, or `[IPv6 address]:port`."""


class Pooling(enum.StrEnum):
    """How the rows of a bag become its output (torch's embedding_bag modes; `none` returns the rows themselves)."""

    SUM = "sum"
    MEAN = "mean"
    MAX = "max"
    NONE = "none"


class RowFormat(enum.StrEnum):
    """How a row is stored, see docs/row-formats.md."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"
    INT4 = "int4"

    @property
    def quantised(self) -> bool:
        """Whether a row is codes with a scale and a bias of its own."""
        return self in (RowFormat.INT8, RowFormat.INT4)

    @property
    def tail_bytes(self) -> int:
        """Bytes of scale and bias behind the values of a row."""
        return {RowFormat.INT8: 8, RowFormat.INT4: 4}.get(self, 0)

    def value_bytes(self, columns: int) -> int:
        """Bytes of the first `columns` values of a row."""
        return self.row_bytes(columns) - self.tail_bytes

    def row_bytes(self, dim: int) -> int:
        """Bytes of one row: its values, and what follows them (int8: two fp32; int4: two fp16)."""
        match self:
            case RowFormat.FP32:
                return dim * 4
            case RowFormat.FP16 | RowFormat.BF16:
                return dim * 2
            case RowFormat.INT8:
                return dim + 8
            case RowFormat.INT4:
                return (dim + 1) // 2 + 4


class OutOfRange(enum.StrEnum):
    """What an id outside its table means. Every such id is counted, whatever the policy."""

    ERROR = "error"
    ZERO = "zero"
    DEFAULT_ROW = "default_row"
    HASH = "hash"


class OnMissingShard(enum.StrEnum):
    """What a lookup does when a sidecar it needs does not answer."""

    FAIL = "fail"
    DEGRADE = "degrade"


class Table(Frozen):
    """A logical embedding table `[rows, dim]`."""

    name: Name
    rows: Annotated[int, Field(ge=1, le=MAX_ROWS)]
    dim: Annotated[int, Field(ge=1, le=MAX_DIM)]
    row_format: RowFormat = RowFormat.FP32
    out_of_range: OutOfRange = OutOfRange.ERROR
    default_row: Annotated[int, Field(ge=0)] = 0
    """The row that stands for an unknown id under `out_of_range: default_row`."""
    program: Program | None = None
    """Makes it a computed table: its rows are this program's weights, its bags records, see wire/program.py."""

    @property
    def row_bytes(self) -> int:
        return self.row_format.row_bytes(self.dim)

    @property
    def bytes(self) -> int:
        return self.rows * self.row_bytes


class Feature(Frozen):
    """A model input that looks a table up. Several features may share a table."""

    name: Name
    table: Name
    pooling: Pooling = Pooling.SUM
    weighted: bool = False
    """Whether callers must give one float32 weight per id (`sum` and `mean` only)."""
    padding_index: Annotated[int, Field(ge=0)] | None = None
    """The id that bags pass over, as torch's `embedding_bag(padding_idx=)`; pooling `none` returns its row all the same.
    The number of rows of the table is allowed too: an id that is nothing but padding."""


class Shard(Frozen):
    """A row range `[begin, end)` and column range of one table, on one sidecar. The same on another sidecar is a replica."""

    table: Name
    sidecar: Name
    rows: tuple[int, int]
    columns: tuple[int, int]


class SidecarAddress(Frozen):
    """Where the control plane (gRPC) of a sidecar listens."""

    name: Name
    address: Address
    node: Name | None = None
    """The machine it runs on, as an inventory names it."""


class Plan(Frozen):
    """The whole map. `validate_plan` must have accepted it before it is used (`load_plan` does that)."""

    version: FormatVersion = 1
    epoch: Annotated[int, Field(ge=1, le=(1 << 63) - 1)]
    model: Name
    on_missing_shard: OnMissingShard = OnMissingShard.FAIL
    tables: Annotated[tuple[Table, ...], Field(min_length=1, max_length=MAX_FEATURES)]
    features: Annotated[tuple[Feature, ...], Field(min_length=1, max_length=MAX_FEATURES)]
    sidecars: Annotated[tuple[SidecarAddress, ...], Field(min_length=1, max_length=4096)]
    shards: Annotated[tuple[Shard, ...], Field(min_length=1)]

    @cached_property
    def table_index(self) -> dict[str, int]:
        return {t.name: i for i, t in enumerate(self.tables)}

    @cached_property
    def sidecar_index(self) -> dict[str, int]:
        return {s.name: i for i, s in enumerate(self.sidecars)}

    @cached_property
    def feature_tables(self) -> tuple[Table, ...]:
        """The table of each feature, in feature order."""
        return tuple(self.tables[self.table_index[f.table]] for f in self.features)

    @cached_property
    def placed_shards(self) -> tuple[tuple[PlacedShard, ...], ...]:
        """The distinct shards of each table, in table order; a shard's number is its position."""
        of_table: dict[str, list[Shard]] = {t.name: [] for t in self.tables}
        for shard in self.shards:
            of_table[shard.table].append(shard)
        return tuple(place_shards(of_table[t.name], self.sidecar_index) for t in self.tables)

    @cached_property
    def first_shard(self) -> tuple[int, ...]:
        """Where each table's shards begin in a `TableSet` of this plan; one more at the end, their number."""
        return tuple(accumulate((len(shards) for shards in self.placed_shards), initial=0))

    def rows_cut(self, table: int) -> bool:
        """Whether the rows of a table (by index) lie in more than one shard, so that the ranker sorts its ids."""
        shards = self.placed_shards[table]
        return any(s.row_count < self.tables[table].rows for s in shards)

    @cached_property
    def sidecars_of_table(self) -> tuple[tuple[int, ...], ...]:
        """Indices of the sidecars that hold something of each table, ascending, in table order."""
        return tuple(tuple(sorted({holder for s in shards for holder in s.sidecars})) for shards in self.placed_shards)

    def held_by(self, sidecar: int) -> list[tuple[int, PlacedShard]]:
        """The shards that a sidecar holds, each with the index of its table, in plan order."""
        return [(t, s) for t, shards in enumerate(self.placed_shards) for s in shards if sidecar in s.sidecars]

    @cached_property
    def out_columns(self) -> tuple[tuple[int, int], ...]:
        """Column range `[begin, end)` of every feature in the pooled output `[batch, Σ dim]`; empty for `none`."""
        ranges, at = [], 0
        for feature, table in zip(self.features, self.feature_tables, strict=True):
            width = 0 if feature.pooling is Pooling.NONE else table.dim
            ranges.append((at, at + width))
            at += width
        return tuple(ranges)

    @property
    def out_dim(self) -> int:
        """Σ dim over the pooled features: the width of the pooled output."""
        return self.out_columns[-1][1]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over everything but addresses: two ends with the same epoch must also agree on this."""
        # What is not set is left out: a plan that does without a later property keeps its fingerprint.
        content = self.model_dump_json(exclude={"sidecars": {"__all__": {"address"}}}, exclude_none=True)
        return hashlib.sha256(content.encode()).hexdigest()


def pack_plan(plan: Plan) -> bytes:
    """A plan as control calls carry it: JSON, about a tenth of it after zlib."""
    return zlib.compress(plan.model_dump_json(exclude_none=True).encode())


def unpack_plan(packed: bytes, where: str) -> Plan:
    """The reverse, validated; raises `PlanError`."""
    try:
        opened = zlib.decompressobj()
        data = json.loads(opened.decompress(packed, MAX_YAML_BYTES))
    except (zlib.error, ValueError) as e:
        raise PlanError(f"{where}: found {len(packed)} bytes that are no plan; allowed: JSON in zlib: {e}") from e
    plan = decode(data, Plan, where=where, error=PlanError)
    validate_plan(plan, where=where)
    return plan


def load_plan(path: Path) -> Plan:
    """Read and validate a plan; raises `PlanError`."""
    plan = load_yaml(path, Plan, error=PlanError)
    validate_plan(plan, where=str(path))
    return plan


def save_plan(plan: Plan, path: Path) -> None:
    """Write `plan` as YAML."""
    path.write_text(dump_yaml(plan), encoding="utf-8")


def validate_plan(plan: Plan, *, where: str = "plan") -> None:
    """Check what types alone cannot: names exist once, references resolve, the shards of every table tile it."""
    for kind, names in (
        ("tables", [t.name for t in plan.tables]),
        ("features", [f.name for f in plan.features]),
        ("sidecars", [s.name for s in plan.sidecars]),
    ):
        twice = [name for name, n in Counter(names).items() if n > 1]
        if twice:
            raise PlanError(f"{where}: {kind}: {twice[0]!r} appears more than once; names must be unique")
    for i, table in enumerate(plan.tables):
        if table.default_row >= table.rows:
            raise PlanError(f"{where}: tables.{i}.default_row: found {table.default_row}; allowed: 0 to {table.rows - 1}")
    for i, feature in enumerate(plan.features):
        if feature.table not in plan.table_index:
            raise PlanError(f"{where}: features.{i}.table: found {feature.table!r}; allowed: the name of a table of this plan")
        if feature.weighted and feature.pooling not in (Pooling.SUM, Pooling.MEAN):
            raise PlanError(f"{where}: features.{i}.weighted: found true with pooling {feature.pooling}; allowed: sum, mean")
        rows = plan.tables[plan.table_index[feature.table]].rows
        if feature.padding_index is not None and feature.padding_index > rows:
            raise PlanError(
                f"{where}: features.{i}.padding_index: found {feature.padding_index}; "
                f"allowed: 0 to {rows}, a row of its table or its number of rows"
            )
    shards: dict[str, list[Shard]] = {}
    for i, shard in enumerate(plan.shards):
        if shard.table not in plan.table_index:
            raise PlanError(f"{where}: shards.{i}.table: found {shard.table!r}; allowed: the name of a table of this plan")
        if shard.sidecar not in plan.sidecar_index:
            raise PlanError(f"{where}: shards.{i}.sidecar: found {shard.sidecar!r}; allowed: the name of a sidecar of this plan")
        shards.setdefault(shard.table, []).append(shard)
    for table in plan.tables:
        check_tiling(table, shards.get(table.name, ()), where)
    validate_programs(plan, where)


def check_successor(old: Plan, new: Plan) -> None:
    """Refuse a plan that places other tables than `old`, or that has its epoch: `PlanError`."""
    prefix = f"plan epoch {new.epoch}"
    if new.model != old.model:
        raise PlanError(f"{prefix}: model: found {new.model!r}; allowed: {old.model!r}")
    for kind in ("tables", "features"):
        if getattr(new, kind) != getattr(old, kind):
            raise PlanError(f"{prefix}: {kind}: found others; allowed: those of epoch {old.epoch}")
    if new.epoch == old.epoch:
        raise PlanError(f"{prefix}: epoch: found {new.epoch}, which already stands for another plan; allowed: any other number")
