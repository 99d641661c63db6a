"""`EmbeddingClient`: pooled embedding vectors of a plan's features, from its sidecars or from this process."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from sidepool import _native
from sidepool.client import arguments
from sidepool.client.arguments import Part
from sidepool.client.connection import Connection, Connections
from sidepool.client.lanes import DEFAULT_MAX_IDS, DEFAULT_WINDOW_DELAY_US, Lane, LaneOptions, PoolingPlace, TlsFiles
from sidepool.client.timings import Timings, read_timings
from sidepool.client.trace import parse_traceparent
from sidepool.wire.errors import SidepoolError, Status, error_for
from sidepool.wire.model import OutputDtype
from sidepool.wire.plan import Plan, Pooling, validate_plan
from sidepool.wire.plan_source import FilePlanSource, PlanSource
from sidepool.wire.rdma import RdmaPath

# Long enough for any healthy lookup (tens of milliseconds), short enough that a caller who gave no budget is not stuck.
DEFAULT_DEADLINE_MS = 1000.0
# What a sidecar on the same machine or in the same rack takes; longer spinning steals the core from the dense net.
DEFAULT_SPIN_US = 50

# Reasons whose sentences leave room for what is allowed (native/core/status.hpp).
_ID_OUT_OF_RANGE = 1
_LENGTHS_NOT_BATCHES = 5
_TOO_FEW_COLUMNS = 10

_FAULTS = {
    Status.OVERLOADED: "no credit was free within the budget",
    Status.DRAINING: "it is draining and takes no new lookups",
    Status.DEADLINE: "the budget ran out",
    Status.TRANSPORT: "it was not connected, or was lost",
    Status.FRAME: "what it sent is not a valid frame",
    Status.PLAN: "it serves another plan epoch",
}


@dataclass(frozen=True, slots=True)
class Pooled:
    """What a lookup gives back. The arrays belong to the caller."""

    out: NDArray[Any]
    """`[batch, Σ dim]`, the pooled features in plan order (`Plan.out_columns` says where each lies); float32, or what the
    lookup asked for: float16, or bfloat16 as its bits, uint16."""
    sequences: dict[str, NDArray[Any]]
    """Per feature with pooling `none`: its rows `[ids of the feature, dim]`, bag after bag, of the same dtype."""
    degraded: tuple[str, ...]
    """Features whose sidecar did not answer and that are zero, under `on_missing_shard: degrade`."""


@dataclass(frozen=True, slots=True)
class PartsResult:
    """What `lookup_parts` gives back. The arrays belong to the caller."""

    out: NDArray[Any]
    """`[ΣB, Σ dim]`: the samples of all parts one after another; those of a refused part are zero. Dtype as in `Pooled`."""
    sequences: tuple[NDArray[Any], ...]
    """Per feature with pooling `none`, in feature order: `[ids of the feature in all parts, dim]`, refused parts' rows zero."""
    errors: Sequence[SidepoolError | None]
    """Per part: why it was refused, or None."""
    degraded: tuple[str, ...]
    raw_timings: NDArray[np.int64] = field(repr=False)
    """`[1 + sidecars, 6]`, see `sidepool._native.LookupClient.lookup`."""
    sidecars: tuple[str, ...] = field(repr=False)
    """Their names, in the order of the plan that the lookup was under (one, `local`, on the local lane)."""

    @property
    def timings(self) -> Timings:
        return read_timings(self.raw_timings)


class _Buffers(threading.local):
    """What the native core writes besides the output, kept per thread: a lookup allocates nothing for it."""

    verdicts: NDArray[np.int64] = np.zeros((0, 5), np.int64)


class EmbeddingClient:
    """Looks bags of ids up and returns pooled vectors. Thread-safe: any number of threads may look up at once.

    Use `connect`, then `close` (or a `with` block). Lost sidecars are reconnected in the background. A client must not
    be used in a forked child: its native threads live in the parent only. Fork first, or use the spawn start method.
    """

    @classmethod
    def connect(
        cls,
        plan: Plan | Path | str | PlanSource,
        *,
        lane: Lane = "auto",
        spin_us: int = DEFAULT_SPIN_US,
        shards_dir: Path | str | Sequence[Path | str] | None = None,
        tls: TlsFiles | None = None,
        connect_timeout_s: float = 5.0,
        require_all: bool = True,
        fixed_columns: Sequence[tuple[int, int]] | None = None,
        name: str = "",
        verify: bool = True,
        rdma: RdmaPath | None = None,
        rdma_engines: int = 1,
        pooling: PoolingPlace = "sidecar",
        hedge_budget: float = 0.0,
        window_delay_us: int = DEFAULT_WINDOW_DELAY_US,
        max_ids: int = DEFAULT_MAX_IDS,
        address_of: Callable[[str], str | None] | None = None,
    ) -> Self:
        """Connect to every sidecar of `plan` (or map its shards, with `lane="local"`).

        plan: a `Plan` stays what it is. A plan file, or another `PlanSource` (which the client then owns), is followed: when it
          changes, new lookups use the new plan as soon as all its sidecars are ready, while those under way end under the old
          one. Not on the local lane.
        lane: `shm` (same host), `tcp`, `rdma` (RoCE, InfiniBand), `grpc` (any network), `local` (the tables in this process,
          from `shards_dir`), or `auto`: shm to sidecars of this host, tcp to the others.
        spin_us: microseconds a waiting lookup spins before it sleeps.
        shards_dir: local lane: shard directories, or one directory that holds them. `verify` compares their checksums.
        require_all: raise where a sidecar is down; False keeps trying in the background instead.
        fixed_columns: columns `[begin, end)` of each feature in the id matrices of `lookup_fixed`; default: feature i is column i.
        name: appears in the sidecars' logs.
        rdma: device and path of the rdma lanes; rdma_engines: native threads that post and poll for them.
        pooling: `sidecar`: each sidecar pools the rows it holds; `ranker`: rows travel and are pooled here (for comparison).
        hedge_budget: share of subrequests that may be sent to a second replica once the first takes longer than its 95th
          percentile; 0: only when it has failed, or taken half of the budget.
        window_delay_us: tcp and rdma lanes: how much longer than twice its least an answer may be on the network before fewer
          bytes are asked for at once, from all sidecars together (docs/deadlines.md); 0: no such window.
        max_ids: ids of all lookups under way; a lookup beyond them is refused with `Overloaded`, unless it is alone. 0: no bound.
        address_of: where a sidecar is now, by name (`EtcdMembers.address`); None from it, or None: where the plan has it.

        Raises `TransportError` (a sidecar is down, named), `PlanError` (it serves another plan), `ShardCorrupt`, `ConfigError`.
        """
        source = None
        if isinstance(plan, Plan):
            validate_plan(plan)
        else:
            source = FilePlanSource(Path(plan)) if isinstance(plan, str | Path) else plan
            plan = source.read()
        directories = (
            [] if shards_dir is None else [Path(shards_dir)] if isinstance(shards_dir, str | Path) else map(Path, shards_dir)
        )
        options = LaneOptions(
            lane=lane,
            shards=tuple(directories),
            verify=verify,
            tls=tls,
            connect_timeout_s=connect_timeout_s,
            require_all=require_all,
            name=name,
            rdma=rdma or RdmaPath(),
            rdma_engines=rdma_engines,
            pooling=pooling,
            hedge_budget=hedge_budget,
            window_delay_us=window_delay_us,
            max_ids=max_ids,
            address_of=address_of,
        )
        return cls(plan, options, spin_us=spin_us, fixed_columns=fixed_columns, source=None if lane == "local" else source)

    def __init__(
        self,
        plan: Plan,
        options: LaneOptions,
        *,
        spin_us: int,
        fixed_columns: Sequence[tuple[int, int]] | None = None,
        source: PlanSource | None = None,
    ) -> None:
        self._connections = Connections(plan, options, spin_us, fixed_columns, source)
        self._buffers = _Buffers()
        # A client that nobody closes: its threads would hold native objects beyond the interpreter's end.
        weakref.finalize(self, _close_forgotten, self._connections, os.getpid())

    @property
    def plan(self) -> Plan:
        """The plan that new lookups are under."""
        return self._connections.current.plan

    @property
    def native(self) -> _native.LookupClient:
        """The native client under the present plan, for benchmarks; closed when the plan changes, or with this client."""
        return self._connections.current.native

    def lookup(
        self,
        values: Any,
        lengths: Any,
        weights: Any = None,
        out: NDArray[Any] | None = None,
        *,
        output_dtype: OutputDtype | None = None,
        deadline_ms: float = DEFAULT_DEADLINE_MS,
        priority: int = 0,
        traceparent: str | None = None,
    ) -> Pooled:
        """Look up bags in TorchRec's jagged layout.

        values: row ids, int64 or int32 `[nnz]`, feature after feature, bag after bag.
        lengths: ids per bag, int32 (or int64), `[features, batch]` or the same flat.
        weights: float32 `[nnz]`; required when a feature of the plan is weighted.
        out: `[batch, Σ dim]` with contiguous rows to write into (pinned memory, say); default: a new array.
        output_dtype: `fp32`, `fp16` or `bf16`; default: what `out` is (float32, float16, or uint16: bfloat16's bits), else
          fp32. The results travel as they are asked for, so the 16-bit ones take half the bytes.
        deadline_ms: budget; what cannot be done within it fails with `DeadlineExceeded`, as soon as that is known. priority: the
          higher goes first wherever lookups wait; among equals the earlier deadline.
        traceparent: W3C trace context passed on to the sidecars; a malformed one is ignored.

        Raises `LookupRejected`, `Overloaded`, `DeadlineExceeded`, `TransportError`.
        """
        ids = arguments.id_values(values)
        part = (ids, arguments.bag_lengths(lengths, len(self.plan.features)), arguments.bag_weights(weights))
        return self._pooled(part, out, output_dtype, deadline_ms, priority, traceparent)

    def lookup_fixed(
        self,
        ids: Any,
        out: NDArray[Any] | None = None,
        *,
        output_dtype: OutputDtype | None = None,
        deadline_ms: float = DEFAULT_DEADLINE_MS,
        priority: int = 0,
        traceparent: str | None = None,
    ) -> Pooled:
        """Look up an id matrix, int64 or int32 `[batch, width]`; else as `lookup`. `connect` says which columns are whose."""
        return self._pooled((arguments.id_matrix(ids), None, None), out, output_dtype, deadline_ms, priority, traceparent)

    def lookup_parts(
        self,
        parts: Sequence[Part],
        out: NDArray[Any] | None = None,
        *,
        output_dtype: OutputDtype | None = None,
        deadline_ms: float = DEFAULT_DEADLINE_MS,
        priority: int = 0,
        traceparent: str | None = None,
    ) -> PartsResult:
        """Look many requests up in one native call; one bad part does not fail the others.

        parts: see `sidepool.client.arguments.Part`; contiguous arrays of exactly these dtypes, nothing is converted.
        out: `[ΣB, Σ dim]`, rows of any stride; default: a new array. output_dtype: as in `lookup`.

        Raises `Overloaded`, `DeadlineExceeded`, `TransportError` for the whole, and `LookupRejected` for arrays of wrong type.
        """
        connection = self._connections.enter()
        try:
            return self._lookup_parts(
                connection, parts, out, output_dtype, arguments.deadline_ns(deadline_ms), priority, traceparent
            )
        finally:
            connection.under_way.pop()

    def _lookup_parts(
        self,
        connection: Connection,
        parts: Sequence[Part],
        out: NDArray[Any] | None,
        output_dtype: OutputDtype | None,
        budget_ns: int,
        priority: int,
        traceparent: str | None,
    ) -> PartsResult:
        plan = connection.plan
        features = len(plan.features)
        try:
            if out is None or output_dtype is not None:
                batch = sum(p[0].shape[0] if p[1] is None else p[1].size // features for p in parts)
                out = arguments.output(out, batch, plan.out_dim, output_dtype)
            sequences = _new_sequences(connection, parts, out.dtype) if connection.sequence_features else ()
            verdicts = self._verdicts(len(parts))
            raw_timings = np.empty((1 + len(connection.peers), 6), np.int64)
            status, peer = connection.native.lookup(
                parts, out, sequences, budget_ns, priority, parse_traceparent(traceparent), verdicts, raw_timings
            )
        except (TypeError, ValueError, AttributeError, IndexError) as fault:
            raise arguments.explain_parts(parts, features, fault) from fault
        if status:
            raise error_for(status, _fault_text(connection, status, peer))
        errors: Sequence[SidepoolError | None] = [None] * len(parts)
        if verdicts[:, 0].any():
            errors = [_verdict_error(connection, verdict) for verdict in verdicts.tolist()]
            sequences = tuple(
                _spread(connection, i, rows, parts, errors) for i, rows in zip(connection.sequence_features, sequences, strict=True)
            )
        degraded = tuple(plan.features[i].name for i in connection.native.degraded()) if connection.degrades else ()
        return PartsResult(out, sequences, errors, degraded, raw_timings, connection.sidecars)

    def stats(self) -> dict[str, Any]:
        """Counters since the lanes of the present plan were connected, see docs/metrics.md."""
        return self._connections.current.native.stats()

    def close(self) -> None:
        """Close every lane and stop reconnecting; lookups that wait fail with `TransportError`. Idempotent."""
        self._connections.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _pooled(
        self,
        part: Part,
        out: Any,
        output_dtype: OutputDtype | None,
        deadline_ms: float,
        priority: int,
        traceparent: str | None,
    ) -> Pooled:
        batch = part[0].shape[0] if part[1] is None else part[1].size // len(self.plan.features)
        result = self.lookup_parts(
            [part],
            arguments.output(out, batch, self.plan.out_dim, output_dtype),
            deadline_ms=deadline_ms,
            priority=arguments.priority_level(priority),
            traceparent=traceparent,
        )
        if result.errors[0] is not None:
            raise result.errors[0]
        sequences: dict[str, NDArray[Any]] = {}
        if result.sequences:
            names = [f.name for f in self.plan.features if f.pooling is Pooling.NONE]
            sequences = dict(zip(names, result.sequences, strict=True))
        return Pooled(result.out, sequences, result.degraded)

    def _verdicts(self, count: int) -> NDArray[np.int64]:
        verdicts = self._buffers.verdicts
        if verdicts.shape[0] < count:
            verdicts = self._buffers.verdicts = np.zeros((2 * count, 5), np.int64)
        return verdicts[:count]


def _close_forgotten(connections: Connections, owner_pid: int) -> None:
    """Close at the end of the client or of its process; a forked child must leave its parent's lanes alone."""
    if os.getpid() == owner_pid:
        connections.close()


def _new_sequences(connection: Connection, parts: Sequence[Part], dtype: np.dtype[Any]) -> tuple[NDArray[Any], ...]:
    """One array per `none` feature, as long as its ids in all parts."""
    return tuple(
        np.empty((sum(_ids_of(connection, i, part) for part in parts), connection.plan.feature_tables[i].dim), dtype)
        for i in connection.sequence_features
    )


def _ids_of(connection: Connection, feature: int, part: Part) -> int:
    """Ids of one feature in a part; for lengths that are wrong, no more than the part has ids."""
    values, lengths, _ = part
    if lengths is None:
        begin, end = connection.columns[feature]
        return values.shape[0] * (end - begin)
    batch = lengths.size // len(connection.plan.features)
    lengths = lengths[feature * batch : (feature + 1) * batch]
    return min(int(np.maximum(lengths, 0).sum(dtype=np.int64)), values.size)


def _spread(
    connection: Connection, feature: int, rows: NDArray[Any], parts: Sequence[Part], errors: Sequence[SidepoolError | None]
) -> NDArray[Any]:
    """`rows` with zeros where refused parts would be: the core leaves these out, callers count on every part's place."""
    spread = np.zeros_like(rows)
    read = write = 0
    for part, error in zip(parts, errors, strict=True):
        count = _ids_of(connection, feature, part)
        if error is None:
            spread[write : write + count] = rows[read : read + count]
            read += count
        write += count
    return spread


def _verdict_error(connection: Connection, verdict: list[int]) -> SidepoolError | None:
    status, reason, feature, bag, value = verdict
    if not status:
        return None
    features = connection.plan.features
    allowed: object = ""
    if reason == _ID_OUT_OF_RANGE:
        allowed = f"0 to {connection.plan.feature_tables[feature].rows - 1}"
    elif reason == _LENGTHS_NOT_BATCHES:
        allowed = len(features)
    elif reason == _TOO_FEW_COLUMNS:
        allowed = max(end for _, end in connection.columns)
    name = features[feature].name if feature >= 0 else ""
    return error_for(status, _native.reason_text(reason).format(feature=name, bag=bag, value=value, allowed=allowed))


def _fault_text(connection: Connection, status: int, peer: int) -> str:
    if status == Status.OVERLOADED and peer < 0:
        return "lookup: as many ids are being looked up as this client admits (max_ids)"
    what = _FAULTS.get(Status(status), "the lookup failed there") if status in Status.__members__.values() else "unknown status"
    where = connection.peers[peer] if 0 <= peer < len(connection.peers) else "lookup"
    return f"{where}: {what}"
