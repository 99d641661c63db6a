"""Shards of a new plan put together from those of an old one, on one sidecar: every row format, any cuts, after any break."""

from __future__ import annotations

import errno
import os
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sidepool.partition.reshard import reshard
from sidepool.partition.shard_writer import write_shard
from sidepool.sidecar import fetching, staging, stored
from sidepool.sidecar.epochs import MoveRecord, load_record, save_record
from sidepool.sidecar.fetching import Fetcher, MoveStopped, Order
from sidepool.sidecar.loader import copy_rows, load_tables, share_rows
from sidepool.sidecar.pacing import Pacer
from sidepool.sidecar.serving import Published
from sidepool.wire.errors import PlanError
from sidepool.wire.plan import Feature, Plan, RowFormat, Shard, SidecarAddress, Table, validate_plan
from sidepool.wire.shards import ShardManifest, load_manifest, save_manifest

ROWS, DIM = 37, 10
TABLES = tuple(Table(name=f"{f}", rows=ROWS, dim=DIM, row_format=f) for f in RowFormat)
FAST = 1e12

cuts = st.tuples(st.sets(st.integers(1, ROWS - 1), max_size=3), st.sets(st.sampled_from([2, 4, 6, 8]), max_size=2))


def plan_of(epoch: int, rows: set[int], columns: set[int]) -> Plan:
    """Every table in a grid, all on one sidecar."""
    shards = tuple(
        Shard(table=t.name, sidecar="only", rows=r, columns=c)
        for t in TABLES
        for r in pairwise(sorted({0, ROWS} | rows))
        for c in pairwise(sorted({0, DIM} | columns))
    )
    plan = Plan(
        epoch=epoch,
        model="m",
        tables=TABLES,
        features=tuple(Feature(name=t.name, table=t.name) for t in TABLES),
        sidecars=(SidecarAddress(name="only", address="127.0.0.1:1"),),
        shards=shards,
    )
    validate_plan(plan)
    return plan


def serve(directory: Path, plan: Plan) -> Published:
    """Shards of `plan` under `directory`."""
    whole = plan_of(100, set(), set())
    first = directory / "whole"
    first.mkdir()
    weight = torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(1))
    files = tuple(write_shard(first, f"{t.name}.safetensors", t, lambda a, b: weight[a:b])[0] for t in TABLES)
    save_manifest(ShardManifest(sidecar="only", plan_fingerprint=whole.fingerprint, shards=files), first)
    reshard(whole, first, plan, directory / "old")
    shards = directory / "old/sidecars/only/shards"
    return Published(plan, load_tables(plan, "only", shards), shards)


def fetcher(published: Published, new: Plan) -> tuple[Fetcher, MoveRecord]:
    order = Order(
        name="only", new=new, present=published.plan, base=published.shards, own=published, bytes_per_s=FAST, promote=True
    )
    return Fetcher(order, Pacer()), MoveRecord(state="prepared", plan=new, replaces=published.plan.fingerprint)


@settings(max_examples=25, deadline=None)
@given(old=cuts, new=cuts)
def test_any_cuts_become_any_others_bit_by_bit(old: tuple[set[int], set[int]], new: tuple[set[int], set[int]]) -> None:
    with TemporaryDirectory() as name:
        directory = Path(name)
        published, wanted = serve(directory, plan_of(1, *old)), plan_of(2, *new)
        work, record = fetcher(published, wanted)
        shards = work.run(record)
        assert work.progress.done_bytes == work.progress.total_bytes
        load_tables(wanted, "only", shards)  # checksums, shapes, placement
        assert load_record(shards) == record
        reshard(published.plan, directory / "old", wanted, directory / "new")  # by torch, from files to files
        theirs = directory / "new/sidecars/only/shards"
        contents = [
            {(f.table, f.row_range, f.column_range): (f.crc32c, (d / f.file).read_bytes()) for f in load_manifest(d).shards}
            for d in (shards, theirs)
        ]
        assert contents[0] == contents[1]


def test_blocks_that_arrived_are_kept_and_those_that_changed_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "CHUNK_BYTES", 200)
    published, new = serve(tmp_path, plan_of(1, {10}, set())), plan_of(2, {20}, {4})
    work, record = fetcher(published, new)
    written: list[tuple[str, int]] = []
    write = staging.StagedShard.write

    def write_some(self: staging.StagedShard, first_row: int, *rest: object) -> None:
        if len(written) == 12:
            work.stop()
        written.append((self.shard.file, first_row))
        write(self, first_row, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(staging.StagedShard, "write", write_some)
    with pytest.raises(MoveStopped):
        work.run(record)
    before, partial = list(written), published.shards.with_name("shards.epoch-2.partial")
    spoilt = partial / before[0][0]
    with spoilt.open("r+b") as file:
        at = spoilt.stat().st_size - 20 * RowFormat.FP32.row_bytes(4)
        byte = os.pread(file.fileno(), 1, at)[0]
        os.pwrite(file.fileno(), bytes([byte ^ 1]), at)
    with (partial / (before[-1][0] + ".journal")).open("a", encoding="utf-8") as journal:
        journal.write("[1, 2, 0")  # the line that was being written
    written.clear()
    again, record = fetcher(published, new)
    shards = again.run(record)
    load_tables(new, "only", shards)
    assert [block for block in written if block in before] == [before[0]]
    assert again.progress.done_bytes == again.progress.total_bytes


def test_shards_that_stay_are_copied_neither_on_the_disk_nor_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published, new = serve(tmp_path, plan_of(1, {10}, set())), plan_of(2, {10, 20}, set())
    stay_bytes = sum(t.row_format.row_bytes(DIM) * 10 for t in TABLES)
    monkeypatch.setattr(fetching, "available_memory_bytes", lambda: sum(t.bytes for t in TABLES) - stay_bytes)
    work, record = fetcher(published, new)
    shards = work.run(record)
    same = {f.file for f in load_manifest(shards).shards if f.row_range == (0, 10)}
    assert len(same) == len(TABLES)
    assert all((shards / file).stat().st_nlink == 2 for file in same)
    assert all((shards / f.file).stat().st_nlink == 1 for f in load_manifest(shards).shards if f.file not in same)
    after = Published(new, load_tables(new, "only", shards), shards)
    share_rows(after, published)
    assert after.tables.huge_bytes == 0  # the old plan's rows are still mapped
    published.tables.promote()
    share_rows(after, published)
    assert after.tables.huge_bytes == stay_bytes
    steps: list[int] = []
    copy_rows(after, published, steps.append)
    assert sum(steps) == after.tables.bytes - stay_bytes
    assert after.tables.huge_bytes == after.tables.bytes


def test_a_file_that_is_served_is_never_written_to_through_its_second_name(tmp_path: Path) -> None:
    published = serve(tmp_path, plan_of(1, {10}, set()))
    shard = published.files["fp32"][0]
    served, partial = published.shards / shard.file, tmp_path / "partial"
    partial.mkdir()
    os.link(served, partial / shard.file)  # what a move leaves that began when the shard was the same
    content = served.read_bytes()
    staged = staging.StagedShard(partial, shard)
    staged.write(0, (0, DIM), np.full((1, DIM * 4), 255, np.uint8), 0)
    staged.close()
    assert served.read_bytes() == content
    assert (partial / shard.file).read_bytes() != content


def test_what_another_move_left_is_removed(tmp_path: Path) -> None:
    published = serve(tmp_path, plan_of(1, {10}, set()))
    left = published.shards.with_name("shards.epoch-9.partial")
    left.mkdir()
    (left / "file").write_bytes(b"x")
    complete = published.shards.with_name("shards.epoch-2")
    complete.mkdir()
    work, record = fetcher(published, plan_of(2, {20}, set()))
    save_record(record.model_copy(update={"state": "abandoned"}), complete)
    assert work.run(record) == complete
    assert sorted(path.name for path in published.shards.parent.glob("shards.*")) == ["shards.epoch-2"]
    assert load_record(complete).state == "prepared"


def test_no_room_is_said_before_anything_is_brought(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published = serve(tmp_path, plan_of(1, {10}, set()))
    new = plan_of(2, {20}, set())
    needed = sum(t.bytes for t in TABLES)

    def refusal() -> str:
        work, record = fetcher(published, new)
        with pytest.raises(PlanError) as error:
            work.run(record)
        return str(error.value)

    with monkeypatch.context() as patched:
        patched.setattr(fetching.shutil, "disk_usage", lambda path: SimpleNamespace(free=7))
        assert f"no room: found 7 bytes free; plan epoch 2 takes {needed}" in refusal()
    with monkeypatch.context() as patched:
        patched.setattr(fetching, "available_memory_bytes", lambda: 8)
        assert f"memory: no room: found 8 bytes available; plan epoch 2 takes {needed}" in refusal()
    with monkeypatch.context() as patched:

        def full(*arguments: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        patched.setattr(os, "posix_fallocate", full)
        assert "no room for" in refusal()
    work, record = fetcher(published, new)
    assert load_record(work.run(record)) == record
