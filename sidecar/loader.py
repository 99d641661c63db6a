"""Loads a configuration's plan and shards beside the main loop, which stays free to obey signals."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sidepool import _native
from sidepool.sidecar import logs
from sidepool.sidecar.config import SidecarConfig
from sidepool.sidecar.epochs import Source, sources
from sidepool.sidecar.numa import place, usable_nodes
from sidepool.sidecar.serving import Published
from sidepool.sidecar.shards import LoadCancelled, load_tables
from sidepool.wire.errors import ConfigError, PlanError, ShardCorrupt, SidepoolError
from sidepool.wire.plan import Plan
from sidepool.wire.shard_reader import shard_number

# A progress line for every tenth of the bytes: ten lines whatever the number of tables.
PROGRESS_STEPS = 10


@dataclass(frozen=True)
class Loaded:
    """A load has ended well; `published`: what is not served yet, the newest last."""

    config: SidecarConfig
    published: tuple[Published, ...]


@dataclass(frozen=True)
class LoadFailed:
    """A load has ended with `error`."""

    error: Exception


class Loader:
    """At most one load at a time, on its own thread; the plan goes to `planned` as soon as it is read, the outcome to `report`."""

    def __init__(self, planned: Callable[[Plan], None], report: Callable[[Loaded | LoadFailed], None]) -> None:
        self._planned = planned
        self._report = report
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, config: SidecarConfig, serving: Sequence[Published]) -> None:
        """Begin to load what `config` names, beside `serving`. The previous load must have reported."""
        self._thread = threading.Thread(target=self._load, args=(config, serving), name="load")
        self._thread.start()

    def close(self) -> None:
        """Give up the load in progress, if any, and wait for its thread (at most the checksums of one slice per thread)."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()

    def _load(self, config: SidecarConfig, serving: Sequence[Published]) -> None:
        try:
            published = load(config, serving, self._planned, self._stopping.is_set)
        except LoadCancelled:
            return
        except Exception as e:  # a thread has no caller: the main loop decides what any failure means
            self._report(LoadFailed(e))
        else:
            self._report(Loaded(config, published))


def load(
    config: SidecarConfig,
    serving: Sequence[Published] = (),
    planned: Callable[[Plan], None] = lambda plan: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> tuple[Published, ...]:
    """Load what `config` names, or what was brought here since, as far as it is not `serving` already; the newest last.

    Raises `PlanError`, `ShardCorrupt` and `ConfigError` (`memory`), and `LoadCancelled` soon after `cancelled()` is true.
    """
    found = [source for source in sources(config) if _is_new(source, serving)]
    if found:
        planned(found[-1].plan)
    loaded: list[Published] = []
    for source in found:
        try:
            loaded.append(load_source(config, source.plan, source.shards, verify=config.verify, cancelled=cancelled))
        except SidepoolError as e:
            # Nobody asks for a plan that was brought and is not in place yet; it will be brought again.
            if source.record is None or source.record.state != "prepared" or not loaded:
                raise
            logs.error("what was brought here cannot be loaded", plan_epoch=source.plan.epoch, code=e.code, reason=str(e))
    return tuple(loaded)


def load_source(
    config: SidecarConfig,
    plan: Plan,
    shards: Path,
    *,
    verify: bool,
    cancelled: Callable[[], bool] = lambda: False,
    beside: Published | None = None,
) -> Published:
    """Load one plan's shards; raises as `load`.

    beside: what is served meanwhile; what was measured for it is not measured again, at the cost of its lookups, and memory of
    the same shards is shared.
    """
    began, logged = time.monotonic(), 0

    def progress(done: int, total: int) -> None:
        nonlocal logged
        step = PROGRESS_STEPS * done // total
        if step > logged:
            logged = step
            seconds = time.monotonic() - began
            speed = round(done / max(seconds, 1e-6))
            eta_s = round(seconds * (total - done) / done, 1)
            logs.info("verifying shards", done_bytes=done, total_bytes=total, bytes_per_s=speed, eta_s=eta_s)

    tables = load_tables(plan, config.name, shards, verify=verify, progress=progress, cancelled=cancelled)
    published = Published(plan, tables, shards)
    if beside is not None:
        share_rows(published, beside)
    place_copies(tables, config)
    _choose_lookahead(tables, plan, config, beside)
    seconds = round(time.monotonic() - began, 3)
    logs.info("shards loaded", plan_epoch=plan.epoch, bytes=tables.bytes, verified=verify, seconds=seconds)
    return published


def share_rows(published: Published, beside: Published) -> None:
    """Shards whose files are one file (a move gives those that stay a second name) lie in memory once, as far as `beside` has
    promoted them."""
    try:
        known = _by_file(beside)
    except ShardCorrupt:  # its directory is gone, which is no matter to lookups
        return
    for file, table in _by_file(published).items():
        if file in known:
            published.tables.share(table, beside.tables, known[file])


def _by_file(published: Published) -> dict[tuple[int, int], int]:
    """The native tables of all shards, by the device and inode of their files; those that are gone are left out."""
    found = {}
    for shard in (s for shards in published.files.values() for s in shards):
        table, number = shard_number(published.plan, shard)
        with contextlib.suppress(FileNotFoundError):
            stat = (published.shards / shard.file).stat()
            found[stat.st_dev, stat.st_ino] = published.plan.first_shard[table] + number
    return found


def place_copies(tables: _native.TableSet, config: SidecarConfig) -> None:
    """Say where `promote` puts copies; reserved huge pages are taken now, while their lack can still be refused (`ConfigError`)."""
    memory = config.memory
    tables.set_memory(memory.huge_pages, list(place(memory.numa, usable_nodes()).nodes))
    if memory.huge_pages == "hugetlb":
        try:
            tables.reserve()
        except _native.NativeError as e:
            raise ConfigError(f"memory.huge_pages: {e.args[1]}") from e


def _choose_lookahead(tables: _native.TableSet, plan: Plan, config: SidecarConfig, beside: Published | None) -> None:
    wanted = config.pool.lookahead_bytes
    ahead_bytes = 0
    if wanted != "auto":
        ahead_bytes = wanted
    elif beside is not None:
        known = _rows_ahead(beside.tables, beside.plan, config.name)
        ahead_bytes = max((row_bytes * rows for row_bytes, rows in known.items()), default=0)
    began = time.monotonic()
    tables.choose_lookahead(ahead_bytes)
    rows = _rows_ahead(tables, plan, config.name)
    logs.info("lookahead", rows_ahead_by_row_bytes=rows, seconds=round(time.monotonic() - began, 3))


def _rows_ahead(tables: _native.TableSet, plan: Plan, name: str) -> dict[int, int]:
    """What was chosen, by bytes of a row."""
    held = [(plan.tables[t], s, plan.first_shard[t] + s.number) for t, s in plan.held_by(plan.sidecar_index[name])]
    return {table.row_format.row_bytes(s.column_count): tables.rows_ahead(at) for table, s, at in held if tables.rows_ahead(at) > 0}


def promote(plans: Sequence[Published]) -> None:
    """Copy the tables of `plans`, the oldest first, into huge pages on a background thread."""
    # A daemon: the process may end in the middle of a copy, which nobody needs any more.
    threading.Thread(target=_promote_all, args=(plans,), name="promote", daemon=True).start()


def _promote_all(plans: Sequence[Published]) -> None:
    beside: Published | None = None
    for published in plans:
        copy_rows(published, beside)
        beside = published


def copy_rows(published: Published, beside: Published | None, turn: Callable[[int], None] | None = None) -> None:
    """Copy tables into huge pages; lookups use each copy as soon as it is complete. Rows that `beside` has there are shared.

    turn: is told the bytes of every small step, to wait or to raise, for copies that lookups do not wait for.
    """
    if beside is not None:
        share_rows(published, beside)
    tables, copied, began = published.tables, 0, time.monotonic()
    try:
        if turn is None:
            copied = tables.promote()
        else:
            while step := tables.promote(1):
                copied += step
                turn(step)
    except (MemoryError, _native.NativeError) as e:
        logs.log(logging.WARNING, "tables stay mapped: no memory for huge pages", reason=str(e))
        return
    logs.info("tables promoted to huge pages", bytes=copied, seconds=round(time.monotonic() - began, 3))
    if tables.placement_error:
        reason = os.strerror(tables.placement_error)
        logs.log(logging.WARNING, "rows lie where the kernel likes: it refused their NUMA nodes", reason=reason)


def _is_new(source: Source, serving: Sequence[Published]) -> bool:
    """Whether a plan is not served; `PlanError` when it is not, yet its epoch is."""
    if any(p.plan.fingerprint == source.plan.fingerprint for p in serving):
        return False
    if any(p.plan.epoch == source.plan.epoch for p in serving):
        raise PlanError(f"plan epoch: found {source.plan.epoch}, which already stands for another plan; allowed: any other number")
    return True
