"""Writing the shards of a new plan from those of an old one: rows are laid out anew as they are stored, block by block."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from torch import Tensor

from sidepool.partition.artifact import check_out_dir, make_sidecar_directory, replacing, shards_on
from sidepool.partition.shard_writer import write_shard
from sidepool.wire.errors import CutError, PlanError, ShardCorrupt
from sidepool.wire.model import PLAN_FILE
from sidepool.wire.plan import Plan, RowFormat, Table, save_plan
from sidepool.wire.shard_reader import locate, shard_directories, shard_number, shards_of, verify_checksum
from sidepool.wire.shards import ShardManifest, save_manifest
from sidepool.wire.stored_rows import put_columns

_DTYPES = {RowFormat.FP32: torch.float32, RowFormat.FP16: torch.float16, RowFormat.BF16: torch.bfloat16}


def reshard(
    old: Plan, old_directory: Path, new: Plan, out_dir: Path, numa: Mapping[str, int] | None = None, *, verify: bool = True
) -> None:
    """Write plan, shards and `sidecar.yaml`s of `new` into `out_dir`, which is complete at the end or absent.

    old_directory: holds the shard directories of `old`; of replicas any one is read. numa: NUMA node of a sidecar's network card.
    Raises `PlanError` where the plans' tables differ, `ShardCorrupt` and `CutError`.
    """
    check_out_dir(out_dir)
    if old.tables != new.tables:
        raise PlanError(f"tables: found others in the new plan; allowed: those of the old one, {[t.name for t in old.tables][:4]}…")
    readers = _readers(old, old_directory, verify)
    try:
        with replacing(out_dir) as staging:
            save_plan(new, staging / PLAN_FILE)
            for index, sidecar in enumerate(new.sidecars):
                shards = make_sidecar_directory(staging, sidecar)
                if numa and sidecar.name in numa:
                    _set_numa(shards.parent / "sidecar.yaml", numa[sidecar.name])
                held = shards_on(new, index)
                files = tuple(write_shard(shards, file, table, readers[table.name], part=part)[0] for file, table, part in held)
                save_manifest(ShardManifest(sidecar=sidecar.name, plan_fingerprint=new.fingerprint, shards=files), shards)
    except OSError as e:
        raise CutError(f"out: {out_dir} cannot be written: {e}") from e


def _set_numa(path: Path, node: int) -> None:
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    path.write_text(yaml.safe_dump({**config, "memory": {"numa": node}}, sort_keys=False), encoding="utf-8")


def _readers(plan: Plan, directory: Path, verify: bool) -> dict[str, Callable[[int, int], Tensor]]:
    """Per table: its rows `[begin, end)` as they are stored, at full width."""
    stored: dict[tuple[int, int], NDArray[np.uint8]] = {}
    for shards in shard_directories(plan, [directory]):
        for file in shards_of(plan, shards):
            key = shard_number(plan, file)
            if key in stored:
                continue
            path, offset = locate(shards, file)
            if verify:
                verify_checksum(path, offset, file)
            width = file.row_format.row_bytes(file.dim)
            stored[key] = np.memmap(path, np.uint8, "r", offset, (file.rows, width))
    readers: dict[str, Callable[[int, int], Tensor]] = {}
    for index, table in enumerate(plan.tables):
        parts = plan.placed_shards[index]
        missing = [s for s in parts if (index, s.number) not in stored]
        if missing:
            extent = f"rows {missing[0].rows}, columns {missing[0].columns}"
            raise ShardCorrupt(f"{directory}: table {table.name!r}: found no shard with {extent}")
        readers[table.name] = _reader(table, [(s.rows, s.columns, stored[index, s.number]) for s in parts])
    return readers


def _reader(
    table: Table, parts: Sequence[tuple[tuple[int, int], tuple[int, int], NDArray[np.uint8]]]
) -> Callable[[int, int], Tensor]:
    def read(begin: int, end: int) -> Tensor:
        out = np.empty((end - begin, table.row_bytes), np.uint8)
        for (first, last), columns, rows in parts:
            low, high = max(begin, first), min(end, last)
            if low >= high:
                continue
            put_columns(out[low - begin : high - begin], rows[low - first : high - first], table.row_format, columns[0])
        stored = torch.from_numpy(out)
        return stored if table.row_format.quantised else stored.view(_DTYPES[table.row_format])

    return read
