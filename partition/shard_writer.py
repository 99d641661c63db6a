"""Write a table as a shard file, block by block: encoded, checked, summed, and compared with what it was made from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from sidepool.partition.rows import RowError, decode, encode
from sidepool.wire.checksum import crc32c
from sidepool.wire.errors import CutError
from sidepool.wire.plan import Table
from sidepool.wire.sharding import PlacedShard
from sidepool.wire.shards import ShardFile
from sidepool.wire.stored_rows import take_columns

# Bytes of fp32 rows that are read, encoded and written at a time: large enough for a disk, small beside any table.
CHUNK_BYTES = 16 << 20


def write_shard(
    directory: Path,
    file: str,
    table: Table,
    read: Callable[[int, int], Tensor],
    written: Callable[[int], None] = lambda count: None,
    part: PlacedShard | None = None,
) -> tuple[ShardFile, RowError]:
    """Write `file` for a table, or for the `part` of it; returns its manifest entry and how far its rows are from those read.

    read: gives rows `[begin, end)`, float, or uint8 where they are stored rows already. written: is told the bytes of every
    block. Raises `CutError` for rows that hold NaN or infinity once they are stored.
    """
    begin, end = part.rows if part else (0, table.rows)
    columns = part.columns if part else (0, table.dim)
    shard = ShardFile.of(table, (begin, end), columns, file)
    error, checksum = RowError(), 0
    step = max(1, CHUNK_BYTES // (table.dim * 4))
    with (directory / file).open("wb") as out:
        out.write(shard.header())
        for at in range(begin, end, step):
            rows = read(at, min(at + step, end))
            stored = rows if rows.dtype is torch.uint8 else encode(rows, table.row_format)
            _check_finite(table, at, stored)
            if stored.dtype is not rows.dtype:
                error = error.plus(rows, stored, table.row_format)
            content = take_columns(stored.contiguous().view(torch.uint8).numpy(), table.row_format, columns)
            checksum = crc32c(content, checksum)
            out.write(content.data)
            written(content.nbytes)
    return shard.model_copy(update={"crc32c": checksum}), error


def _check_finite(table: Table, begin: int, stored: Tensor) -> None:
    rows = decode(stored, table.row_format, table.dim)
    # The extremes of a block say whether all of it is finite in one pass, without a truth value per element.
    if not bool(torch.isfinite(torch.stack(rows.aminmax())).all()):
        finite = torch.isfinite(rows).all(dim=1)
        row = begin + int((~finite).nonzero()[0])
        raise CutError(f"table {table.name}: row {row} holds NaN or infinity as {table.row_format}; allowed: finite values")
