"""`sidepool bench checkpoint`: how long partitioning a checkpoint takes, and how much memory, also for one larger than it.

Writes a checkpoint of random tables into DIR, maps it into a model as `torch.load(mmap=True)` does, partitions that model, and
prints the time and the most that was resident, mapped pages included. Everything written is deleted.
"""

from __future__ import annotations

import argparse
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor, nn

from sidepool.bench.machine import describe

SEED = 1
DIM = 128
# Tables of half a gigabyte: several of them even in a small checkpoint, and none in memory for long while they are written.
TABLE_BYTES = 512 << 20


@dataclass(frozen=True)
class Peak:
    """One run: bytes of the checkpoint, seconds to partition, and the most bytes resident before and during it."""

    checkpoint: int
    seconds: float
    before: int
    during: int


class Tables(nn.Module):
    """`count` tables `[rows, dim]`, one id each, and a linear layer."""

    def __init__(self, count: int, rows: int, dim: int) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(rows, dim) for _ in range(count))
        self.top = nn.Linear(count * dim, 1)

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.top(torch.cat([table(ids[:, i]) for i, table in enumerate(self.tables)], dim=1))
        return found


def write_checkpoint(directory: Path, total: int, count: int | None = None, dim: int = DIM) -> Path:
    """A checkpoint of about `total` bytes in `directory`, a file per table; returns where it lies."""
    count = count or max(2, total // TABLE_BYTES)
    rows = total // count // (dim * 4)
    checkpoint = directory / "checkpoint"
    checkpoint.mkdir(parents=True)
    generator = torch.Generator().manual_seed(SEED)
    for i in range(count):
        torch.save({f"tables.{i}.weight": torch.rand(rows, dim, generator=generator)}, checkpoint / f"{i}.pt")
    torch.save({"top.weight": torch.rand(1, count * dim), "top.bias": torch.zeros(1)}, checkpoint / "top.pt")
    return checkpoint


def partition_checkpoint(checkpoint: Path, out: Path, *, mapped: bool = True) -> Peak:
    """Partition the model of `checkpoint` out of its mapped files. In a process of its own, since peaks are a process's."""
    from sidepool.partition import partition_model

    count = len(list(checkpoint.glob("*.pt"))) - 1
    parts = [torch.load(path, mmap=mapped, weights_only=True) for path in sorted(checkpoint.glob("*.pt"))]
    state = {name: value for part in parts for name, value in part.items()}
    with torch.device("meta"):
        model = Tables(count, *state["tables.0.weight"].shape)
    model.load_state_dict(state, assign=True)
    before, begin = peak_bytes(), time.perf_counter()
    partition_model(model.eval(), torch.randint(0, 100, (4, count)), out, name="checkpoint", sidecars=2)
    return Peak(sum(v.nbytes for v in state.values()), time.perf_counter() - begin, before, peak_bytes())


def peak_bytes() -> int:
    """The most that was ever resident of this process, files and all."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) << 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `sidepool bench checkpoint`."""
    parser.add_argument("directory", type=Path, help="on a disk with room for twice the checkpoint")
    parser.add_argument("--gb", type=float, default=10.0, help="size of the checkpoint (default: 10)")
    parser.add_argument("--tables", type=int, help="tables of equal size (default: of half a gigabyte each)")
    parser.add_argument("--dim", type=int, default=DIM, help=f"floats a row (default: {DIM})")
    parser.add_argument("--in-memory", action="store_true", help="read the checkpoint instead of mapping it")


def run(args: argparse.Namespace) -> int:
    """Write, partition in a child, print, delete."""
    print("  ".join(f"{key}: {value}" for key, value in describe(SEED).items()))
    work = args.directory / "sidepool-checkpoint"
    try:
        checkpoint = write_checkpoint(work, int(args.gb * 1e9), args.tables, args.dim)
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
            found = fresh.submit(partition_checkpoint, checkpoint, work / "out", mapped=not args.in_memory).result()
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(
        f"{found.checkpoint / 1e9:.2f} GB in {found.seconds:.1f} s; at most {found.during / 1e9:.2f} GB resident "
        f"({found.during / found.checkpoint:.2f} times the checkpoint), {found.before / 1e9:.2f} GB of it before"
    )
    return 0
