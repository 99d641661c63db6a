"""Criteo rows: read them, make them up where there are none, and turn them into model inputs.

The format (Criteo Kaggle and Terabyte): one row per line, tab-separated: label 0 or 1, 13 integers, 26 categories of up to
8 hexadecimal digits; any of the 39 may be empty.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sidepool.bench.models.dlrm import MLPERF_BAG_IDS, MLPERF_ROWS
from sidepool.wire.errors import ConfigError

DENSE, CATEGORIES = 13, 26
FIELDS = 1 + DENSE + CATEGORIES
MISSING = -1
# Lines that are parsed together: enough to drown NumPy's per-call cost, few enough to keep a million rows in megabytes.
CHUNK_LINES = 16_384
# A category's nibble values; 16 stands for the padding behind short ones, 17 for what is no digit.
_PADDING, _INVALID = 16, 17
_NIBBLES = np.full(256, _INVALID, np.int64)
_NIBBLES[0] = _PADDING
for _digit in b"0123456789abcdefABCDEF":
    _NIBBLES[_digit] = int(chr(_digit), 16)


@dataclass(frozen=True)
class CriteoRows:
    """Rows in memory: labels float32 `[n]`, integers int64 `[n, 13]` (missing: 0), categories int64 `[n, 26]` (missing: -1)."""

    labels: NDArray[np.float32]
    integers: NDArray[np.int64]
    categories: NDArray[np.int64]

    def __len__(self) -> int:
        return int(self.labels.shape[0])

    def dense(self) -> NDArray[np.float32]:
        """The dense features `[n, 13]`: log(1 + x), negative ones as zero."""
        logs: NDArray[np.float32] = np.log1p(np.maximum(self.integers, 0)).astype(np.float32)
        return logs

    def ids(self, table_rows: Sequence[int]) -> NDArray[np.int64]:
        """One id per feature, `[n, 26]`: a hash of the category modulo the table's rows; 0 stands for a missing one alone."""
        rows = np.asarray(table_rows, np.uint64)
        hashed = hash64(self.categories.astype(np.uint64)) % np.maximum(rows - np.uint64(1), np.uint64(1)) + np.uint64(1)
        found = np.where(self.categories == MISSING, np.uint64(0), np.minimum(hashed, rows - np.uint64(1)))
        return found.astype(np.int64)


def read_rows(path: Path, limit: int | None = None) -> CriteoRows:
    """Read the first `limit` rows (default: all). Raises `ConfigError` naming file, line, what was found and what is allowed."""
    parts = []
    try:
        with path.open("rb") as file:
            lines: Iterator[bytes] = itertools.islice(file, limit)
            first = 1
            while chunk := list(itertools.islice(lines, CHUNK_LINES)):
                parts.append(_parse(chunk, path, first))
                first += len(chunk)
    except OSError as e:
        raise ConfigError(f"{path}: cannot be read: {e}") from e
    if not parts:
        raise ConfigError(f"{path}: found no rows; allowed: at least one line of {FIELDS} tab-separated fields")
    return CriteoRows(
        np.concatenate([p.labels for p in parts]),
        np.concatenate([p.integers for p in parts]),
        np.concatenate([p.categories for p in parts]),
    )


def generate_rows(count: int, seed: int = 0) -> CriteoRows:
    """Rows made up: categories as skewed as a log-uniform draw, labels that depend on them; the same rows for the same seed."""
    random = np.random.default_rng(seed)
    integers = np.floor(np.exp(random.normal(1.5, 1.5, (count, DENSE)))).astype(np.int64)
    # As in the real data, a tenth of the integers and a twentieth of the categories are missing.
    integers[random.random((count, DENSE)) < 0.1] = 0
    sizes = np.log(np.asarray(MLPERF_ROWS, np.float64) + 1.0)
    ranks = np.floor(np.exp(random.random((count, CATEGORIES)) * sizes)).astype(np.uint64)
    names = hash64(ranks * np.uint64(CATEGORIES) + np.arange(CATEGORIES, dtype=np.uint64)) & np.uint64(0xFFFFFFFF)
    categories = names.astype(np.int64)
    categories[random.random((count, CATEGORIES)) < 0.05] = MISSING
    # Each category pushes the label by a fixed, hashed amount, so that there is something to learn.
    pushes = (hash64(categories.astype(np.uint64)) % np.uint64(1000)).astype(np.float64) / 500.0 - 1.0
    score = 0.5 * pushes.sum(axis=1) + 0.3 * np.log1p(integers).mean(axis=1) - 1.5
    labels = (random.random(count) < 1.0 / (1.0 + np.exp(-score))).astype(np.float32)
    return CriteoRows(labels, integers, categories)


def write_rows(rows: CriteoRows, path: Path) -> None:
    """Write rows in Criteo's format (a missing integer, which `CriteoRows` holds as 0, is written as 0)."""
    with path.open("w", encoding="ascii") as file:
        for label, integers, categories in zip(rows.labels, rows.integers.tolist(), rows.categories.tolist(), strict=True):
            fields = [str(int(label)), *map(str, integers), *("" if c == MISSING else f"{c:08x}" for c in categories)]
            file.write("\t".join(fields) + "\n")


def multi_hot_ids(
    ids: NDArray[np.int64], table_rows: Sequence[int], bag_ids: Sequence[int] = MLPERF_BAG_IDS
) -> tuple[NDArray[np.int64], ...]:
    """Bags from single ids `[n, 26]`: per feature `[n, ids per bag]`, the given id first, the rest hashed from it."""
    bags = []
    for feature, (rows, count) in enumerate(zip(table_rows, bag_ids, strict=True)):
        steps = np.arange(count, dtype=np.uint64) + np.uint64(feature * 1000)
        bag = (hash64(hash64(ids[:, feature : feature + 1].astype(np.uint64)) + steps) % np.uint64(rows)).astype(np.int64)
        bag[:, 0] = ids[:, feature]
        bags.append(bag)
    return tuple(bags)


def hash64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014): a stable, well mixed 64-bit hash."""
    with np.errstate(over="ignore"):
        z = values + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        hashed: NDArray[np.uint64] = z ^ (z >> np.uint64(31))
    return hashed


def _parse(lines: Sequence[bytes], path: Path, first: int) -> CriteoRows:
    for number, line in enumerate(lines, first):
        if line.count(b"\t") != FIELDS - 1:
            raise ConfigError(f"{path}:{number}: found {line.count(bytes([9])) + 1} fields; allowed: {FIELDS}, separated by tabs")
    flat = b"\t".join(line.rstrip(b"\r\n") for line in lines).split(b"\t")
    columns = [np.array(flat[i::FIELDS], dtype=np.bytes_) for i in range(FIELDS)]
    labels = _integer_column(columns[0], path, first, "label")
    wrong = (labels != 0) & (labels != 1) | (columns[0] == b"")
    if wrong.any():
        _refuse(path, first, wrong, columns[0], "label", "0 or 1")
    integers = [_integer_column(c, path, first, f"integer {i}") for i, c in enumerate(columns[1 : 1 + DENSE], 1)]
    categories = [_hex_column(c, path, first, f"category {i}") for i, c in enumerate(columns[1 + DENSE :], 1)]
    return CriteoRows(labels.astype(np.float32), np.stack(integers, axis=1), np.stack(categories, axis=1))


def _integer_column(column: NDArray[np.bytes_], path: Path, first: int, field: str) -> NDArray[np.int64]:
    filled = np.where(column == b"", b"0", column)
    try:
        return filled.astype(np.int64)
    except (ValueError, OverflowError):
        wrong = np.array([not _is_int64(value) for value in filled.tolist()])
        _refuse(path, first, wrong, column, field, "a 64-bit integer, or empty")
        raise


def _hex_column(column: NDArray[np.bytes_], path: Path, first: int, field: str) -> NDArray[np.int64]:
    width = column.dtype.itemsize
    nibbles = _NIBBLES[np.ascontiguousarray(column).view(np.uint8).reshape(len(column), width)]
    padding = nibbles == _PADDING
    wrong = (nibbles == _INVALID).any(axis=1) | (~padding[:, 8:]).any(axis=1) | (padding[:, :-1] & ~padding[:, 1:]).any(axis=1)
    if wrong.any():
        _refuse(path, first, wrong, column, field, "up to 8 hexadecimal digits, or empty")
    values = np.zeros(len(column), np.int64)
    for position in range(min(width, 8)):
        values = np.where(padding[:, position], values, values * 16 + nibbles[:, position])
    return np.where(padding[:, 0], MISSING, values)


def _refuse(path: Path, first: int, wrong: NDArray[np.bool_], column: NDArray[np.bytes_], field: str, allowed: str) -> None:
    row = int(np.flatnonzero(wrong)[0])
    raise ConfigError(f"{path}:{first + row}: {field}: found {bytes(column[row]).decode('latin-1')!r}; allowed: {allowed}")


def _is_int64(value: bytes) -> bool:
    try:
        return -(1 << 63) <= int(value) < 1 << 63
    except ValueError:
        return False
