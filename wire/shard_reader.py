"""Opening the shard files that a plan speaks of: find a table's rows in its safetensors file, check them, map them.

Files are untrusted: every size is checked against the file before anything is read or mapped, and every fault
names the file and the tensor. The format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from sidepool import _native
from sidepool.wire.checksum import crc32c
from sidepool.wire.errors import PlanError, ShardCorrupt, error_for
from sidepool.wire.plan import Plan
from sidepool.wire.shards import MANIFEST_FILE, ShardFile, ShardManifest, load_manifest
from sidepool.wire.torch_program import external_call

# A header of one tensor is about 100 bytes; the rest leaves room for whatever metadata a tool adds.
MAX_HEADER_BYTES = 1 << 20
# Checksums run over slices of this size, so that a shard larger than memory is never asked for as one range.
CHECKSUM_SLICE_BYTES = 64 << 20


def locate(directory: Path, shard: ShardFile) -> tuple[Path, int]:
    """Find the rows of `shard`: its file and the byte offset at which its tensor begins there.

    Raises `ShardCorrupt` naming file and tensor when the file is missing, truncated, or holds anything but that tensor.
    """
    path = directory / shard.file
    header, begin, file_bytes = _read_header(path, shard.table)
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    if list(tensors) != [shard.table]:
        _refuse(path, shard.table, f"found the tensors {sorted(tensors)[:4]}; allowed: exactly this one")
    entry = tensors[shard.table]
    expected = dict(zip(("dtype", "shape"), shard.tensor, strict=True))
    for key, allowed in expected.items():
        found = entry.get(key) if isinstance(entry, dict) else None
        if found != allowed:
            _refuse(path, shard.table, f"{key}: found {found!r}; allowed: {allowed!r} (from the manifest)")
    if entry.get("data_offsets") != [0, shard.bytes]:
        _refuse(path, shard.table, f"data_offsets: found {entry.get('data_offsets')!r}; allowed: [0, {shard.bytes}]")
    if file_bytes != begin + shard.bytes:
        _refuse(
            path,
            shard.table,
            f"found a file of {file_bytes} bytes; allowed: {begin + shard.bytes} (truncated, or something follows)",
        )
    return path, begin


def verify_checksum(path: Path, offset: int, shard: ShardFile, read: Callable[[int], None] = lambda count: None) -> None:
    """Compare the CRC-32C of the rows at `offset` of `path` with the manifest's; raises `ShardCorrupt`.

    `read(bytes)` is called after every slice; what it raises ends the comparison.
    """
    end = offset + shard.bytes
    found = 0
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as view:
            for at in range(offset, end, CHECKSUM_SLICE_BYTES):
                with view[at : min(at + CHECKSUM_SLICE_BYTES, end)] as part:
                    found = crc32c(part, found)
                    read(len(part))
                # What has been summed need not stay resident.
                begin = at - at % mmap.PAGESIZE
                mapped.madvise(mmap.MADV_DONTNEED, begin, min(at + CHECKSUM_SLICE_BYTES, end) - begin)
    except OSError as e:
        raise ShardCorrupt(f"{path}: tensor {shard.table!r}: cannot be read: {e}") from e
    if found != shard.crc32c:
        _refuse(path, shard.table, f"CRC-32C of the rows: found {found:#010x}; allowed: {shard.crc32c:#010x} (from the manifest)")


def shards_of(plan: Plan, directory: Path) -> Iterator[ShardFile]:
    """The shards of a directory, once its manifest was found to be exactly what `plan` places on that sidecar.

    Raises `ShardCorrupt` for an unreadable manifest and `PlanError` where manifest and plan disagree.
    """
    manifest = load_manifest(directory)
    if manifest.plan_fingerprint != plan.fingerprint:
        raise PlanError(
            f"{directory}: shards of plan {manifest.plan_fingerprint[:16]}…; allowed: {plan.fingerprint[:16]}… (the plan given)"
        )
    _check_placement(plan, manifest, directory)
    for shard in manifest.shards:
        table = plan.tables[plan.table_index[shard.table]]
        if shard.row_format != table.row_format:
            raise PlanError(
                f"{directory}: table {shard.table!r}: found {shard.row_format}; allowed: {table.row_format} (from the plan)"
            )
        yield shard


def shard_directories(plan: Plan, roots: Iterable[Path]) -> list[Path]:
    """Every directory with a manifest at or below `roots`; where some are of `plan`, those: sidecars keep other plans' beside them.

    Raises `ShardCorrupt` for a manifest that cannot be read.
    """
    found = sorted({manifest.parent for root in roots for manifest in root.rglob(MANIFEST_FILE)})
    return [d for d in found if load_manifest(d).plan_fingerprint == plan.fingerprint] or found


def build_table_set(plan: Plan, directories: Iterable[Path], *, verify: bool = True) -> _native.TableSet:
    """Map every shard of `directories` (one per sidecar) into a sealed table set under the plan's epoch.

    Rows are mapped read-only, not copied; `verify` reads them all once to compare checksums. Features whose table
    lies wholly elsewhere are left out. Raises `ShardCorrupt` and `PlanError`.
    """
    tables = new_table_set(plan)
    held: dict[tuple[int, int], Path] = {}
    for directory in directories:
        for shard in shards_of(plan, directory):
            path, offset = locate(directory, shard)
            table, number = shard_number(plan, shard)
            if verify:
                verify_checksum(path, offset, shard)
            if (table, number) not in held:  # else a replica, in the directory of another sidecar
                add_shard_file(tables, plan, shard, path, offset)
                held[table, number] = directory
    add_programs(tables, plan, {table: directory for (table, _), directory in held.items()})
    seal_features(tables, plan, {table for table, _ in held})
    return tables


def new_table_set(plan: Plan) -> _native.TableSet:
    """An empty table set with room for every shard of `plan`."""
    return _native.TableSet(plan.epoch, plan.first_shard[-1], len(plan.features))


def shard_number(plan: Plan, shard: ShardFile) -> tuple[int, int]:
    """Index of the table and number of the shard that a file of a checked manifest holds."""
    table = plan.table_index[shard.table]
    extent = _extent(shard)
    return table, next(s.number for s in plan.placed_shards[table] if (s.rows, s.columns) == extent)


def add_shard_file(tables: _native.TableSet, plan: Plan, shard: ShardFile, path: Path, offset: int) -> None:
    """Map the rows of `shard` at `offset` of `path` into `tables`; raises `ShardCorrupt` and `PlanError`."""
    index, number = shard_number(plan, shard)
    table = plan.tables[index]
    # Ids of cut rows come settled: one outside would be the ranker's mistake.
    policy, default = (str(table.out_of_range), table.default_row) if not plan.rows_cut(index) else ("error", 0)
    at = plan.first_shard[index] + number
    try:
        tables.add_table_file(at, str(path), offset, shard.rows, shard.dim, str(shard.row_format), policy, default)
    except _native.NativeError as e:
        status, message = e.args
        raise error_for(status, f"{path}: tensor {shard.table!r}: {message}") from e


def seal_features(tables: _native.TableSet, plan: Plan, held: set[int]) -> None:
    """Add the features of the tables (by index) that something is held of, and seal the set."""
    for i, feature in enumerate(plan.features):
        table = plan.table_index[feature.table]
        if table not in held:
            continue
        padding = None if plan.rows_cut(table) else feature.padding_index
        shards = len(plan.placed_shards[table])
        tables.add_feature(i, plan.first_shard[table], feature.pooling, feature.weighted, padding, shards)
    tables.seal()


def _extent(shard: ShardFile) -> tuple[tuple[int, int], tuple[int, int]]:
    return shard.row_range, shard.column_range


def add_programs(tables: _native.TableSet, plan: Plan, held: Mapping[int, Path]) -> None:
    """Make those tables of `plan` that are held computed ones where it says so. held: table (index) → directory of its shards.

    Raises `PlanError` for what the core cannot run, or torch, where a program takes it; `ShardCorrupt` for a file of torch's.
    """
    for index, directory in held.items():
        table = plan.tables[index]
        program = table.program
        if program is None:
            continue
        at = {x.table: plan.first_shard[plan.table_index[x.table]] for x in program.lookups}  # whole: the first is the only one
        lookups = [(at[x.table], str(x.pooling), x.padding_index, x.begin, x.ids) for x in program.lookups]
        inputs = [(x.kind == "bytes", x.begin, x.count) for x in program.inputs]
        steps = [(str(x.op), list(x.sizes), x.depth, [list(o) for o in x.operands]) for x in program.steps]
        external = None if program.torch is None else external_call(directory, program.torch, f"table {table.name!r}")
        try:
            tables.add_program(plan.first_shard[index], program.words, program.floats, lookups, inputs, steps, external)
        except (_native.NativeError, ValueError) as e:
            raise PlanError(f"table {table.name!r}: {e.args[-1]}") from e


def _check_placement(plan: Plan, manifest: ShardManifest, directory: Path) -> None:
    if manifest.sidecar not in plan.sidecar_index:
        raise PlanError(f"{directory}: sidecar: found {manifest.sidecar!r}; allowed: one of {sorted(plan.sidecar_index)}")
    found = sorted((shard.table, *_extent(shard)) for shard in manifest.shards)
    held = plan.held_by(plan.sidecar_index[manifest.sidecar])
    allowed = sorted((plan.tables[t].name, s.rows, s.columns) for t, s in held)
    if found != allowed:
        odd = sorted(set(found) ^ set(allowed)) or found
        where = "are in only one of manifest and plan, or twice"
        raise PlanError(f"{directory}: shards {odd[:4]} (table, rows, columns) {where}; allowed: {allowed[:8]}")


def _read_header(path: Path, tensor: str) -> tuple[dict[str, Any], int, int]:
    """`(header, byte at which data begins, bytes of the file)`."""
    try:
        with path.open("rb") as file:
            file_bytes = path.stat().st_size
            prefix = file.read(8)
            if len(prefix) < 8:
                _refuse(path, tensor, f"found a file of {file_bytes} bytes; a safetensors file has at least 8")
            (header_bytes,) = struct.unpack("<Q", prefix)
            if header_bytes > min(MAX_HEADER_BYTES, file_bytes - 8):
                _refuse(path, tensor, f"header of {header_bytes} bytes; allowed: {min(MAX_HEADER_BYTES, file_bytes - 8)}")
            text = file.read(header_bytes)
    except OSError as e:
        raise ShardCorrupt(f"{path}: tensor {tensor!r}: cannot be read: {e}") from e
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as e:
        raise ShardCorrupt(f"{path}: tensor {tensor!r}: the header is not valid JSON: {e}") from e
    if not isinstance(header, dict):
        _refuse(path, tensor, "the header is not a JSON object")
    return header, 8 + header_bytes, file_bytes


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a key appears twice")
    return entries


def _refuse(path: Path, tensor: str, what: str) -> NoReturn:
    raise ShardCorrupt(f"{path}: tensor {tensor!r}: {what}")
