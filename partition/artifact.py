"""Write the artifact of a partitioned model: a Triton model repository, the plan, one directory per sidecar.

Everything is written into a sibling directory, synced, and renamed into place: OUT is complete or absent.
"""

from __future__ import annotations

import fcntl
import glob
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import yaml
from torch import Tensor

from sidepool.partition.check import Trial, check_artifact, write_check
from sidepool.partition.mapped import is_mapped_file, page_out
from sidepool.partition.report import PartitionReport
from sidepool.partition.rows import RowError
from sidepool.partition.shard_writer import write_shard
from sidepool.partition.triton_config import SHIM, TritonOptions, config_text
from sidepool.wire.durable import sync
from sidepool.wire.errors import CutError
from sidepool.wire.model import MODEL_FILE, PLAN_FILE, save_model
from sidepool.wire.plan import OnMissingShard, Plan, SidecarAddress, Table, save_plan
from sidepool.wire.sharding import PlacedShard
from sidepool.wire.shards import ShardManifest, save_manifest


def check_out_dir(out_dir: Path) -> None:
    """Refuse a place that holds something already; raises `CutError`."""
    try:
        taken = out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir()))
    except (OSError, ValueError) as e:  # a name that no file can have, a directory that may not be read
        raise CutError(f"out: {out_dir} cannot be written: {e}") from e
    if taken:
        raise CutError(
            f"out: found {out_dir}, which is not empty; allowed: a directory that is empty or does not exist\nremedy: remove it"
        )


def write_artifact(
    out_dir: Path,
    report: PartitionReport,
    weights: Mapping[str, Tensor],
    programs: Mapping[str, bytes],
    options: TritonOptions,
    trials: Sequence[Trial],
    torch_files: Mapping[str, bytes],
) -> PartitionReport:
    """Write everything, then run it from its files; returns the report with the errors of the rows as they were written.

    weights: the tables, by name. programs: file name → content. trials: what it must compute. torch_files: of
    programs that torch runs in sidecars, by file name. Raises `CutError`; leaves no half.
    """
    errors: dict[str, RowError] = {}
    try:
        with replacing(out_dir) as staging:
            save_plan(report.plan, staging / PLAN_FILE)
            _write_repository(staging / "model_repository" / report.model.name, report, programs, options, staging / PLAN_FILE)
            for index in range(len(report.plan.sidecars)):
                errors |= _write_sidecar(staging, report.plan, index, weights, torch_files)
            report = replace(report, row_errors=errors)
            report.write(staging)
            write_check(staging, trials)
            check_artifact(staging)
    except OSError as e:
        raise CutError(f"out: {out_dir} cannot be written: {e}") from e
    return report


@contextmanager
def replacing(out_dir: Path) -> Iterator[Path]:
    """A staging directory beside `out_dir` that takes its place at the end, or vanishes on any error.

    It is locked while it is written, so that what a killed process left can be told from what another one is writing.
    """
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    for left in out_dir.parent.glob(f".{glob.escape(out_dir.name)}.*.partial"):
        with _locked(left) as ours:
            if ours:
                shutil.rmtree(left, ignore_errors=True)
    staging = out_dir.parent / f".{out_dir.name}.{os.getpid()}.partial"
    staging.mkdir()
    try:
        with _locked(staging):
            yield staging
            for folder, _, files in os.walk(staging):
                for path in (*(Path(folder, file) for file in files), Path(folder)):
                    sync(path)
            check_out_dir(out_dir)
            os.rename(staging, out_dir)  # replaces an empty directory
            sync(out_dir.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def _locked(directory: Path) -> Iterator[bool]:
    """Whether this process got the directory's lock, which it then holds; processes that end lose theirs."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = True
        except BlockingIOError:
            locked = False
        yield locked
    finally:
        os.close(descriptor)


def _write_repository(
    directory: Path, report: PartitionReport, programs: Mapping[str, bytes], options: TritonOptions, plan: Path
) -> None:
    version = directory / "1"
    version.mkdir(parents=True)
    text = config_text(report.model, options, degraded=report.plan.on_missing_shard is OnMissingShard.DEGRADE)
    (directory / "config.pbtxt").write_text(text, encoding="utf-8")
    (version / "model.py").write_text(SHIM, encoding="utf-8")
    shutil.copyfile(plan, version / PLAN_FILE)
    save_model(report.model, version / MODEL_FILE)
    for file, content in programs.items():
        (version / file).write_bytes(content)


def make_sidecar_directory(directory: Path, sidecar: SidecarAddress) -> Path:
    """Make a sidecar's directory below the one of `plan.yaml`, with its `sidecar.yaml`; returns the one for its shards."""
    shards = directory / "sidecars" / sidecar.name / "shards"
    shards.mkdir(parents=True)
    config = {
        "version": 1,
        "name": sidecar.name,
        "plan": f"../../{PLAN_FILE}",
        "shards": "shards",
        # tcp on the host that rankers were told; a port is chosen at start and told to them by Connect.
        "listen": {
            "grpc": sidecar.address,
            "tcp": f"{sidecar.address.rpartition(':')[0]}:0",
            "unix": None,
            "metrics": "127.0.0.1:0",
        },
    }
    (shards.parent / "sidecar.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return shards


def shards_on(plan: Plan, sidecar: int) -> list[tuple[str, Table, PlacedShard]]:
    """The shards that a sidecar holds, each with the name of its file and its table."""
    held = plan.held_by(sidecar)
    whole = [len(plan.placed_shards[i]) == 1 for i, _ in held]
    names = [f"table-{i:04d}{'' if alone else f'-{s.number:04d}'}.safetensors" for (i, s), alone in zip(held, whole, strict=True)]
    return [(name, plan.tables[i], s) for name, (i, s) in zip(names, held, strict=True)]


def _write_sidecar(
    directory: Path, plan: Plan, index: int, weights: Mapping[str, Tensor], torch_files: Mapping[str, bytes]
) -> dict[str, RowError]:
    sidecar = plan.sidecars[index]
    shards = make_sidecar_directory(directory, sidecar)
    written = [
        write_shard(shards, file, table, _reader(weights[table.name]), part=part) for file, table, part in shards_on(plan, index)
    ]
    for _, table, _ in shards_on(plan, index):
        if table.program is not None and table.program.torch is not None:
            (shards / table.program.torch.file).write_bytes(torch_files[table.program.torch.file])
    files = tuple(shard for shard, _ in written)
    save_manifest(ShardManifest(sidecar=sidecar.name, plan_fingerprint=plan.fingerprint, shards=files), shards)
    return {shard.table: error for shard, error in written}


def _reader(weight: Tensor) -> Callable[[int, int], Tensor]:
    """Rows of a table where they lie; of a mapped file, only those that were asked for last stay resident."""
    rows = weight.detach()
    if not rows.is_contiguous() or not is_mapped_file(rows):
        return lambda begin, end: rows[begin:end]
    previous = rows[:0]

    def read(begin: int, end: int) -> Tensor:
        nonlocal previous
        page_out(previous)
        previous = rows[begin:end]
        return previous

    return read
