"""From a sidecar's shard directory to the table set its engines serve."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from sidepool import _native
from sidepool.wire.errors import PlanError
from sidepool.wire.plan import Plan
from sidepool.wire.shard_reader import build_table_set, locate, shards_of, verify_checksum
from sidepool.wire.shards import ShardFile, load_manifest

# Checksumming is memory- and disk-bound: beyond this many threads neither gets faster.
MAX_VERIFY_THREADS = 16


class LoadCancelled(Exception):
    """The load was given up because the process is asked to stop."""


def load_tables(
    plan: Plan,
    name: str,
    directory: Path,
    *,
    verify: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> _native.TableSet:
    """Check what `plan` places on the sidecar `name` against `directory`, and map it (read-only, not copied).

    `progress(bytes verified, bytes in all)` is called after every slice of a file, from one thread at a time; `cancelled` is
    asked as often, and true raises `LoadCancelled`. Raises `PlanError` (plan and manifest disagree) and `ShardCorrupt`.
    """
    if name not in plan.sidecar_index:
        raise PlanError(f"sidecar {name!r} is not in the plan; allowed: one of {sorted(plan.sidecar_index)}")
    found = load_manifest(directory).sidecar
    if found != name:
        raise PlanError(f"{directory}: shards of sidecar {found!r}; allowed: {name!r} (the name in the configuration)")
    if verify:
        _verify(plan, directory, progress, cancelled)
    tables = build_table_set(plan, [directory], verify=False)
    _one_torch_thread(plan)
    return tables


def _one_torch_thread(plan: Plan) -> None:
    """Where programs run torch: engines are as many as there are cores for them, and share large lookups among them."""
    if any(table.program is not None and table.program.torch is not None for table in plan.tables):
        with contextlib.suppress(ImportError):  # then none of them lies here
            import torch

            torch.set_num_threads(1)


def _verify(plan: Plan, directory: Path, progress: Callable[[int, int], None], cancelled: Callable[[], bool]) -> None:
    """Compare the checksums of all files, several at a time, the largest first so that none is waited for at the end."""

    shards = list(shards_of(plan, directory))
    shards.sort(key=lambda s: -s.bytes)
    done, total = 0, sum(s.bytes for s in shards)
    counting = threading.Lock()

    def count(read_bytes: int) -> None:
        nonlocal done
        if cancelled():
            raise LoadCancelled
        with counting:
            done += read_bytes
            progress(done, total)

    def check(shard: ShardFile) -> None:
        if cancelled():
            raise LoadCancelled
        path, offset = locate(directory, shard)
        verify_checksum(path, offset, shard, count)

    with ThreadPoolExecutor(min(os.cpu_count() or 1, MAX_VERIFY_THREADS), thread_name_prefix="verify") as pool:
        checks = [pool.submit(check, shard) for shard in shards]
        try:
            for finished in as_completed(checks):
                finished.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
