"""`Fetch`: this sidecar's rows, and the files of its programs, for another one."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator

import grpc

from sidepool.sidecar import logs
from sidepool.sidecar.pacing import Pacer
from sidepool.sidecar.serving import Serving
from sidepool.sidecar.stored import Part, find_shard, read_part, read_program_file
from sidepool.wire.checksum import crc32c
from sidepool.wire.control_channel import check_rate
from sidepool.wire.control_pb2 import FetchChunk, FetchRequest
from sidepool.wire.errors import Overloaded, PlanError
from sidepool.wire.program import TorchFile
from sidepool.wire.shards import ShardFile

# Each holds one of the few threads of the control plane for as long as it lasts.
MAX_STREAMS = 2


class Sender:
    """Streams parts of served shards, all of them together at a bounded rate. Called on gRPC's threads."""

    def __init__(self, serving: Serving, bytes_per_s: float) -> None:
        """bytes_per_s: where a request names no rate."""
        self._serving = serving
        self._bytes_per_s = bytes_per_s
        self._pacer = Pacer()
        self._free = threading.BoundedSemaphore(MAX_STREAMS)

    def stream(self, request: FetchRequest, context: grpc.ServicerContext) -> Iterator[FetchChunk]:
        """The rows asked for; raises `PlanError`, `ConfigError`, `ShardCorrupt`, and `Overloaded` beyond `MAX_STREAMS`."""
        published = self._serving.held(request.plan_fingerprint)
        if published is None:
            raise PlanError(f"plan_fingerprint: found {request.plan_fingerprint[:16]!r}…; allowed: one that this sidecar answers")
        if request.program_file:
            what = f"the program of table {request.table!r}"
            whole: ShardFile | TorchFile
            whole, blocks = read_program_file(published, request.table)
        else:
            rows = (request.first_row, request.first_row + request.rows)
            part = Part(request.table, rows, (request.first_column, request.first_column + request.columns))
            what, whole = str(part), find_shard(published, part)
            if whole.row_format == "int4" and part.columns[0] % 2:
                raise PlanError(f"first_column: found {part.columns[0]}; allowed: an even one (int4 stores two values a byte)")
            blocks = read_part(published, whole, part)
        check_rate("bytes_per_s", request.bytes_per_s)
        rate = request.bytes_per_s or self._bytes_per_s
        if not self._free.acquire(blocking=False):
            raise Overloaded(f"sidecar {self._serving.name!r} sends to {MAX_STREAMS} others already")
        if not context.add_callback(self._free.release):  # over already
            self._free.release()
            return
        logs.log(logging.DEBUG, "sending", part=what, peer=context.peer())
        digest = at = 0
        for first, block in blocks:
            self._pacer.wait(block.nbytes, rate)
            checksum, at = crc32c(block), first + len(block)
            digest = crc32c(checksum.to_bytes(4, "little"), digest)
            yield FetchChunk(first_row=first, rows=block.tobytes(), crc32c=checksum)
        yield FetchChunk(first_row=at, crc32c=digest, shard_crc32c=whole.crc32c, last=True)
