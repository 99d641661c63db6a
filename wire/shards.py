"""The manifest of a shard directory: which files hold which tables, with their checksums."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Annotated

from pydantic import Field

from sidepool.wire.config import FormatVersion, Frozen, load_json
from sidepool.wire.errors import ShardCorrupt
from sidepool.wire.plan import MAX_DIM, MAX_ROWS, Name, RowFormat, Table

MANIFEST_FILE = "shards.json"
# Where a tensor begins in its file: rows of whole cache lines then lie on cache lines.
ALIGNMENT = 64

_FLOATS = {RowFormat.FP32: "F32", RowFormat.FP16: "F16", RowFormat.BF16: "BF16"}


class ShardFile(Frozen):
    """One safetensors file holding one tensor named after its table: `[rows, dim]`, or uint8 `[rows, row bytes]`.

    A shard of a cut table has `rows` rows from `first_row` on, and `dim` columns from `first_column` on.
    """

    table: Name
    file: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.\-]+$")]
    rows: Annotated[int, Field(ge=1, le=MAX_ROWS)]
    dim: Annotated[int, Field(ge=1, le=MAX_DIM)]
    row_format: RowFormat
    first_row: Annotated[int, Field(ge=0, le=MAX_ROWS)] = 0
    first_column: Annotated[int, Field(ge=0, le=MAX_DIM)] = 0
    crc32c: Annotated[int, Field(ge=0, lt=1 << 32)]
    """CRC-32C of the tensor's bytes (not of the safetensors header)."""

    @classmethod
    def of(cls, table: Table, rows: tuple[int, int], columns: tuple[int, int], file: str, crc32c: int = 0) -> ShardFile:
        """The entry of `file`, which holds `rows` `[begin, end)` and `columns` `[begin, end)` of `table`."""
        return cls(
            table=table.name,
            file=file,
            rows=rows[1] - rows[0],
            dim=columns[1] - columns[0],
            row_format=table.row_format,
            first_row=rows[0],
            first_column=columns[0],
            crc32c=crc32c,
        )

    def header(self) -> bytes:
        """The front of the file, up to its tensor (https://github.com/huggingface/safetensors#format)."""
        dtype, shape = self.tensor
        text = json.dumps({self.table: {"dtype": dtype, "shape": shape, "data_offsets": [0, self.bytes]}}).encode()
        text += b" " * (-(8 + len(text)) % ALIGNMENT)
        return struct.pack("<Q", len(text)) + text

    @property
    def bytes(self) -> int:
        """Bytes of the tensor."""
        return self.rows * self.row_format.row_bytes(self.dim)

    @property
    def row_range(self) -> tuple[int, int]:
        """Its rows `[begin, end)` of the table."""
        return self.first_row, self.first_row + self.rows

    @property
    def column_range(self) -> tuple[int, int]:
        """Its columns `[begin, end)` of the table."""
        return self.first_column, self.first_column + self.dim

    @property
    def tensor(self) -> tuple[str, list[int]]:
        """Type and shape of the tensor as a safetensors header names them."""
        if self.row_format.quantised:
            return "U8", [self.rows, self.row_format.row_bytes(self.dim)]
        return _FLOATS[self.row_format], [self.rows, self.dim]


class ShardManifest(Frozen):
    """Everything one sidecar holds."""

    version: FormatVersion = 1
    sidecar: Name
    plan_fingerprint: str
    shards: tuple[ShardFile, ...]


def load_manifest(directory: Path) -> ShardManifest:
    """Read the manifest of a shard directory; raises `ShardCorrupt`."""
    return load_json(directory / MANIFEST_FILE, ShardManifest, error=ShardCorrupt)


def save_manifest(manifest: ShardManifest, directory: Path) -> None:
    """Write the manifest into `directory`."""
    (directory / MANIFEST_FILE).write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")
