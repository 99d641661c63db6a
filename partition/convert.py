"""`sidepool convert CHECKPOINT --out DIR`: shards, a plan and sidecar configurations from tables that exist already."""

from __future__ import annotations

import argparse
import json
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from sidepool.partition.artifact import check_out_dir, make_sidecar_directory, replacing, tables_of
from sidepool.partition.checkpoints import SourceTable, open_checkpoint
from sidepool.partition.planning import make_plan
from sidepool.wire.checksum import crc32c
from sidepool.wire.config import decode
from sidepool.wire.errors import CutError, PlanError
from sidepool.wire.model import PLAN_FILE
from sidepool.wire.plan import Feature, Plan, Pooling, RowFormat, Table, save_plan
from sidepool.wire.shards import ShardFile, ShardManifest, save_manifest

# Bytes of rows that are read, checked and written at a time: large enough for a disk, small beside any cache of pages.
CHUNK_BYTES = 16 << 20
# safetensors' names of our formats, and NumPy's.
_DTYPES = {RowFormat.FP32: ("F32", "<f4"), RowFormat.FP16: ("F16", "<f2")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `sidepool convert`."""
    parser.add_argument(
        "checkpoint",
        type=Path,
        nargs="+",
        help="HPS directory (files key, emb_vector), directory of such, or state dict of TorchRec or FBGEMM (torch.save)",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to write; must be empty or not exist")
    parser.add_argument("--name", help="name of the model in the plan (default: the name of DIR)")
    parser.add_argument("--sidecars", type=int, default=1, metavar="N", help="number of sidecars (default: 1)")
    parser.add_argument("--address", action="append", metavar="HOST:PORT", help="control plane of a sidecar, once per sidecar")
    parser.add_argument(
        "--row-format", choices=tuple(map(str, _DTYPES)), default="fp32", help="how rows are stored (default: fp32)"
    )
    parser.add_argument(
        "--pooling",
        choices=tuple(map(str, Pooling)),
        default="sum",
        help="of every table's feature; edit the plan to differ (default: sum)",
    )
    parser.add_argument("--epoch", type=int, default=1, metavar="N", help="plan epoch (default: 1)")


def run(args: argparse.Namespace) -> int:
    """Convert with a progress bar; raises `CutError`, `PlanError` and `ShardCorrupt`."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns) as bar:
        task = bar.add_task("converting", total=None)

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        plan = convert(
            args.checkpoint,
            args.out,
            name=args.name or args.out.resolve().name,
            sidecars=args.sidecars,
            addresses=args.address,
            row_format=RowFormat(args.row_format),
            pooling=Pooling(args.pooling),
            epoch=args.epoch,
            progress=progress,
        )
    for table in plan.tables:
        print(f"{table.name}: [{table.rows}, {table.dim}] {table.row_format}")
    print(f"written to {args.out}")
    return 0


def convert(
    checkpoints: Sequence[Path],
    out_dir: Path,
    *,
    name: str,
    sidecars: int = 1,
    addresses: Sequence[str] | None = None,
    row_format: RowFormat = RowFormat.FP32,
    pooling: Pooling = Pooling.SUM,
    epoch: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Plan:
    """Write plan and sidecar directories for all tables of `checkpoints`; one feature per table, of the same name.

    Rows are streamed: memory holds one chunk of them (and, for HPS tables whose keys are not in order, 8 bytes per row).
    `progress(bytes written, bytes in all)` is called after every chunk. `out_dir` is complete at the end or absent.
    Raises `CutError` (what cannot be taken), `PlanError` (names, sidecars, addresses) and `ShardCorrupt` (truncated files).
    """
    check_out_dir(out_dir)
    sources = [source for path in checkpoints for source in open_checkpoint(path)]
    by_name = {source.name: source for source in sources}
    tables = [
        decode({"name": s.name, "rows": s.rows, "dim": s.dim, "row_format": str(row_format)}, Table, where=s.name, error=PlanError)
        for s in sources
    ]
    features = [Feature(name=s.name, table=s.name, pooling=pooling) for s in sources]
    loads = dict.fromkeys(by_name, 1.0)
    plan = make_plan(name, tables, features, loads, sidecars=sidecars, addresses=addresses, epoch=epoch)
    done, total = 0, sum(table.bytes for table in tables)

    def written(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    try:
        with replacing(out_dir) as staging:
            save_plan(plan, staging / PLAN_FILE)
            for index, sidecar in enumerate(plan.sidecars):
                shards = make_sidecar_directory(staging, sidecar)
                held = tables_of(plan, index)
                files = tuple(_write_shard(shards, file, table, by_name[table.name], written) for file, table in held)
                save_manifest(ShardManifest(sidecar=sidecar.name, plan_fingerprint=plan.fingerprint, shards=files), shards)
    except OSError as e:
        raise CutError(f"out: {out_dir} cannot be written: {e}") from e
    return plan


def _write_shard(directory: Path, file: str, table: Table, source: SourceTable, written: Callable[[int], None]) -> ShardFile:
    """One safetensors file, written as its rows are read (https://github.com/huggingface/safetensors#format)."""
    dtype, numpy_dtype = _DTYPES[table.row_format]
    entry = {"dtype": dtype, "shape": [table.rows, table.dim], "data_offsets": [0, table.bytes]}
    header = json.dumps({table.name: entry}).encode()
    header += b" " * (-len(header) % 8)  # so that the rows are aligned
    checksum = 0
    with (directory / file).open("wb") as out:
        out.write(struct.pack("<Q", len(header)) + header)
        for begin, rows in _chunks(table, source):
            with np.errstate(over="ignore"):  # what fp16 cannot hold becomes infinite, and is refused below
                stored = np.ascontiguousarray(rows, numpy_dtype)
            finite = np.isfinite(stored).all(axis=1)
            if not finite.all():
                row = begin + int(np.flatnonzero(~finite)[0])
                raise CutError(f"table {table.name}: row {row} holds NaN or infinity as {table.row_format}; allowed: finite values")
            checksum = crc32c(stored, checksum)
            out.write(stored.data)
            written(stored.nbytes)
    return ShardFile(table=table.name, file=file, rows=table.rows, dim=table.dim, row_format=table.row_format, crc32c=checksum)


def _chunks(table: Table, source: SourceTable) -> Iterator[tuple[int, NDArray[np.float32]]]:
    step = max(1, CHUNK_BYTES // (table.dim * 4))
    for begin in range(0, table.rows, step):
        yield begin, source.read(begin, min(begin + step, table.rows))
