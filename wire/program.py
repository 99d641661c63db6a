"""Programs: small graphs of operators that a sidecar runs behind lookups of its own, so that results travel in place of rows.

A program makes its table a *computed* one. What callers give as the ids of a bag of that table is a *record*: a fixed number of
64-bit words, first the ids that the program looks up, then its other inputs, packed. What the bag gives is the program's result for
one sample, `[dim]`. The rows that the shards hold for the table are the program's weights, one after another.

docs/programs.md says what every operator does; native/core/program.hpp runs them and checks every bound before it does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from sidepool.wire.config import Frozen
from sidepool.wire.errors import PlanError

if TYPE_CHECKING:
    from sidepool.wire.plan import Plan

# As native/core/program.hpp: a record of 512 KiB, 16 MiB of scratch, far beyond any attention over a user's behaviours.
MAX_WORDS = 1 << 16
MAX_FLOATS = 1 << 22
MAX_STEPS = 4096
MAX_LEAVES = 1024
MAX_RANK = 8

# Spaces that operands lie in; the lookups' rows and the inputs follow, one space each.
SCRATCH, WEIGHTS, RESULT, FIRST_LEAF = 0, 1, 2, 3

UNARY = ("copy", "negate", "absolute", "exp", "log", "sqrt", "reciprocal", "sigmoid", "tanh", "relu", "logical_not")
BINARY = ("add", "subtract", "multiply", "divide", "maximum", "minimum", "less", "less_equal", "equal", "not_equal", "logical_and",
          "logical_or")  # fmt: skip
REDUCTIONS = ("sum", "largest", "smallest")

Operand = Annotated[tuple[Annotated[int, Field(ge=0, lt=1 << 62)], ...], Field(min_length=3, max_length=MAX_RANK + 2)]
"""Space, offset of the first element in it, then a stride per size, all in elements."""


class ProgramLookup(Frozen):
    """Rows that a program reads: words `[begin, begin + ids)` of the record are the ids."""

    table: Annotated[str, Field(min_length=1)]
    pooling: Literal["sum", "mean", "max", "none"] = "sum"
    padding_index: Annotated[int, Field(ge=0)] | None = None
    begin: Annotated[int, Field(ge=0, lt=MAX_WORDS)]
    ids: Annotated[int, Field(ge=1, le=MAX_WORDS)]


class ProgramInput(Frozen):
    """Numbers that travel with the ids, from word `begin` on: float32, two a word, or truth values, eight a word."""

    kind: Literal["float32", "bytes"]
    begin: Annotated[int, Field(ge=0, lt=MAX_WORDS)]
    count: Annotated[int, Field(ge=1, le=8 * MAX_WORDS)]

    @property
    def words(self) -> int:
        """How many words they take."""
        return -(-self.count // (2 if self.kind == "float32" else 8))


class Step(Frozen):
    """One operator over `sizes`. Reductions and softmax run over the last size.

    matmul: sizes are `[…, rows, columns]`, `depth` is what is summed over; its operands are two or, with something to add, three.
    """

    op: Literal["copy", "negate", "absolute", "exp", "log", "sqrt", "reciprocal", "sigmoid", "tanh", "relu", "logical_not",
                "add", "subtract", "multiply", "divide", "maximum", "minimum", "less", "less_equal", "equal", "not_equal",
                "logical_and", "logical_or", "where", "sum", "largest", "smallest", "softmax", "matmul"]  # fmt: skip
    sizes: Annotated[tuple[Annotated[int, Field(ge=1, le=MAX_FLOATS)], ...], Field(min_length=1, max_length=MAX_RANK)]
    depth: Annotated[int, Field(ge=0, le=MAX_FLOATS)] = 0
    operands: Annotated[tuple[Operand, ...], Field(min_length=2, max_length=4)]
    """The first is what is written."""


class TorchFile(Frozen):
    """A `torch.export` program, beside the shards, over lookups' rows and inputs `[samples, values]`; it gives `[samples, dim]`."""

    file: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.\-]+$")]
    crc32c: Annotated[int, Field(ge=0, lt=1 << 32)]
    operators: Annotated[tuple[str, ...], Field(min_length=1)]
    """Those for which it takes torch: no step does what they do."""


class Program(Frozen):
    """What one sample's record becomes. Steps run in order; each writes what nothing before it has written."""

    words: Annotated[int, Field(ge=1, le=MAX_WORDS)]
    floats: Annotated[int, Field(ge=0, le=MAX_FLOATS)]
    """Scratch of one sample."""
    lookups: Annotated[tuple[ProgramLookup, ...], Field(min_length=1, max_length=MAX_LEAVES)]
    inputs: Annotated[tuple[ProgramInput, ...], Field(max_length=MAX_LEAVES)] = ()
    steps: Annotated[tuple[Step, ...], Field(max_length=MAX_STEPS)] = ()
    torch: TorchFile | None = None
    """Runs in place of steps, and takes torch in the sidecar."""


def validate_programs(plan: Plan, where: str) -> None:
    """Check what a program needs of the plan around it: its tables whole on its own sidecar. Raises `PlanError`."""
    for i, table in enumerate(plan.tables):
        if table.program is None:
            continue
        here = f"{where}: tables.{i}.program"
        if table.row_format != "fp32":
            raise PlanError(f"{here}: found weights stored as {table.row_format}; allowed: fp32")
        if len(plan.placed_shards[i]) != 1:
            raise PlanError(f"{here}: found {len(plan.placed_shards[i])} shards of its table; allowed: whole")
        holders = set(plan.sidecars_of_table[i])
        for j, lookup in enumerate(table.program.lookups):
            at = plan.table_index.get(lookup.table)
            if at is None or plan.tables[at].program is not None:
                raise PlanError(
                    f"{here}.lookups.{j}.table: found {lookup.table!r}; allowed: a table of this plan with rows of its own"
                )
            if len(plan.placed_shards[at]) != 1 or not holders <= set(plan.sidecars_of_table[at]):
                found = [plan.sidecars[k].name for k in plan.sidecars_of_table[at]]
                cut = f"{len(plan.placed_shards[at])} shards" if len(plan.placed_shards[at]) > 1 else "whole"
                raise PlanError(
                    f"{here}.lookups.{j}.table: found {lookup.table!r} {cut} on {', '.join(found)}; allowed: every table that a "
                    f"program reads whole on its own sidecar ({', '.join(plan.sidecars[k].name for k in sorted(holders))})"
                )
            if lookup.begin + lookup.ids > table.program.words:
                raise PlanError(f"{here}.lookups.{j}: found ids beyond word {table.program.words}, the end of the record")
        if bool(table.program.steps) == (table.program.torch is not None):
            raise PlanError(f"{here}: found {'both' if table.program.steps else 'neither'} steps and torch; allowed: one of them")
        for j, given in enumerate(table.program.inputs):
            if given.begin + given.words > table.program.words:
                raise PlanError(f"{here}.inputs.{j}: found values beyond word {table.program.words}, the end of the record")
    for i, feature in enumerate(plan.features):
        plain = feature.pooling == "sum" and not feature.weighted and feature.padding_index is None
        if plan.tables[plan.table_index[feature.table]].program is not None and not plain:
            raise PlanError(f"{where}: features.{i}: found pooling, weights or padding of a computed table; allowed: sum, neither")
