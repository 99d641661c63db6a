"""Rows as they are stored: uint8 `[rows, row bytes]`, values first, then (int8, int4) the row's scale and bias."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sidepool.wire.plan import RowFormat


def take_columns(rows: NDArray[np.uint8], row_format: RowFormat, columns: tuple[int, int]) -> NDArray[np.uint8]:
    """Columns `[begin, end)` of stored rows, as stored rows of their own: contiguous, and `rows` itself where it is all of them.

    Quantised values keep their codes, and every row its scale and bias. int4: `begin` is even.
    """
    begin, end = (row_format.value_bytes(column) for column in columns)
    values = rows.shape[1] - row_format.tail_bytes
    if (begin, end) == (0, values):
        return np.ascontiguousarray(rows)
    return np.ascontiguousarray(np.concatenate([rows[:, begin:end], rows[:, values:]], axis=1))


def put_columns(out: NDArray[np.uint8], rows: NDArray[np.uint8], row_format: RowFormat, first_column: int) -> None:
    """The reverse: write stored `rows` of some columns into stored rows of more, from `first_column` on."""
    tail = row_format.tail_bytes
    at, values = row_format.value_bytes(first_column), rows.shape[1] - tail
    out[:, at : at + values] = rows[:, :values]
    if tail:
        out[:, -tail:] = rows[:, -tail:]
