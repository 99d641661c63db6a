"""A shard file is believed only when every byte of it is what the manifest says."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import load_file

from sidepool import _native
from sidepool.partition.rows import decode, encode
from sidepool.partition.shard_writer import write_shard
from sidepool.wire.checksum import crc32c
from sidepool.wire.errors import PlanError, ShardCorrupt
from sidepool.wire.plan import Feature, OutOfRange, Plan, RowFormat, Shard, SidecarAddress, Table
from sidepool.wire.shard_reader import MAX_HEADER_BYTES, build_table_set, locate, verify_checksum
from sidepool.wire.shards import ShardFile, ShardManifest, save_manifest

ROWS = np.arange(20, dtype=np.float32).reshape(5, 4)


def reference_crc32c(data: bytes) -> int:
    """Bit by bit, from the polynomial 0x1EDC6F41 (RFC 3720, appendix B.4)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def shard(rows: np.ndarray = ROWS, table: str = "users") -> ShardFile:
    return ShardFile(
        table=table,
        file=f"{table}.safetensors",
        rows=rows.shape[0],
        dim=rows.shape[1],
        row_format=RowFormat.FP32 if rows.dtype == np.float32 else RowFormat.FP16,
        crc32c=reference_crc32c(rows.tobytes()),
    )


def plan() -> Plan:
    return Plan(
        epoch=7,
        model="m",
        tables=(Table(name="users", rows=5, dim=4, out_of_range=OutOfRange.ZERO),),
        features=(Feature(name="user", table="users"),),
        sidecars=(SidecarAddress(name="sc0", address="127.0.0.1:1"),),
        shards=(Shard(table="users", sidecar="sc0", rows=(0, 5), columns=(0, 4)),),
    )


def write_raw(path: Path, header: bytes, data: bytes = ROWS.tobytes()) -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


def write_header(path: Path, **changes: object) -> None:
    entry = {"dtype": "F32", "shape": [5, 4], "data_offsets": [0, 80], **changes}
    text = json.dumps({"users": entry}).encode()
    write_raw(path, text + b" " * (-len(text) % 8))


@pytest.mark.parametrize("row_format", list(RowFormat))
def test_a_table_of_any_row_format_is_written_found_and_pooled(tmp_path: Path, row_format: RowFormat) -> None:
    rows = torch.randn(70, 5, generator=torch.Generator().manual_seed(3))
    table = Table(name="users", rows=70, dim=5, row_format=row_format)
    placed = plan().model_copy(
        update={"tables": (table,), "shards": (Shard(table="users", sidecar="sc0", rows=(0, 70), columns=(0, 5)),)}
    )
    entry, _ = write_shard(tmp_path, "users.safetensors", table, lambda begin, end: rows[begin:end])
    stored = encode(rows, row_format)
    assert torch.equal(load_file(tmp_path / "users.safetensors")["users"], stored)
    assert entry.crc32c == reference_crc32c(stored.view(torch.uint8).numpy().tobytes())
    save_manifest(ShardManifest(sidecar="sc0", plan_fingerprint=placed.fingerprint, shards=(entry,)), tmp_path)
    tables = build_table_set(placed, [tmp_path])
    assert tables.bytes == table.bytes == stored.nbytes
    out = np.empty((70, 5), np.float32)
    assert _native.pool(tables, 0, np.arange(70), np.ones(70, np.int32), None, out)[0] == 0
    np.testing.assert_allclose(out, decode(stored, row_format, 5), rtol=1e-6, atol=1e-6)


def test_the_checksum_is_crc32c_and_continues_from_a_seed() -> None:
    data = ROWS.tobytes()
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(data) == reference_crc32c(data)
    assert crc32c(data[13:], crc32c(data[:13])) == reference_crc32c(data)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_table_written_by_safetensors_is_found_at_its_offset(tmp_path: Path, dtype: type) -> None:
    rows = ROWS.astype(dtype)
    save_file({"users": rows}, tmp_path / "users.safetensors", metadata={"written-by": "a test"})
    path, offset = locate(tmp_path, shard(rows))
    assert path.read_bytes()[offset:] == rows.tobytes()
    verify_checksum(path, offset, shard(rows))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ShardCorrupt, match=r"users\.safetensors: tensor 'users': cannot be read"):
        locate(tmp_path, shard())


@pytest.mark.parametrize("kept", [0, 7, 8, 40, 1000])
def test_a_truncated_file_is_refused(tmp_path: Path, kept: int) -> None:
    file = tmp_path / "users.safetensors"
    save_file({"users": ROWS}, file)
    whole = file.read_bytes()
    file.write_bytes(whole[: min(kept, len(whole) - 1)])
    with pytest.raises(ShardCorrupt, match=r"users\.safetensors: tensor 'users'"):
        locate(tmp_path, shard())


def test_bytes_after_the_rows_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "users.safetensors"
    save_file({"users": ROWS}, file)
    file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(ShardCorrupt, match="something follows"):
        locate(tmp_path, shard())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "F16"}, "dtype: found 'F16'; allowed: 'F32'"),
        ({"shape": [4, 5]}, r"shape: found \[4, 5\]; allowed: \[5, 4\]"),
        ({"shape": "5"}, "shape: found '5'"),
        ({"data_offsets": [8, 88]}, r"data_offsets: found \[8, 88\]; allowed: \[0, 80\]"),
        ({"data_offsets": None}, "data_offsets: found None"),
    ],
)
def test_a_header_that_differs_from_the_manifest_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    write_header(tmp_path / "users.safetensors", **change)
    with pytest.raises(ShardCorrupt, match=message):
        locate(tmp_path, shard())


def test_another_tensor_than_the_manifests_is_refused(tmp_path: Path) -> None:
    save_file({"items": ROWS}, tmp_path / "users.safetensors")
    with pytest.raises(ShardCorrupt, match=r"found the tensors \['items'\]; allowed: exactly this one"):
        locate(tmp_path, shard())


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[]", "not a JSON object"),
        (b"[" * 200_000, "not valid JSON"),
        (b'{"users": 1, "users": 2}', "a key appears twice"),
        (b'{"users": 1}', "dtype: found None"),
    ],
)
def test_a_header_that_is_no_table_of_tensors_is_refused(tmp_path: Path, header: bytes, message: str) -> None:
    write_raw(tmp_path / "users.safetensors", header)
    with pytest.raises(ShardCorrupt, match=message):
        locate(tmp_path, shard())


@pytest.mark.parametrize("claimed", [MAX_HEADER_BYTES + 1, 1 << 40, (1 << 64) - 1])
def test_a_header_longer_than_its_file_or_the_limit_is_never_read(tmp_path: Path, claimed: int) -> None:
    (tmp_path / "users.safetensors").write_bytes(struct.pack("<Q", claimed) + b"{}")
    with pytest.raises(ShardCorrupt, match=f"header of {claimed} bytes; allowed: 2"):
        locate(tmp_path, shard())


def test_a_flipped_bit_in_the_rows_is_found_by_the_checksum(tmp_path: Path) -> None:
    file = tmp_path / "users.safetensors"
    save_file({"users": ROWS}, file)
    path, offset = locate(tmp_path, shard())
    content = bytearray(file.read_bytes())
    content[offset + 33] ^= 4
    file.write_bytes(content)
    with pytest.raises(ShardCorrupt, match="CRC-32C of the rows"):
        verify_checksum(path, offset, shard())


def write_directory(directory: Path, **changes: object) -> None:
    save_file({"users": ROWS}, directory / "users.safetensors")
    fields = {"sidecar": "sc0", "plan_fingerprint": plan().fingerprint, "shards": (shard(),), **changes}
    save_manifest(ShardManifest.model_validate({"version": 1, **fields}), directory)


def test_a_table_set_pools_the_rows_of_its_files(tmp_path: Path) -> None:
    write_directory(tmp_path)
    tables = build_table_set(plan(), [tmp_path])
    out = np.full((2, 4), np.nan, np.float32)
    verdict = _native.pool(tables, 0, np.array([1, 3, 4]), np.array([2, 1], np.int32), None, out)
    assert verdict[0] == 0
    np.testing.assert_array_equal(out, [ROWS[1] + ROWS[3], ROWS[4]])
    assert (tables.epoch, tables.bytes) == (7, 80)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"plan_fingerprint": "0" * 64}, "shards of plan 0000000000000000…"),
        ({"sidecar": "sc9"}, "sidecar: found 'sc9'; allowed: one of"),
        ({"shards": ()}, r"shards \[\('users', .*are in only one of manifest and plan"),
        ({"shards": (shard(), shard())}, "or twice"),
        ({"shards": (shard(ROWS[:4]),)}, r"shards \[\('users', \(0, 4\), \(0, 4\)\).*allowed: \[\('users', \(0, 5\), \(0, 4\)\)\]"),
    ],
)
def test_a_manifest_that_is_not_the_plans_is_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    write_directory(tmp_path, **changes)
    with pytest.raises(PlanError, match=message):
        build_table_set(plan(), [tmp_path])
