"""`sidecar.yaml`: everything one sidecar process can be told. docs/sidecar.md is the reference for operators."""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from sidepool.wire.config import FormatVersion, Frozen, load_yaml
from sidepool.wire.control_channel import LEAST_BYTES_PER_S, MOST_BYTES_PER_S
from sidepool.wire.coordination import Coordination
from sidepool.wire.errors import ConfigError
from sidepool.wire.plan import Name
from sidepool.wire.rdma import RdmaPath, TrafficClass

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
# sockaddr_un has 108 bytes with the terminating zero; a longer path cannot be bound on Linux.
MAX_SOCKET_PATH_BYTES = 107


def split_endpoint(endpoint: str) -> tuple[str, int]:
    """`("host", port)` of a checked `host:port`; an IPv6 host comes without its brackets."""
    host, _, port = endpoint.rpartition(":")
    return host.removeprefix("[").removesuffix("]"), int(port)


def join_endpoint(host: str, port: int) -> str:
    """`host:port`, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_wildcard(host: str) -> bool:
    """Whether `host` means every address of the machine, which no peer can connect to as such."""
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def _check_endpoint(text: str) -> str:
    host, colon, port = text.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    bracketed = host.startswith("[") and host.endswith("]")
    if not colon or not bare or (":" in bare) != bracketed or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise PydanticCustomError("endpoint", "host:port, the port from 0 (any free one) to 65535, an IPv6 host in brackets")
    return text


def _check_socket_path(text: str) -> str:
    if not 0 < len(text.encode()) <= MAX_SOCKET_PATH_BYTES:
        raise PydanticCustomError("socket_path", "a path of 1 to {most} bytes", {"most": MAX_SOCKET_PATH_BYTES})
    return text


def _one_complaint(allowed: str) -> WrapValidator:
    """Of a union, say once what is allowed instead of once per member."""

    def check(value: Any, inner: ValidatorFunctionWrapHandler) -> Any:
        try:
            return inner(value)
        except ValidationError as e:
            raise PydanticCustomError("choice", "{allowed}", {"allowed": allowed}) from e

    return WrapValidator(check)


Endpoint = Annotated[str, AfterValidator(_check_endpoint)]
# Slots are mapped, so they are whole pages; below 64 KiB frames would be mostly header, above 1 GiB a length is a mistake.
SlotBytes = Annotated[int, Field(ge=64 * KIB, le=GIB, multiple_of=4096)]
SocketPath = Annotated[str, AfterValidator(_check_socket_path)]
# Linux has at most 1,024 nodes.
Numa = Annotated[
    Literal["auto", "off"] | Annotated[int, Field(ge=0, le=1023)],
    _one_complaint("'auto', 'off' or the number of a node, 0 to 1023"),
]
# Less than a cache line is none, and more than a level-2 cache is pushed out before its use.
LookaheadBytes = Annotated[Literal["auto"] | Annotated[int, Field(ge=64, le=MIB)], _one_complaint("'auto' or 64 to 1048576 bytes")]
MoveRate = Annotated[
    Literal["auto"] | Annotated[float, Field(ge=LEAST_BYTES_PER_S, le=MOST_BYTES_PER_S)],
    _one_complaint(f"'auto' or {LEAST_BYTES_PER_S} to {MOST_BYTES_PER_S} bytes per second"),
]
# Measured at 2.2 ms of one core per MB and direction: 1 % of a machine, which its median lookup does not notice.
MOVE_BYTES_PER_S_AND_CORE = 4_000_000.0


class _Documented(Frozen):
    """Field docstrings become the descriptions of the exported JSON Schema."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class TcpCredits(_Documented):
    """How much a tcp lane may have under way, and how that is told."""

    credits: Literal["dedicated", "piggybacked"] = "dedicated"
    """How credits travel: on a connection of their own per lane, where bulk data cannot delay them, or in frames."""
    window_bytes: Annotated[int, Field(ge=0, le=1 << 36)] = 0
    """Bytes of requests that a ranker may have under way on a lane, at least two slots. 0: four slots, what one large lookup
    keeps under way."""
    traffic_class: TrafficClass = 0
    """IP traffic class (DSCP times 4) of requests and responses, at both ends; 0 is best effort."""
    control_traffic_class: TrafficClass = 192
    """Traffic class of dedicated credits. 192 is DSCP CS6, network control, which switches queue before bulk data."""

    def native(self) -> dict[str, Any]:
        """As `sidepool._native` takes it."""
        return {**self.model_dump(exclude={"credits"}), "dedicated": self.credits == "dedicated"}


class RdmaListen(_Documented):
    """The rdma lane."""

    path: RdmaPath = RdmaPath()
    """Device and path."""
    piece_bytes: Annotated[int, Field(ge=4 * KIB, le=64 * MIB)] = 256 * KIB
    """Responses leave in writes of about this size while pooling goes on: large enough that a work request is a small part of
    its cost, small enough to overlap with the next tables (`sidepool bench rdma` measures it)."""
    credits: Literal["dedicated", "piggybacked"] = "dedicated"
    """How credits travel: on queue pairs of their own, where bulk data cannot delay them, or in frames."""

    def native(self) -> dict[str, Any]:
        """As `sidepool._native` takes it."""
        return {**self.path.native(), "piece_bytes": self.piece_bytes, "piggyback": self.credits == "piggybacked"}


class Listen(_Documented):
    """Where the sidecar listens. Only loopback unless another address is written down: the data lanes carry no encryption."""

    grpc: Endpoint = "127.0.0.1:50151"
    """Control plane and grpc lane, `host:port`. 50151 is nobody's assigned port and lies beside gRPC's customary 50051."""
    tcp: Endpoint | None = "127.0.0.1:0"
    """The tcp lane, `host:port`; null switches it off. Port 0 takes any free one: rankers learn it through `Connect`."""
    tcp_credits: TcpCredits = TcpCredits()
    """Credits of the tcp lane."""
    unix: SocketPath | None = None
    """Path of the Unix socket over which shm lanes are handed out. null: a socket in a private directory (mode 0700) made at
    start and removed at exit. Give a path on a shared volume when ranker and sidecar are two containers of one pod."""
    rdma: RdmaListen | None = None
    """The rdma lane; null: off. Its slots are registered, so every lane pins slots * (request_slot_bytes + response_slot_bytes)
    of memory for as long as it is open."""
    metrics: Endpoint | None = "127.0.0.1:0"
    """The Prometheus endpoint, `host:port`; null switches it off. The port is in the ready line."""


class Tls(_Documented):
    """TLS of the control plane. Paths are relative to the configuration file; the files are PEM."""

    cert: str
    """The server's certificate chain."""
    key: str
    """The private key of `cert`."""
    client_ca: str | None = None
    """Authorities whose certificates clients must present (mTLS). null: connections are encrypted, clients are not checked."""
    peer_ca: str | None = None
    """Authorities of the other sidecars' certificates, for fetching shards from them with `cert` as its own. null: `client_ca`."""


class Memory(_Documented):
    """Where the copies of the tables lie that `promote` makes."""

    huge_pages: Literal["transparent", "hugetlb", "off"] = "transparent"
    """transparent: memory that the kernel backs with huge pages where it can. hugetlb: 2 MiB pages reserved by the administrator
    (`sysctl vm.nr_hugepages`), taken before serving or the start is refused; a reload needs them for the old and the new tables at
    once. off: small pages."""
    numa: Numa = "auto"
    """auto: on a machine with several NUMA nodes, engines are bound to the nodes in turn and rows are spread over all nodes page by
    page, so that every memory controller takes its share whatever tables are hot. A number: engines and rows on that node, for one
    sidecar per node. off: as the kernel likes."""


class Pool(_Documented):
    """How rows are gathered."""

    lookahead_bytes: LookaheadBytes = "auto"
    """Bytes of rows between the start of a row's fetch and its use, kept within 4 to 128 rows. auto: measured at start for every
    row size, within 0.1 s, where the tables have 64 MiB or more, else 12 KiB. A matter of speed alone; a number repeats a run."""


class SidecarConfig(_Documented):
    """One sidecar process."""

    version: FormatVersion = 1
    """Version of this file's format."""
    name: Name
    """The name under which the plan knows this sidecar."""
    plan: Annotated[str, Field(min_length=1)] | None
    """The plan, relative to this file. null: start with nothing, and wait until `sidepool plan apply` brings shards."""
    shards: Annotated[str, Field(min_length=1)]
    """The directory that holds this sidecar's shards and their manifest, relative to this file. `sidepool plan apply` puts those
    of new plans beside it (`shards.epoch-7`)."""
    listen: Listen = Listen()
    """Addresses."""
    tls: Tls | None = None
    """TLS for the control plane (grpc lane included). null: plain text, fit for loopback and for meshes that encrypt themselves."""
    coordination: Coordination | None = None
    """Where several machines agree on the plan, and list themselves. null: `plan` alone says it."""
    engines: Annotated[int, Field(ge=1, le=256)] = 1
    """Native threads that serve the tcp, shm and rdma lanes. One gathers about as fast as one core can read memory; add engines
    when `engine_busy_seconds_total` nears 1 per second, up to the cores that rankers on the same machine leave free. Those with
    nothing to do help with large lookups of the others, so more engines also make one large lookup faster."""
    balance: bool = True
    """Move rdma and tcp lanes from an engine that is busy more than 70 % of the time to the least busy one, while requests flow.
    Nothing to do with one engine."""
    order: Literal["edf", "fcfs"] = "edf"
    """Which of the subrequests that wait is answered first. edf: the highest priority, then the earliest deadline, so that under
    load those that can still be in time are. fcfs: the first to come, whatever they say; for comparison. Either way, what cannot be
    in time is refused at once."""
    spin_us: Annotated[int, Field(ge=0, le=1_000_000)] = 5
    """Microseconds an idle engine spins before it sleeps. An idle spinning engine steals its core from a ranker beside it, so the
    default only bridges the gap between the pieces of one lookup. Where engines have cores of their own, 50 saves the 10 to
    30 µs that waking a sleeping thread takes."""
    slots: Annotated[int, Field(ge=1, le=64)] = 16
    """Credits per lane: frames in flight between one ranker and this sidecar. Rankers may ask for fewer. 16 keeps a core busy
    at the round-trip times of one data centre; more only lengthens the queue. At most 64: one bit each in a machine word."""
    request_slot_bytes: SlotBytes = 2 * MIB
    """Bytes of one request slot, whole pages: the largest request frame.
    2 MiB holds 250,000 ids; rankers cut larger lookups into chunks."""
    response_slot_bytes: SlotBytes = 8 * MIB
    """Bytes of one response slot, whole pages. 8 MiB holds 13 pooled features of dim 128 for 1,200 samples."""
    max_lanes: Annotated[int, Field(ge=1, le=65_536)] = 256
    """Lanes open at once; a further one is refused as retryable. Bounds memory to
    max_lanes * slots * request_slot_bytes (touched only as used)."""
    verify: bool = True
    """Compare every shard's CRC-32C with the manifest before serving. Reads each byte once: about a second per 10 GB and
    core when the files are cached, else as fast as the disk reads. false starts at once and finds bad bytes never."""
    promote: bool = True
    """Copy the mapped tables in the background while serving, into memory as `memory` says: random rows of huge pages cost one TLB
    miss less. Needs
    the tables' bytes of memory beside the page cache; false where that is not there."""
    memory: Memory = Memory()
    """Placement of the tables."""
    pool: Pool = Pool()
    """Gathering."""
    drain_timeout_s: Annotated[float, Field(gt=0, le=3600)] = 20.0
    """Seconds that in-flight lookups get to finish after SIGTERM. Kubernetes kills after 30 by default; 20 leaves room."""
    previous_epoch_s: Annotated[float, Field(ge=0, le=86_400)] = 60.0
    """Seconds that the plan before the present one goes on being answered after a reload, for rankers that have not switched; both
    are held meanwhile. A minute lets a rollout of rankers finish."""
    move_bytes_per_s: MoveRate = "auto"
    """Bytes per second that shards move at, in and out, where `sidepool plan apply` names no rate. auto: 4 MB/s for each usable
    core, which takes about 1 % of the processor for each direction, so that the median lookup does not notice; 460 GB an
    hour on 32 cores."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe level that is logged. SIGHUP applies a change."""

    @property
    def move_rate(self) -> float:
        """`move_bytes_per_s` as a number."""
        found = self.move_bytes_per_s
        return MOVE_BYTES_PER_S_AND_CORE * len(os.sched_getaffinity(0)) if found == "auto" else float(found)

    @model_validator(mode="after")
    def _check_promotion(self) -> Self:
        if self.memory.huge_pages == "hugetlb" and not self.promote:
            raise PydanticCustomError("promotion", "memory.huge_pages hugetlb only with promote true")
        return self


def load_sidecar_config(path: Path) -> SidecarConfig:
    """Read `sidecar.yaml`; the paths in the result are absolute. Raises `ConfigError`."""
    config = load_yaml(path, SidecarConfig)
    base = path.resolve().parent
    tls = config.tls
    if tls is not None:
        files = {key: str(base / file) for key, file in tls.model_dump().items() if file is not None}
        tls = tls.model_copy(update=files)
    listen = config.listen
    if listen.unix is not None:
        unix = str(base / listen.unix)
        if len(unix.encode()) > MAX_SOCKET_PATH_BYTES:
            raise ConfigError(f"{path}: listen.unix: found {unix!r}; allowed: at most {MAX_SOCKET_PATH_BYTES} bytes, made absolute")
        listen = listen.model_copy(update={"unix": unix})
    plan = None if config.plan is None else str(base / config.plan)
    coordination = config.coordination and config.coordination.relative_to(base)
    absolute = {"plan": plan, "shards": str(base / config.shards), "tls": tls, "listen": listen, "coordination": coordination}
    return config.model_copy(update=absolute)


def schema() -> dict[str, Any]:
    """JSON Schema of `sidecar.yaml`."""
    return SidecarConfig.model_json_schema()
