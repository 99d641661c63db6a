"""Bringing the shards that a new plan places here: from this sidecar's own, and from the others that hold them.

Runs on one thread, at a bounded rate. What has arrived stays when the process is killed; whoever comes back goes on from there.
"""

from __future__ import annotations

import logging
import os
import random
import shutil
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray

from sidepool.sidecar import logs
from sidepool.sidecar.epochs import (
    MoveRecord,
    complete_directory,
    partial_directories,
    partial_directory,
    remove_directory,
    save_record,
)
from sidepool.sidecar.pacing import Pacer
from sidepool.sidecar.room import available_memory_bytes
from sidepool.sidecar.sending import MAX_STREAMS
from sidepool.sidecar.serving import Published
from sidepool.sidecar.staging import JOURNAL_SUFFIX, StagedShard
from sidepool.sidecar.stored import CHUNK_BYTES, Part, find_shard, read_part
from sidepool.wire.checksum import crc32c
from sidepool.wire.control_channel import ClientTls, fault_of
from sidepool.wire.control_pb2 import FetchChunk, FetchRequest
from sidepool.wire.control_pb2_grpc import SidecarStub
from sidepool.wire.durable import sync
from sidepool.wire.errors import Overloaded, PlanError, ShardCorrupt, SidepoolError
from sidepool.wire.plan import Plan
from sidepool.wire.program import TorchFile
from sidepool.wire.shards import MANIFEST_FILE, ShardFile, ShardManifest, save_manifest

# One call streams at most this much, so that it can have a deadline: a peer that hangs is left, and little is asked for again.
CALL_BYTES = 256 * CHUNK_BYTES
# Beyond what its bytes take at the agreed rate: connecting, and a machine under full load.
CALL_MARGIN_S = 15.0
# Pauses between tries double from the first to the last: ten tries in about half a minute, which a sidecar's restart fits in.
FIRST_PAUSE_S, LAST_PAUSE_S = 0.1, 5.0
TRIES = 10
# A peer that sends wrong bytes, or says that it does not have them, is asked this often (others that hold them included).
TRIES_WITHOUT_HOPE = 3
# What has arrived is read once more for its checksum, and then copied to where it is served from, this many times faster than it
# came; a move takes a third longer for both. Copies are the slower: huge pages that a virtual machine's host has yet to provide
# take milliseconds each.
READ_SPEED, COPY_SPEED = 16, 4


class MoveStopped(Exception):
    """The move was given up, by `Drop` or because the process is asked to stop."""


@dataclass
class Progress:
    """Bytes of the new shards that are in place, of all; read by other threads."""

    done_bytes: int = 0
    total_bytes: int = 0


@dataclass(frozen=True)
class Order:
    """What shall be brought, and where from."""

    name: str
    """This sidecar."""
    new: Plan
    present: Plan
    """Who holds what now."""
    base: Path
    """The configured directory of shards; the new one is made beside it."""
    own: Published | None
    """What this sidecar holds under `present`."""
    bytes_per_s: float
    promote: bool
    tls: ClientTls = field(default_factory=ClientTls)


@dataclass(frozen=True)
class Piece:
    """A part of a new shard that lies in one shard of the present plan."""

    part: Part
    holders: tuple[int, ...]
    """Sidecars of the present plan that hold it."""
    whole: bool
    """Whether it is all of that shard."""


class Fetcher:
    """Carries one order out. `run` is called once, `stop` by any thread."""

    def __init__(self, order: Order, pacer: Pacer) -> None:
        self._order = order
        self._pacer = pacer
        self._stopping = threading.Event()
        self._call: Any = None
        self._channels: dict[int, grpc.Channel] = {}
        self.progress = Progress()

    def stop(self) -> None:
        """Have `run` raise `MoveStopped` soon."""
        self._stopping.set()
        call = self._call
        if call is not None:
            call.cancel()

    def take_turn(self, count: float) -> None:
        """Wait until it is the turn of so many bytes of a move; raises `MoveStopped`."""
        self._pacer.wait(count, self._order.bytes_per_s, self._stopping.wait)
        self._stopped()

    def run(self, record: MoveRecord) -> Path:
        """Bring everything; returns the complete directory, `record` and manifest in it.

        Raises `PlanError` (no room, nobody holds it), `ShardCorrupt`, `TransportError`, and `MoveStopped`.
        """
        order = self._order
        complete, partial = complete_directory(order.base, order.new.epoch), partial_directory(order.base, order.new.epoch)
        wanted = self._wanted()
        linked = {shard.file: same for shard in wanted if (same := self._same(shard)) is not None}
        parts = [(s, piece.part) for s in wanted if s.file not in linked for piece in self._pieces(s)]
        self.progress.total_bytes = sum(same.bytes for same in linked.values())
        self.progress.total_bytes += sum(part.row_count * part.row_bytes(s.row_format) for s, part in parts)
        try:
            self._begin(partial)
            self._check_room(partial, [s for s in wanted if s.file not in linked])
            files = [self._link(partial, s, linked[s.file]) if s.file in linked else self._bring(partial, s) for s in wanted]
            for shard in wanted:
                self._bring_program_file(partial, shard.table, stays=shard.file in linked)
            manifest = ShardManifest(sidecar=order.name, plan_fingerprint=order.new.fingerprint, shards=tuple(files))
            save_manifest(manifest, partial)
            sync(partial / MANIFEST_FILE)
            save_record(record, partial)
            self._stopped()
            remove_directory(complete)  # of an earlier move to this epoch, which was given up
            partial.rename(complete)
            sync(complete.parent)
            for journal in complete.glob(f"*{JOURNAL_SUFFIX}"):
                journal.unlink()
        except OSError as e:
            raise PlanError(f"{partial}: cannot be written: {e}") from e
        finally:
            for channel in self._channels.values():
                channel.close()
        return complete

    def _stopped(self) -> None:
        if self._stopping.is_set():
            raise MoveStopped

    def _check_room(self, partial: Path, new: Sequence[ShardFile]) -> None:
        """Refuse what would fill the disk or the memory that the sidecar serves from; raises `PlanError`. Shards that stay as
        they are take neither."""
        begun = {path.name for path in partial.iterdir()}  # their room is reserved
        needed = sum(shard.bytes for shard in new if shard.file + JOURNAL_SUFFIX not in begun)
        free = shutil.disk_usage(partial).free
        if needed > free:
            raise PlanError(
                f"{partial.parent}: no room: found {free} bytes free; plan epoch {self._order.new.epoch} takes {needed}"
            )
        available, brought = available_memory_bytes(), sum(shard.bytes for shard in new)
        if self._order.promote and brought > available:
            raise PlanError(
                f"memory: no room: found {available} bytes available; plan epoch {self._order.new.epoch} takes {brought} "
                "beside what is served (promote: false maps its rows instead)"
            )

    def _wanted(self) -> list[ShardFile]:
        """The files of the new shards, their checksums not known yet."""
        plan = self._order.new
        return [
            ShardFile.of(plan.tables[i], s.rows, s.columns, f"table-{i:04d}-{s.number:04d}.safetensors")
            for i, s in plan.held_by(plan.sidecar_index[self._order.name])
        ]

    def _bring_program_file(self, partial: Path, table: str, *, stays: bool) -> None:
        """Bring the file of a table's program that takes torch, if it has one."""
        order, program = self._order, self._order.new.tables[self._order.new.table_index[table]].program
        if program is None or program.torch is None:
            return
        target = partial / program.torch.file
        if stays:
            assert order.own is not None
            shutil.copyfile(order.own.shards / program.torch.file, target)
        else:
            present, content, tries = order.present, None, 0
            (shard,) = present.placed_shards[present.table_index[table]]  # tables of programs are whole
            peers = random.sample(shard.sidecars, len(shard.sidecars))
            while content is None:
                try:
                    content = self._fetch_program_file(table, program.torch, peers[0])
                except SidepoolError as fault:
                    tries += not isinstance(fault, Overloaded)
                    self._pause(f"the program of table {table!r}", fault, tries)
                    peers.append(peers.pop(0))
            target.write_bytes(content)
        sync(target)

    def _begin(self, partial: Path) -> None:
        """Make the directory, or go on in it where it was made for the same plan; those of other moves go."""
        marker, fingerprint = partial / "plan", self._order.new.fingerprint
        for left in partial_directories(self._order.base):
            if left != partial or not marker.is_file() or marker.read_text(encoding="utf-8") != fingerprint:
                remove_directory(left)
        partial.mkdir(exist_ok=True)
        marker.write_text(fingerprint, encoding="utf-8")

    def _same(self, shard: ShardFile) -> ShardFile | None:
        """The own shard that is just this one."""
        if self._order.own is None:
            return None
        extent = (shard.row_range, shard.column_range)
        return next((s for s in self._order.own.files.get(shard.table, ()) if (s.row_range, s.column_range) == extent), None)

    def _link(self, partial: Path, shard: ShardFile, same: ShardFile) -> ShardFile:
        """An own shard stays: a second name for its file, or a copy where that cannot be."""
        assert self._order.own is not None
        source, target = self._order.own.shards / same.file, partial / shard.file
        for left in (partial / (shard.file + JOURNAL_SUFFIX), target):
            left.unlink(missing_ok=True)
        try:
            os.link(source, target)
        except OSError:  # another file system, or one without links
            shutil.copyfile(source, target)
            sync(target)
        self.progress.done_bytes += shard.bytes
        return shard.model_copy(update={"crc32c": same.crc32c})

    def _bring(self, partial: Path, shard: ShardFile) -> ShardFile:
        pieces = self._pieces(shard)
        for _ in range(TRIES_WITHOUT_HOPE):
            staged, done_before = StagedShard(partial, shard), self.progress.done_bytes
            try:
                checksums = [self._bring_piece(staged, piece) for piece in pieces]
                entry = staged.finish(lambda count: self.take_turn(count / READ_SPEED))
                # A shard that moved as it was has the checksum that its old manifest gives.
                moved_whole = len(pieces) == 1 and pieces[0].whole and checksums[0] is not None
                if not moved_whole or checksums[0] == entry.crc32c:
                    return entry
                staged.forget()
                self.progress.done_bytes = done_before
            finally:
                staged.close()
        raise ShardCorrupt(f"{partial / shard.file}: tensor {shard.table!r}: came with another checksum than its manifest gives")

    def _pieces(self, shard: ShardFile) -> list[Piece]:
        """What a new shard is put together from."""
        plan, pieces = self._order.present, []
        for s in plan.placed_shards[plan.table_index[shard.table]]:
            rows, columns = _common(s.rows, shard.row_range), _common(s.columns, shard.column_range)
            if rows and columns:
                whole = (rows, columns) == (s.rows, s.columns)
                pieces.append(Piece(Part(shard.table, rows, columns), s.sidecars, whole))
        return pieces

    def _bring_piece(self, staged: StagedShard, piece: Piece) -> int | None:
        """Bring what is missing of a piece; returns the checksum of the shard it is from, where a manifest was asked."""
        order, missing = self._order, staged.missing(piece.part)
        width = piece.part.row_bytes(staged.shard.row_format)
        self.progress.done_bytes += width * (piece.part.row_count - sum(gap.row_count for gap in missing))
        if order.own is not None and order.present.sidecar_index[order.name] in piece.holders:
            source = find_shard(order.own, piece.part)
            for gap in missing:
                for row, rows in read_part(order.own, source, gap):
                    self._take(staged, gap, row, rows, crc32c(rows))
            return source.crc32c
        checksum, tries = None, 0
        peers = random.sample(piece.holders, len(piece.holders))
        most_rows = max(1, CALL_BYTES // width)
        while missing:
            first = missing[0].rows[0]
            gap = replace(missing[0], rows=(first, min(missing[0].rows[1], first + most_rows)))
            try:
                checksum = self._fetch(staged, gap, peers[0])
            except SidepoolError as fault:
                tries = 1 if staged.missing(piece.part) != missing else tries + (not isinstance(fault, Overloaded))
                self._pause(str(gap), fault, tries)
                peers.append(peers.pop(0))
            missing = staged.missing(piece.part)
        return checksum

    def _pause(self, what: str, fault: SidepoolError, tries: int) -> None:
        """Wait before the next try; raises `fault` after enough of them. A peer that is busy, or starts again, is waited for."""
        self._stopped()
        if tries >= (TRIES if fault.retryable else TRIES_WITHOUT_HOPE):
            raise fault
        logs.log(logging.WARNING, "fetching again", part=what, reason=str(fault))
        self._stopping.wait(random.uniform(0.5, 1.0) * min(FIRST_PAUSE_S * 2.0**tries, LAST_PAUSE_S))

    def _fetch(self, staged: StagedShard, gap: Part, holder: int) -> int:
        """Have another sidecar send a part; blocks that came before an error stay. Returns its shard's checksum."""
        request = FetchRequest(
            table=gap.table,
            first_row=gap.rows[0],
            rows=gap.row_count,
            first_column=gap.columns[0],
            columns=gap.columns[1] - gap.columns[0],
        )
        where, width = f"{self._peer(holder)}: {gap}", gap.row_bytes(staged.shard.row_format)
        at, digest = gap.rows[0], 0
        for chunk in self._chunks(request, holder):
            if chunk.last:
                if (at, digest) != (gap.rows[1], chunk.crc32c):
                    staged.forget()
                    raise ShardCorrupt(f"{where}: the rows sent have another CRC-32C than it says at the end")
                return int(chunk.shard_crc32c)
            rows = chunk.rows  # once: every look at it is a copy
            count, odd = divmod(len(rows), width)
            if chunk.first_row != at or odd or not 0 < count <= gap.rows[1] - at or crc32c(rows) != chunk.crc32c:
                raise ShardCorrupt(f"{where}: rows from {at} on came with another CRC-32C than it says")
            digest = crc32c(chunk.crc32c.to_bytes(4, "little"), digest)
            self._take(staged, gap, at, np.frombuffer(rows, np.uint8).reshape(count, width), chunk.crc32c)
            at += count
        raise ShardCorrupt(f"{where}: the stream ended at row {at}")

    def _fetch_program_file(self, table: str, file: TorchFile, holder: int) -> bytes:
        """Have another sidecar send the file of a program; it must be the one that the plan names."""
        content = bytearray()
        for chunk in self._chunks(FetchRequest(table=table, program_file=True), holder):
            rows = chunk.rows
            self.take_turn(len(rows))
            content += rows
        if (found := crc32c(content)) != file.crc32c:
            raise ShardCorrupt(
                f"{self._peer(holder)}: {file.file}: CRC-32C: found {found:#010x}; allowed: {file.crc32c:#010x} (from the plan)"
            )
        return bytes(content)

    def _peer(self, holder: int) -> str:
        address = self._order.present.sidecars[holder]
        return f"sidecar {address.name!r} ({address.address})"

    def _chunks(self, request: FetchRequest, holder: int) -> Iterator[FetchChunk]:
        """What another sidecar streams for `request`."""
        order = self._order
        request.plan_fingerprint, request.bytes_per_s = order.present.fingerprint, order.bytes_per_s
        # Senders divide their rate among those who fetch.
        timeout_s = CALL_MARGIN_S + 2 * MAX_STREAMS * CALL_BYTES / order.bytes_per_s
        address = order.present.sidecars[holder].address
        channel = self._channels.get(holder) or self._channels.setdefault(holder, order.tls.channel(address))
        call = self._call = SidecarStub(channel).Fetch(request, timeout=timeout_s)  # type: ignore[no-untyped-call]
        try:
            for chunk in call:
                self._stopped()
                yield chunk
        except grpc.RpcError as e:
            self._channels.pop(holder).close()  # the next try connects anew
            raise fault_of(e, self._peer(holder)) from e
        finally:
            self._call = None
            call.cancel()

    def _take(self, staged: StagedShard, gap: Part, row: int, rows: NDArray[np.uint8], checksum: int) -> None:
        self.take_turn(rows.nbytes)
        staged.write(row, gap.columns, rows, checksum)
        self.progress.done_bytes += rows.nbytes


def _common(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int] | None:
    begin, end = max(a[0], b[0]), min(a[1], b[1])
    return (begin, end) if begin < end else None
