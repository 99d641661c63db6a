"""One model served twice by one Triton: partitioned, with its sidecars, and whole."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sidepool.bench.monolith import write_monolith
from sidepool.bench.processes import Sidecar, running_sidecars
from sidepool.bench.triton_server import TritonServer, free_ports
from sidepool.partition import PartitionReport, partition_model
from sidepool.partition.triton_config import TritonOptions
from sidepool.wire.plan import OnMissingShard

if TYPE_CHECKING:
    from torch import nn

DISAGGREGATED, MONOLITHIC = "dlrm", "dlrm_monolithic"


@dataclass(frozen=True)
class Deployment:
    """What runs inside a `deployed` block."""

    directory: Path
    server: TritonServer
    report: PartitionReport
    sidecars: list[Sidecar]


@contextlib.contextmanager
def deployed(
    model: nn.Module,
    example_inputs: Any,
    *,
    directory: Path,
    work_dir: Path,
    logs: Path | None = None,
    lane: str = "shm",
    sidecars: int = 2,
    on_missing_shard: OnMissingShard = OnMissingShard.FAIL,
    step: Callable[[str], None] = lambda text: None,
) -> Iterator[Deployment]:
    """Partition `model` into `directory` (replaced), start its sidecars and Triton; everything is stopped on the way out.

    The repository holds the models `DISAGGREGATED` and `MONOLITHIC` with the same configuration. `work_dir` keeps the
    Triton installation and, unless `logs` is given, the logs; `step` is told what begins.
    """
    shutil.rmtree(directory, ignore_errors=True)
    step("partitioning")
    report = partition_model(
        model,
        example_inputs,
        directory,
        name=DISAGGREGATED,
        sidecars=sidecars,
        addresses=[f"127.0.0.1:{port}" for port in free_ports(sidecars)],
        on_missing_shard=on_missing_shard,
        triton=TritonOptions(lane=lane, torch_threads=dense_threads()),
    )
    logs = logs or work_dir / "logs"
    repository = directory / "model_repository"
    write_monolith(model, config=repository / DISAGGREGATED / "config.pbtxt", repository=repository, name=MONOLITHIC)
    configs = sorted((directory / "sidecars").glob("*/sidecar.yaml"))
    with contextlib.ExitStack() as stack:
        step(f"starting {sidecars} sidecars")
        started = stack.enter_context(running_sidecars(configs, work_dir=logs))
        step("starting Triton")
        server = stack.enter_context(TritonServer(repository, work_dir=work_dir, log=logs / "triton.log"))
        yield Deployment(directory, server, report, started)


def dense_threads() -> int:
    """Threads of a forward pass, for both models: half the cores, since the other half serves Triton, clients and sidecars."""
    return max(1, len(os.sched_getaffinity(0)) // 2)
