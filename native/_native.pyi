"""Types of the compiled core. Arrays are C-contiguous NumPy arrays (or anything exporting the buffer of one).

Every call that may wait or do work releases the GIL. Wrong argument *shapes or dtypes* raise `TypeError` or
`ValueError`; everything a peer or a request can cause comes back as a status number (`sidepool.wire.errors.Status`)
or, for set-up calls, as `NativeError` with `.status` and a message.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

class NativeError(Exception):
    """A set-up call failed. `args` is `(status, message)`."""

WIRE_VERSION: Final[int]
CLIENT_TIMING_FIELDS: Final[tuple[str, ...]]
"""Names of the columns of a `timings` row: lane_out_ns, queue_ns, pool_ns, lane_back_ns, request_bytes, response_bytes."""

def simd_level() -> str:
    """The SIMD level in use: avx512, avx2, neon or scalar."""

def simd_levels() -> list[str]:
    """The levels this machine can run, best first."""

def force_simd_level(level: str) -> None:
    """Use `level` from now on in this process (tests and benchmarks); `NativeError` where it cannot run."""

def measure_lookahead(dims: Sequence[int]) -> list[int]:
    """Rows between the start of a row's fetch and its use, measured to be fastest for fp32 rows of each dim; about 0.1 s."""

class TableSet:
    """The tables and features one process serves under one plan epoch. Build it, `seal` it, then publish it.

    Not thread-safe until sealed; immutable and safe to share afterwards. Owns its memory and mappings.
    """

    def __init__(self, epoch: int, tables: int, features: int) -> None: ...
    def add_table_file(
        self, table: int, path: str, offset: int, rows: int, dim: int, row_format: str, out_of_range: str, default_row: int
    ) -> None:
        """Map rows `[rows, dim]` at byte `offset` of a file, read-only; `NativeError` if the file is too short."""
    def add_table_array(
        self, table: int, rows: NDArray[Any], out_of_range: str, default_row: int, row_format: str = "", dim: int = 0
    ) -> None:
        """Copy an array into huge pages: float32 or float16 `[rows, dim]`, or with `row_format` anything of the right size.

        bf16: uint16 `[rows, dim]`, the upper halves of float32. int8, int4: uint8 `[rows, row bytes]` as
        docs/row-formats.md lays them out, and `dim`.
        """
    def add_feature(
        self, feature: int, table: int, pooling: str, weighted: bool, padding_index: int | None = None, shards: int = 1
    ) -> None:
        """A feature whose table lies in `shards` tables of this set from `table` on; at least one must be held by `seal`."""
    def add_program(
        self,
        table: int,
        words: int,
        floats: int,
        lookups: list[tuple[int, str, int | None, int, int]],
        inputs: list[tuple[bool, int, int]],
        steps: list[tuple[str, list[int], int, list[list[int]]]],
        external: Callable[[list[NDArray[np.float32]], NDArray[np.float32]], None] | None = None,
    ) -> None:
        """Make `table` a computed one: a bag of it is a record of `words` words, and gives the program's result (wire/program.py).

        After its weights and every table that it reads. lookups: table, pooling, padding index, first word, ids. inputs: whether
        they are bytes, first word, values. steps: operator, sizes, depth, operands, the first of them written; an operand is its
        space, its offset and a stride per size. external: called in place of steps, on any thread, with what was looked up and
        given, `[samples, floats]` each, and `[samples, dim]` to fill in; the arrays are gone when it returns. Raises `NativeError`
        for what the core cannot run.
        """
    def seal(self) -> None: ...
    def set_memory(self, huge_pages: str, nodes: Sequence[int]) -> None:
        """Where copies lie from now on. huge_pages: transparent, hugetlb or off. nodes: NUMA nodes that rows are spread over page
        by page, or the one they are put on; empty: as the kernel likes. Before `add_table_array` and `promote`.
        """
    def reserve(self) -> None:
        """Map the memory that `promote` fills; under hugetlb the pages are taken, `NativeError` where they are too few."""
    @property
    def placement_error(self) -> int:
        """The errno with which the kernel refused `nodes`, else 0. Known once memory is mapped."""
    def choose_lookahead(self, bytes: int) -> None:
        """Fetch rows `bytes` ahead of their use; 0: what is measured to be fastest (at most about 100 ms; sets below 64 MiB keep
        12 KiB). Never changes results.
        """
    def rows_ahead(self, table: int) -> int:
        """The lookahead of a table in rows; 0 where none was chosen or the table is not held."""
    def promote(self, at_least: int = ...) -> int:
        """Copy mapped tables into memory of their own (see `set_memory`) while serving goes on; returns bytes copied.

        From one background thread at a time. Lookups use a table's copy from the moment it is complete. at_least: stop soon after
        so many bytes, to go on there in the next call, which returns 0 when there is nothing left; default: all of them.
        """
    def share(self, table: int, other: TableSet, others_table: int) -> bool:
        """Have a mapped table read its rows where `other` has promoted those of the same file; each set keeps them as long as it
        lives. False where there is nothing to share (yet). Not beside this set's `promote`. `NativeError` for another shape.
        """
    @property
    def epoch(self) -> int: ...
    @property
    def bytes(self) -> int:
        """Row bytes held."""
    @property
    def huge_bytes(self) -> int:
        """Row bytes that lie in anonymous (huge-page advised) memory, its own or shared."""

def pool(tables: TableSet, feature: int, values: NDArray[np.int64], lengths: NDArray[np.int32],
         weights: NDArray[np.float32] | None, out: NDArray[Any]) -> tuple[int, int, int, int]:
    """Pool one feature into `out` (`[batch, dim]`; `[nnz, dim]` for `none`): `(status, reason, bag, id)`, zeros when OK.

    out: float32, float16, or uint16 for bf16.
    """

class PreparedFrames:
    """Request frames answered over and over, with no lane around them: what `sidepool bench pool` measures.

    Owns a copy of the frames and one payload buffer; keeps the tables. One thread at a time; the GIL is released.
    """

    def __init__(self, tables: TableSet, frames: Sequence[bytes]) -> None:
        """`NativeError` where a frame is no request, or names a feature or id that is not held. Promote the tables before."""
    def serve(self, first: int, count: int) -> int:
        """Parse and answer frames `[first, first + count)` as an engine does; returns the first status that is not OK."""
    def read_rows(self, first: int, count: int, bytes_ahead: int) -> int:
        """Read every cache line of the same rows in the same order and compute nothing: the gather ceiling.

        Fetching a row begins `bytes_ahead` of rows before it is read.
        """
    def payload(self) -> bytes:
        """What `serve` pooled last: one `[batch, dim]` block per feature, padded to 64 bytes."""
    def __len__(self) -> int: ...

class SidecarServer:
    """The engines of a sidecar: native threads that own lanes and answer lookups. Thread-safe."""

    def __init__(
        self, *, engines: int, spin_us: int, max_lanes: int, max_frame_bytes: int, cpus: Sequence[Sequence[int]] = (),
        order: str = "edf",
    ) -> None:
        """Engine i runs on `cpus[i % len(cpus)]`; anywhere where `cpus` is empty. order: edf or fcfs, of what waits."""
    def publish(self, tables: TableSet) -> None:
        """Serve `tables` from now on, and what was published before it for lookups of its epoch; others get status PLAN."""
    def retire_previous(self) -> None:
        """Serve only what was published last. Its memory goes when the last engine has taken notice."""
    def listen_unix(self, path: str) -> None:
        """Accept shm lanes on a Unix socket (mode 0600). `NativeError` if the path is taken by a live listener."""
    def listen_tcp(
        self,
        host: str,
        port: int,
        *,
        dedicated: bool = False,
        window_bytes: int = 0,
        traffic_class: int = 0,
        control_traffic_class: int = 0,
    ) -> int:
        """Accept tcp lanes; returns the bound port. `NativeError` names the address that is taken."""
    def expect(self, token: bytes, lane: str, slots: int, request_bytes: int, response_bytes: int, ttl_s: float) -> None:
        """Admit one lane (`shm` or `tcp`) that presents this 16-byte token within `ttl_s`. Slot sizes in bytes."""
    def listen_rdma(self, options: dict[str, Any]) -> str:
        """Admit rdma lanes; returns device, port and address found. `options`: `sidepool.sidecar.config.RdmaListen.native`."""
    def connect_rdma(self, slots: int, request_bytes: int, response_bytes: int, peer: bytes) -> bytes:
        """A lane for the ranker whose end is `peer` (docs/wire-format.md); returns this end. Raises `NativeError`."""
    def migrate(self, lane: int, engine: int) -> None:
        """Move a lane (its `id` in `stats`) to another engine; returns when the move has begun. Raises `NativeError` REJECTED."""
    def serve(self, frame: bytes) -> bytes:
        """Answer one request frame in the calling thread (the grpc lane): the response piece frames, concatenated."""
    def stats(self) -> dict[str, Any]:
        """Counters since start, see `docs/metrics.md`: engines, lanes, tables, statuses, histograms."""
    def drain(self) -> None:
        """Refuse new lookups with status DRAINING from now on; those in flight finish."""
    def in_flight(self) -> int:
        """Subrequests queued or being served right now."""
    def close(self) -> None:
        """Close listeners and lanes, stop and join the engines. Idempotent."""

class RdmaOffer:
    """A ranker's end of an rdma lane, prepared and not connected; freed when dropped."""

    @property
    def end(self) -> bytes:
        """What the sidecar needs to know (docs/wire-format.md)."""

def rdma_unavailable() -> str:
    """Empty where libibverbs was there at build time and is now; else what to do about it."""

def rdma_dmabuf_refusal(device: str, fd: int = -1) -> str:
    """Why the device cannot write into another device's memory, given as a dma-buf; empty: it can. -1 asks the driver alone."""

class LookupClient:
    """Routes lookups to lanes and merges what comes back. Thread-safe; any number of concurrent `lookup` calls.

    One lane per sidecar, attached and replaced by the owner. Owns its slot buffers.
    """

    def __init__(
        self, *, epoch: int, sidecars: int, spin_us: int, degrade: bool,
        rows: NDArray[np.int64], dims: NDArray[np.int32], poolings: Sequence[str], weighted: Sequence[bool],
        out_of_range: Sequence[str], sidecar_of_feature: NDArray[np.int32] | None = None,
        legs: Sequence[tuple[int, int, int, int, int, Sequence[int], bool]] = (),
        default_rows: Sequence[int] = (), padding: Sequence[int] = (), ranker_pooling: bool = False, hedge_budget: float = 0.0,
        window_delay_us: int = 0, max_ids: int = 0,
    ) -> None:
        """Most is per feature, in plan order: rows and dim of its table, pooling, policy, default row, padding index (-1: none).

        Where tables lie: `sidecar_of_feature`, whole tables; or `legs`, one per shard of each feature's table, by feature,
        columns and rows: feature, first column, columns, first row, shard number, sidecars with a replica, and whether the
        rows of the table are cut (then all its legs say so, and ids are settled and sorted here).
        ranker_pooling: sidecars answer with rows. hedge_budget: second subrequests sent early, as a share of all.
        window_delay_us: how much longer than twice its least an answer may be on the network before fewer bytes are asked for at
        once; 0: no receive window. max_ids: of all lookups under way, a further one gets OVERLOADED; 0: no bound.
        """
    def set_fixed_columns(self, begins: NDArray[np.int32], widths: NDArray[np.int32]) -> None:
        """Where each feature's ids lie in a fixed-width id matrix (see `lookup`). Default: feature f is column f."""
    def attach_local(self, sidecar: int, tables: TableSet) -> None: ...
    def attach_shm(self, sidecar: int, path: str, token: bytes, timeout_s: float) -> None:
        """Connect an shm lane to the Unix socket `path`; replaces a dead lane. Raises `NativeError`."""
    def attach_tcp(
        self, sidecar: int, host: str, port: int, token: bytes, timeout_s: float, window_bytes: int = 0
    ) -> None: ...
    def offer_rdma(
        self, options: dict[str, Any], engines: int, slots: int, request_bytes: int, response_bytes: int
    ) -> RdmaOffer:
        """Register this end of an rdma lane. The first call opens the device and starts `engines` threads for all lanes.

        options: `sidepool.wire.rdma.RdmaPath.native`. Raises `NativeError`.
        """
    def attach_rdma(self, sidecar: int, offer: RdmaOffer, peer: bytes) -> None:
        """Connect `offer` to the sidecar's end; replaces a dead lane. Raises `NativeError`."""
    def attach_external(self, sidecar: int, slots: int, request_bytes: int, response_bytes: int) -> None:
        """A lane whose frames Python carries (grpc): see `take` and `deliver`."""
    def take(self, sidecar: int, timeout_s: float) -> tuple[int, bytes, int] | None:
        """External lane: the next request `(ticket, frame, remaining budget in ns)`, or None after the timeout."""
    def deliver(self, sidecar: int, ticket: int, frames: bytes | None, status: int) -> None:
        """External lane: the response pieces for `ticket`, or a failure status. A late delivery is ignored."""
    def detach(self, sidecar: int) -> None: ...
    def lane_alive(self, sidecar: int) -> bool: ...
    def wait_lane_lost(self, timeout_s: float) -> int:
        """Wait until a lane dies; returns a sidecar without a live lane, -1 after the timeout, -2 once closed."""
    def lookup(
        self,
        parts: Sequence[tuple[NDArray[np.int64] | NDArray[np.int32], NDArray[np.int32] | None, NDArray[np.float32] | None]],
        out: NDArray[Any],
        sequences: Sequence[NDArray[Any]],
        deadline_ns: int,
        priority: int,
        trace: bytes,
        verdicts: NDArray[np.int64],
        timings: NDArray[np.int64],
    ) -> tuple[int, int]:
        """Look all parts up in one go; blocks until done, refused or past the budget. GIL released throughout.

        parts: jagged `(values [nnz], lengths [F*B] feature-major, weights [nnz] or None)`, or fixed-width
          `(ids [B, W], None, None)`. Ids are int64 or int32. The samples of all parts follow one another in the output.
        out: `[ΣB, Σ dim]` of the pooled features, row-contiguous with any row stride; written in place. Its dtype says what
          the results are: float32, float16, or uint16 for bf16.
        sequences: one `[Σ nnz_f, dim]` array of the dtype of `out` per `none` feature, in feature order.
        deadline_ns: remaining budget in nanoseconds (relative), > 0. trace: 26 raw bytes of a W3C traceparent
          (version 1, trace id 16, span id 8, flags 1), or empty.
        verdicts: `[len(parts), 5]` written: status, reason (see `reason_text`), feature, bag, offending value.
          A part that is refused has its output rows zeroed; the others are answered.
        timings: `[1 + sidecars, 6]` written: row 0 is route_ns, wait_ns, merge_ns, total_ns, chunks, 0;
          row 1 + s is `CLIENT_TIMING_FIELDS` for sidecar s (the slowest chunk's times, bytes summed).
        Returns `(status, sidecar)`: status of the lookup as a whole (a failed sidecar's, else OK) and the sidecar at
        fault or -1. Under `degrade` rows that nobody answers for are as if their ids were absent; `degraded()` names the
        features.
        """
    def repeat(self, ids: NDArray[np.int64], count: int, threads: int) -> int:
        """Look the id matrix `[B, features]` up `count` times from `threads` native threads: nanoseconds for all (benchmarks).

        Raises `NativeError` with the status of the first lookup that fails. Pooled features only.
        """
    def degraded(self) -> list[int]:
        """Features that lost rows, because nobody answered for them, in the calling thread's last lookup."""
    def stats(self) -> dict[str, Any]:
        """Counters: lookups, per-lane sent/received frames and bytes, credit waits, lanes lost, statuses, the receive window."""
    def close(self) -> None:
        """Close every lane; waiting lookups return TRANSPORT. Idempotent."""

class Load:
    """One run of an open loop, from `grpc_load` or `lookup_load`."""

    def run(
        self,
        due_ns: NDArray[np.int64],
        request: NDArray[np.int32],
        sent_ns: NDArray[np.int64],
        done_ns: NDArray[np.int64],
        status: NDArray[np.int32],
        drain_ns: int,
    ) -> dict[str, int]:
        """Send request `request[i]` at `due_ns[i]` (from the start, ascending); once per object. GIL released throughout.

        sent_ns, done_ns, status: written as things happen, and may be read meanwhile; an entry is final once its status is not -1.
        Returns when all is over, at the latest `drain_ns` after the last was due: start_ns (monotonic clock), most_outstanding,
        most_bytes, reconnects. `NativeError` TRANSPORT where nobody is there to begin with.
        """
    def stop(self) -> None:
        """Any thread: `run` returns soon."""
    def examples(self) -> dict[int, str]:
        """The first message of each status that came with one. After `run`."""

def grpc_load_unavailable() -> str:
    """Why there is no `grpc_load` in this process, and what to do about it; empty where there is."""

def grpc_load(
    *,
    host: str,
    port: int,
    path: str,
    messages: Sequence[tuple[bytes, int]],
    deadline_ns: int,
    words: Sequence[str],
    connections: int,
    memory_bytes: int,
    spin_us: int,
) -> Load:
    """Unary gRPC calls of `/package.Service/Method`, from the one thread that calls `run`. `NativeError` for a name that is none.

    messages: a serialised request, and where in it each call's deadline goes, or -1: eight bytes of a protobuf integer, which
    become the microseconds since 1970 when `deadline_ns` have passed since the call was due.
    Statuses are gRPC's codes, plus 256 * (1 + i) where the error's message has `[words[i]] ` in it; or 100: connection lost,
    101: malformed reply, 102: unanswered, 103: not sent, since calls outstanding took `memory_bytes`. Copies the messages.
    """

def lookup_load(
    client: LookupClient,
    parts: list[tuple[NDArray[np.int64] | NDArray[np.int32], NDArray[np.int32] | None, NDArray[np.float32] | None]],
    *,
    callers: int,
    budget_ns: int,
    priority: int,
    spin_us: int,
) -> Load:
    """Lookups of one part each (see `LookupClient.lookup`) with fp32 results, from `callers` native threads.

    budget_ns: of each, from when it was due. Statuses are `Status`, or 103: the run ended before. Keeps the parts.
    """

def reason_text(reason: int) -> str:
    """A sentence template for a verdict's reason number, with {feature}, {bag} and {value} to fill in."""

def end_with_parent(grace_s: float) -> None:
    """End this process `grace_s` after its parent has ended, without the GIL and whatever its threads wait for."""

def crc32c(data: Any, seed: int = 0) -> int:
    """CRC-32C of a contiguous buffer (bytes, memoryview, array), continuing from `seed`; GIL released."""

def inspect_frame(frame: bytes) -> dict[str, Any]:
    """Decode one request or response frame into plain data (golden tests, debugging); `NativeError` FRAME if invalid."""
