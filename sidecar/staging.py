"""Shards on their way here: files that grow, and what of them has arrived and been checked.

Beside every shard file lies a journal with a line per block that was written: where it belongs and its CRC-32C. Whoever goes
on after a break reads the blocks again and keeps those that are what the journal says.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sidepool.sidecar.stored import CHUNK_BYTES, Part
from sidepool.wire.checksum import crc32c
from sidepool.wire.errors import PlanError
from sidepool.wire.shards import ShardFile
from sidepool.wire.stored_rows import put_columns, take_columns

JOURNAL_SUFFIX = ".journal"
# Bytes that one call writes. The kernel lets nobody else have the core until they are in its pages, each of which takes 15 us
# where a virtual machine's host has yet to provide it.
WRITE_BYTES = 32 << 10


class StagedShard:
    """One shard file that is being put together. Used by one thread; closed by its owner."""

    def __init__(self, directory: Path, shard: ShardFile) -> None:
        """Open or make the file, its room reserved; raises `PlanError` where there is none."""
        self.shard = shard
        self.path = directory / shard.file
        self._header = shard.header()
        self._width = shard.row_format.row_bytes(shard.dim)
        self._journal_path = directory / (shard.file + JOURNAL_SUFFIX)
        if not self._journal_path.exists():
            # It may be a second name of a shard that is served (an earlier try found it to be the same): never written to.
            self.path.unlink(missing_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        size = len(self._header) + shard.bytes
        try:
            os.posix_fallocate(self._file, 0, size)
            os.ftruncate(self._file, size)
        except OSError as e:
            os.close(self._file)
            if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise PlanError(f"{self.path}: no room for {size} bytes: {e.strerror}") from e
            raise
        self._write(self._header, 0)
        self._present = self._read_journal()
        self._journal = self._journal_path.open("a", encoding="utf-8")

    def missing(self, part: Part) -> list[Part]:
        """What of a part has not arrived, as parts of it from top to bottom."""
        at, found = part.rows[0], []
        for begin, end in sorted(self._present.get(part.columns, ())):
            if end <= at or begin >= part.rows[1]:
                continue
            if begin > at:
                found.append((at, begin))
            at = max(at, end)
        if at < part.rows[1]:
            found.append((at, part.rows[1]))
        return [Part(part.table, rows, part.columns) for rows in found]

    def write(self, first_row: int, columns: tuple[int, int], rows: NDArray[np.uint8], checksum: int) -> None:
        """Put checked rows in their place; they count as arrived."""
        whole = columns == self.shard.column_range
        if not whole:
            others = self._read(first_row, len(rows))
            put_columns(others, rows, self.shard.row_format, columns[0] - self.shard.first_column)
        self._write(np.ascontiguousarray(rows if whole else others).data, self._offset(first_row))
        self._journal.write(json.dumps([first_row, first_row + len(rows), *columns, checksum]) + "\n")
        self._journal.flush()
        _add(self._present, columns, (first_row, first_row + len(rows)))

    def forget(self) -> None:
        """Nothing has arrived: what did cannot be trusted."""
        self._present.clear()
        self._journal.truncate(0)

    def finish(self, turn: Callable[[int], None]) -> ShardFile:
        """Sum up, have the disk keep it; returns the manifest's entry. turn: is told every step's bytes, to wait or to raise."""
        checksum, step = 0, max(1, CHUNK_BYTES // self._width)
        for row in range(self.shard.first_row, self.shard.row_range[1], step):
            rows = self._read(row, min(step, self.shard.row_range[1] - row))
            turn(rows.nbytes)
            checksum = crc32c(rows, checksum)
        os.fsync(self._file)
        return self.shard.model_copy(update={"crc32c": checksum})

    def close(self) -> None:
        """Close the files."""
        os.close(self._file)
        self._journal.close()

    def _offset(self, row: int) -> int:
        return len(self._header) + (row - self.shard.first_row) * self._width

    def _write(self, data: bytes | memoryview, offset: int) -> None:
        whole = memoryview(data).cast("B")
        for at in range(0, whole.nbytes, WRITE_BYTES):
            part = whole[at : at + WRITE_BYTES]
            if os.pwrite(self._file, part, offset + at) != part.nbytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _read(self, row: int, count: int) -> NDArray[np.uint8]:
        data = bytearray(count * self._width)
        os.preadv(self._file, [data], self._offset(row))
        return np.frombuffer(data, np.uint8).reshape(count, self._width)

    def _read_journal(self) -> dict[tuple[int, int], list[tuple[int, int]]]:
        """Rows that are there as the journal says, by columns."""
        present: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for begin, end, first, last, checksum in self._journal_lines():
            columns = (first - self.shard.first_column, last - self.shard.first_column)
            rows = take_columns(self._read(begin, end - begin), self.shard.row_format, columns)
            if crc32c(rows) == checksum:
                _add(present, (first, last), (begin, end))
        return present

    def _journal_lines(self) -> Iterator[tuple[int, int, int, int, int]]:
        if not self._journal_path.exists():
            return
        rows, columns = self.shard.row_range, self.shard.column_range
        for line in self._journal_path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                begin, end, first, last, checksum = map(int, json.loads(line))
            except (TypeError, ValueError):  # the line that was being written when the process was killed
                continue
            if rows[0] <= begin < end <= rows[1] and columns[0] <= first < last <= columns[1]:
                yield begin, end, first, last, checksum


def _add(present: dict[tuple[int, int], list[tuple[int, int]]], columns: tuple[int, int], rows: tuple[int, int]) -> None:
    """Rows that follow those before become one range with them: a large shard comes in a million blocks."""
    ranges = present.setdefault(columns, [])
    if ranges and ranges[-1][1] == rows[0]:
        rows = (ranges.pop()[0], rows[1])
    ranges.append(rows)
