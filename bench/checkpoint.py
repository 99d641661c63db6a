"""How much memory partitioning a checkpoint takes that is larger than it: `python -m sidepool.bench.checkpoint DIR --gb 10`.

Writes a checkpoint of random tables into DIR, maps it into a model as `torch.load(mmap=True)` does, partitions that model, and
prints the time and the most that was resident, mapped pages included. Both files are deleted.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

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
    """`count` tables `[rows, DIM]`, one id each, and a linear layer."""

    def __init__(self, count: int, rows: int) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(rows, DIM) for _ in range(count))
        self.top = nn.Linear(count * DIM, 1)

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.top(torch.cat([table(ids[:, i]) for i, table in enumerate(self.tables)], dim=1))
        return found


def write_checkpoint(directory: Path, total: int) -> Path:
    """A checkpoint of about `total` bytes in `directory`, a file per table; returns where it lies."""
    count = max(2, total // TABLE_BYTES)
    rows = total // count // (DIM * 4)
    checkpoint = directory / "checkpoint"
    checkpoint.mkdir(parents=True)
    generator = torch.Generator().manual_seed(1)
    for i in range(count):
        torch.save({f"tables.{i}.weight": torch.rand(rows, DIM, generator=generator)}, checkpoint / f"{i}.pt")
    torch.save({"top.weight": torch.rand(1, count * DIM), "top.bias": torch.zeros(1)}, checkpoint / "top.pt")
    return checkpoint


def partition_mapped(checkpoint: Path, out: Path) -> Peak:
    """Partition the model of `checkpoint` out of its mapped files. In a process of its own, since peaks are a process's."""
    from sidepool.partition import partition_model

    count = len(list(checkpoint.glob("*.pt"))) - 1
    parts = [torch.load(path, mmap=True, weights_only=True) for path in sorted(checkpoint.glob("*.pt"))]
    state = {name: value for part in parts for name, value in part.items()}
    with torch.device("meta"):
        model = Tables(count, state["tables.0.weight"].shape[0])
    model.load_state_dict(state, assign=True)
    before, begin = peak_bytes(), time.perf_counter()
    partition_model(model.eval(), torch.randint(0, 100, (4, count)), out, name="checkpoint", sidecars=2)
    return Peak(sum(v.nbytes for v in state.values()), time.perf_counter() - begin, before, peak_bytes())


def peak_bytes() -> int:
    """The most that was ever resident of this process, files and all."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) << 10


def main() -> int:
    """Write, partition in a child, print, delete."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("directory", type=Path, help="on a disk with room for twice the checkpoint")
    parser.add_argument("--gb", type=float, default=10.0, help="size of the checkpoint (default: 10)")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    work = args.directory / "sidepool-checkpoint"
    if args.child:
        found = partition_mapped(work / "checkpoint", work / "out")
        print(f"{found.checkpoint / 1e9:.2f} GB in {found.seconds:.1f} s; at most {found.during / 1e9:.2f} GB resident, "
              f"{found.before / 1e9:.2f} GB of it before")  # fmt: skip
        return 0
    try:
        write_checkpoint(work, int(args.gb * 1e9))
        command = [sys.executable, "-m", "sidepool.bench.checkpoint", str(args.directory), "--child"]
        return subprocess.run(command, check=False).returncode
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
