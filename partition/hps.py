"""Tables of HugeCTR HPS (https://github.com/NVIDIA-Merlin/HugeCTR, "sparse model files"): a directory per table with `key`
(int64) and `emb_vector` (float32, one row per key, in the order of the keys). Ids are row numbers here: the row of key k
becomes row k."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sidepool.partition.source_table import SourceTable, refuse_tensor
from sidepool.wire.errors import CutError, ShardCorrupt
from sidepool.wire.plan import MAX_DIM

KEY_FILE, ROWS_FILE = "key", "emb_vector"
# Keys that are looked at in one go: 8 MB, so that checking them needs little beside their inverse.
CHUNK_KEYS = 1 << 20
# Rows of the table per key, at most: up to here the rows of absent keys, zeros, cost less than a key map beside the table would.
MAX_ROWS_PER_KEY = 2


def is_hps(directory: Path) -> bool:
    """Whether `directory` looks like a table of HPS."""
    return (directory / KEY_FILE).is_file() or (directory / ROWS_FILE).is_file()


def open_hps(directory: Path) -> SourceTable:
    """The table of a directory, rows of absent keys being zero. Raises `CutError` (its keys cannot be rows) and `ShardCorrupt`."""
    keys = _map(directory / KEY_FILE, KEY_FILE, "<i8")
    values = _map(directory / ROWS_FILE, ROWS_FILE, "<f4")
    count = len(keys)
    if len(values) % count or not count <= len(values) <= count * MAX_DIM:
        refuse_tensor(
            directory / ROWS_FILE,
            ROWS_FILE,
            f"found {values.nbytes} bytes; allowed: rows of 1 to {MAX_DIM} float32 for {count} keys (truncated?)",
        )
    matrix = values.reshape(count, -1)
    places = _places(directory / KEY_FILE, keys)

    def read(begin: int, end: int) -> Tensor:
        if places is None:
            return torch.from_numpy(matrix[begin:end].copy())  # a mapped file is read-only, which torch warns of
        chosen = places[begin:end]
        rows = matrix[np.maximum(chosen, 0)]
        rows[chosen < 0] = 0
        return torch.from_numpy(rows)

    rows = count if places is None else len(places)
    return SourceTable(directory.name, rows, matrix.shape[1], read, absent_rows=rows - count)


def _map(path: Path, tensor: str, dtype: str) -> NDArray[Any]:
    try:
        size = path.stat().st_size
        if size == 0 or size % np.dtype(dtype).itemsize:
            refuse_tensor(
                path, tensor, f"found {size} bytes; allowed: a multiple of {np.dtype(dtype).itemsize}, not 0 (truncated?)"
            )
        return np.memmap(path, dtype, mode="r")
    except OSError as e:
        raise ShardCorrupt(f"{path}: tensor {tensor!r}: cannot be read: {e}") from e


def _places(path: Path, keys: NDArray[np.int64]) -> NDArray[np.int64] | None:
    """Where in the file each row lies, -1 for absent ones; None where the rows lie in order. Takes 8 bytes per row."""
    rows = _checked_rows(path, keys)
    places = np.full(rows, -1, np.int64)
    in_order = rows == len(keys)
    for begin, chunk in _chunks(keys):
        positions = np.arange(begin, begin + len(chunk))
        in_order = in_order and bool((chunk == positions).all())
        places[chunk] = positions
    # The last of equal keys has won: the others do not find themselves.
    for begin, chunk in _chunks(keys):
        lost = np.flatnonzero(places[chunk] != np.arange(begin, begin + len(chunk)))
        if len(lost):
            raise CutError(f"{path}: key {int(chunk[lost[0]])} appears twice; allowed: each key once")
    return None if in_order else places


def _checked_rows(path: Path, keys: NDArray[np.int64]) -> int:
    """Rows of a table whose row numbers are `keys`; raises `CutError` where they cannot be."""
    limit, highest = MAX_ROWS_PER_KEY * len(keys), 0
    for begin, chunk in _chunks(keys):
        odd = np.flatnonzero((chunk < 0) | (chunk >= limit))
        if len(odd):
            raise CutError(
                f"{path}: key {int(chunk[odd[0]])} at position {begin + int(odd[0])}; allowed for {len(keys)} keys: 0 to "
                f"{limit - 1}, each once: ids are row numbers here\n"
                "remedy: number the keys densely, in the model's inputs too (docs/convert.md)"
            )
        highest = max(highest, int(chunk.max()))
    return highest + 1


def _chunks(keys: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    for begin in range(0, len(keys), CHUNK_KEYS):
        yield begin, np.asarray(keys[begin : begin + CHUNK_KEYS])
