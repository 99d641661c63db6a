"""Reading rows of the shards that a sidecar serves, as they are stored."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sidepool.sidecar.serving import Published
from sidepool.wire.errors import PlanError, ShardCorrupt
from sidepool.wire.plan import RowFormat
from sidepool.wire.program import TorchFile
from sidepool.wire.shard_reader import locate
from sidepool.wire.shards import ShardFile
from sidepool.wire.stored_rows import take_columns

# Bytes of rows that are read, sent, checked and written at a time: half a millisecond's work at either end, so that a lookup which
# finds its core taken does not wait longer, and large enough that a message's own cost (0.1 ms) is the smaller part.
CHUNK_BYTES = 256 << 10


@dataclass(frozen=True)
class Part:
    """Rows `[begin, end)` and columns `[begin, end)` of a table."""

    table: str
    rows: tuple[int, int]
    columns: tuple[int, int]

    @property
    def row_count(self) -> int:
        return self.rows[1] - self.rows[0]

    def row_bytes(self, row_format: RowFormat) -> int:
        return row_format.row_bytes(self.columns[1] - self.columns[0])

    def __str__(self) -> str:
        return f"table {self.table!r} rows {list(self.rows)} columns {list(self.columns)}"


def covers(outer: tuple[int, int], inner: tuple[int, int]) -> bool:
    """Whether a range contains another one that is not empty."""
    return outer[0] <= inner[0] < inner[1] <= outer[1]


def find_shard(published: Published, part: Part) -> ShardFile:
    """The served shard in which a part lies; raises `PlanError` where there is none."""
    for shard in published.files.get(part.table, ()):
        if covers(shard.row_range, part.rows) and covers(shard.column_range, part.columns):
            return shard
    raise PlanError(f"{part}: found in no shard that is held under plan epoch {published.plan.epoch}; allowed: a part of one shard")


def read_part(published: Published, shard: ShardFile, part: Part) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """The rows of a part of `shard` block by block: `(first row, uint8 [rows, row bytes of its columns])`.

    Raises `ShardCorrupt` where the file is not what it was.
    """
    path, offset = locate(published.shards, shard)
    width, columns = shard.row_format.row_bytes(shard.dim), tuple(column - shard.first_column for column in part.columns)
    step = max(1, CHUNK_BYTES // width)
    try:
        with path.open("rb", buffering=0) as file:
            for row in range(part.rows[0], part.rows[1], step):
                count = min(step, part.rows[1] - row)
                data = os.pread(file.fileno(), count * width, offset + (row - shard.first_row) * width)
                if len(data) != count * width:
                    raise ShardCorrupt(f"{path}: tensor {shard.table!r}: ends before row {row + count}")
                rows = np.frombuffer(data, np.uint8).reshape(count, width)
                yield row, take_columns(rows, shard.row_format, (columns[0], columns[1]))
    except OSError as e:
        raise ShardCorrupt(f"{path}: tensor {shard.table!r}: cannot be read: {e}") from e


def read_program_file(published: Published, table: str) -> tuple[TorchFile, Iterator[tuple[int, NDArray[np.uint8]]]]:
    """The file by which torch runs a table's program, block by block: `(first byte, uint8 [bytes])`.

    Raises `PlanError` where nothing of that kind is held, `ShardCorrupt` where the file cannot be read.
    """
    found = published.plan.tables[published.plan.table_index[table]].program if table in published.files else None
    if found is None or found.torch is None:
        raise PlanError(f"table {table!r}: found no file of a program; allowed: a table held here whose program takes torch")
    path = published.shards / found.torch.file
    try:
        content = np.fromfile(path, np.uint8)
    except OSError as e:
        raise ShardCorrupt(f"{path}: cannot be read: {e}") from e
    return found.torch, ((at, content[at : at + CHUNK_BYTES]) for at in range(0, content.size, CHUNK_BYTES))
