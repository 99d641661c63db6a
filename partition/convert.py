"""`sidepool convert CHECKPOINT --out DIR`: shards, a plan and sidecar configurations from tables that exist already."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from sidepool.partition.artifact import check_out_dir, make_sidecar_directory, replacing, shards_on
from sidepool.partition.checkpoints import open_checkpoint
from sidepool.partition.planning import make_plan
from sidepool.partition.rows import RowError
from sidepool.partition.shard_writer import write_shard
from sidepool.wire.config import decode
from sidepool.wire.errors import CutError, PlanError
from sidepool.wire.model import PLAN_FILE
from sidepool.wire.plan import Feature, Plan, Pooling, RowFormat, Table, save_plan
from sidepool.wire.shards import ShardManifest, save_manifest


@dataclass(frozen=True)
class Converted:
    """What `convert` wrote."""

    plan: Plan
    row_errors: Mapping[str, RowError]
    """How far each table's rows are from the checkpoint's."""
    absent_rows: Mapping[str, int]
    """Rows of each table that the checkpoint does not have, and that are zero."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `sidepool convert`."""
    parser.add_argument(
        "checkpoint",
        type=Path,
        nargs="+",
        help="HPS directory (files key, emb_vector), directory of such, or state dict of TorchRec, FBGEMM or torch.ao (torch.save)",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to write; must be empty or not exist")
    parser.add_argument("--name", help="name of the model in the plan (default: the name of DIR)")
    parser.add_argument("--sidecars", type=int, default=1, metavar="N", help="number of sidecars (default: 1)")
    parser.add_argument("--address", action="append", metavar="HOST:PORT", help="control plane of a sidecar, once per sidecar")
    parser.add_argument(
        "--row-format",
        choices=tuple(map(str, RowFormat)),
        help="how rows are stored (default: as the checkpoint's where these are int8 or int4, else fp32)",
    )
    parser.add_argument(
        "--packed-rows",
        choices=("int8", "int4"),
        help="take every uint8 matrix as rows of embedding_bag_byte_prepack (int8) or embedding_bag_4bit_prepack (int4)",
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

        converted = convert(
            args.checkpoint,
            args.out,
            name=args.name or args.out.resolve().name,
            sidecars=args.sidecars,
            addresses=args.address,
            row_format=args.row_format and RowFormat(args.row_format),
            packed_rows=args.packed_rows and RowFormat(args.packed_rows),
            pooling=Pooling(args.pooling),
            epoch=args.epoch,
            progress=progress,
        )
    for table in converted.plan.tables:
        error = converted.row_errors[table.name]
        absent = converted.absent_rows[table.name]
        print(
            f"{table.name}: [{table.rows}, {table.dim}] {table.row_format}, largest error {error.max_abs:.2e}, rms {error.rms:.2e}"
            + (f", {absent} rows without a key are zero" if absent else "")
        )
    print(f"written to {args.out}")
    return 0


def convert(
    checkpoints: Sequence[Path],
    out_dir: Path,
    *,
    name: str,
    sidecars: int = 1,
    addresses: Sequence[str] | None = None,
    row_format: RowFormat | None = None,
    packed_rows: RowFormat | None = None,
    pooling: Pooling = Pooling.SUM,
    epoch: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Converted:
    """Write plan and sidecar directories for all tables of `checkpoints`; one feature per table, of the same name.

    row_format: default: the checkpoint's for quantised tables, whose rows are then only laid out anew, else fp32.
    packed_rows: see `open_checkpoint`.
    Rows are streamed: memory holds one chunk of them (and, for HPS tables whose keys are not in order, 8 bytes per row).
    `progress(bytes written, bytes in all)` is called after every chunk. `out_dir` is complete at the end or absent.
    Raises `CutError` (what cannot be taken), `PlanError` (names, sidecars, addresses) and `ShardCorrupt` (truncated files).
    """
    check_out_dir(out_dir)
    sources = [source for path in checkpoints for source in open_checkpoint(path, packed_rows)]
    by_name = {source.name: source for source in sources}
    tables = [
        decode(
            {"name": s.name, "rows": s.rows, "dim": s.dim, "row_format": str(row_format or s.row_format)},
            Table,
            where=s.name,
            error=PlanError,
        )
        for s in sources
    ]
    features = [Feature(name=s.name, table=s.name, pooling=pooling) for s in sources]
    loads = dict.fromkeys(by_name, 1.0)
    plan = make_plan(name, tables, features, loads, sidecars=sidecars, addresses=addresses, epoch=epoch)
    errors: dict[str, RowError] = {}
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
                files = []
                for file, table, part in shards_on(plan, index):
                    read = by_name[table.name].reader(table.row_format)
                    shard, errors[table.name] = write_shard(shards, file, table, read, written, part)
                    files.append(shard)
                save_manifest(ShardManifest(sidecar=sidecar.name, plan_fingerprint=plan.fingerprint, shards=tuple(files)), shards)
    except OSError as e:
        raise CutError(f"out: {out_dir} cannot be written: {e}") from e
    return Converted(plan, errors, {source.name: source.absent_rows for source in sources})
