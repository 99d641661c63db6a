"""A table of a checkpoint, as a source of rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from torch import Tensor

from sidepool.partition.rows import decode
from sidepool.wire.errors import ShardCorrupt
from sidepool.wire.plan import RowFormat


@dataclass(frozen=True)
class SourceTable:
    """A table `[rows, dim]`; `read(begin, end)` gives its rows: uint8 as stored where `row_format` is quantised, else float32."""

    name: str
    rows: int
    dim: int
    read: Callable[[int, int], Tensor]
    row_format: RowFormat = RowFormat.FP32
    absent_rows: int = 0
    """Rows that the checkpoint does not have, and that are zero."""

    def reader(self, row_format: RowFormat) -> Callable[[int, int], Tensor]:
        """Rows for a table of `row_format`: as they are stored already where it is the checkpoint's, else float32."""
        if row_format is self.row_format or not self.row_format.quantised:
            return self.read
        return lambda begin, end: decode(self.read(begin, end), self.row_format, self.dim)


def refuse_tensor(path: Path, tensor: str, what: str) -> NoReturn:
    """Raise `ShardCorrupt` for a tensor of a file."""
    raise ShardCorrupt(f"{path}: tensor {tensor!r}: {what}")
