"""The lanes of a client: connecting one to every sidecar, and connecting it again when it is lost.

Control goes over gRPC (`Connect`: where to go and a token to show there), data over the lane itself.
"""

from __future__ import annotations

import ipaddress
import logging
import random
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import grpc

from sidepool import _native
from sidepool.client.grpc_lane import GrpcLane, fault_of
from sidepool.wire.control_pb2 import ConnectReply, ConnectRequest, DescribeRequest
from sidepool.wire.control_pb2_grpc import SidecarStub
from sidepool.wire.errors import ConfigError, PlanError, SidepoolError, TransportError, error_for
from sidepool.wire.plan import Plan
from sidepool.wire.rdma import RdmaPath
from sidepool.wire.shard_reader import build_table_set, shard_directories
from sidepool.wire.shards import MANIFEST_FILE

Lane = Literal["shm", "tcp", "grpc", "rdma", "local", "auto"]
PoolingPlace = Literal["sidecar", "ranker"]

# Retries begin well below a sidecar's restart time and never come further apart than lets lookups succeed again within
# a second of its return.
FIRST_RETRY_S = 0.02
LAST_RETRY_S = 0.3
# One attempt in the background: a peer that swallows packets must not hold up the others for long.
RETRY_TIMEOUT_S = 0.5
# How often an undisturbed supervisor looks up from waiting.
WATCH_S = 1.0
# Connecting is one round trip; more threads than this gain nothing even for hundreds of sidecars.
CONNECT_THREADS = 16
# A fifth of the tightest limit that published models have (5 ms, NCF), and above what waking a thread on a busy machine takes.
DEFAULT_WINDOW_DELAY_US = 1000
# Beyond a second no lookup is worth its answer.
MAX_WINDOW_DELAY_US = 1_000_000
# 128 MiB of ids: four times what the slots of a lane hold by default. More could only wait for a slot.
DEFAULT_MAX_IDS = 1 << 24
MAX_MAX_IDS = 1 << 40
# As many as a sidecar may have.
MAX_RDMA_ENGINES = 256
# What a sidecar takes as a client's name.
MAX_NAME_CHARACTERS = 128

_log = logging.getLogger("sidepool.client")


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files for a control plane under TLS. `cert` and `key` are this client's own, for mutual TLS."""

    ca: Path
    cert: Path | None = None
    key: Path | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        if (self.cert is None) != (self.key is None):
            raise ConfigError("tls: found only one of cert and key; allowed: both or none")
        try:
            ca, key, cert = (None if path is None else Path(path).read_bytes() for path in (self.ca, self.key, self.cert))
        except OSError as e:
            raise ConfigError(f"tls: cannot be read: {e}") from e
        return grpc.ssl_channel_credentials(root_certificates=ca, private_key=key, certificate_chain=cert)


@dataclass(frozen=True, slots=True)
class LaneOptions:
    """How a client reaches its sidecars; the fields are those of `EmbeddingClient.connect`."""

    lane: Lane = "auto"
    shards: tuple[Path, ...] = ()
    verify: bool = True
    tls: TlsFiles | None = None
    connect_timeout_s: float = 5.0
    require_all: bool = True
    name: str = ""
    rdma: RdmaPath = field(default_factory=RdmaPath)
    rdma_engines: int = 1
    pooling: PoolingPlace = "sidecar"
    hedge_budget: float = 0.0
    window_delay_us: int = DEFAULT_WINDOW_DELAY_US
    max_ids: int = DEFAULT_MAX_IDS
    address_of: Callable[[str], str | None] | None = None
    """Where a sidecar is now, by its name; None, or a None from it: where the plan has it. Any thread calls it."""

    def __post_init__(self) -> None:
        if self.lane not in get_args(Lane):
            raise ConfigError(f"lane: found {self.lane!r}; allowed: {', '.join(get_args(Lane))}")
        if self.lane == "local" and not self.shards:
            raise ConfigError("shards_dir: missing; lane 'local' maps the shards itself and needs their directories")
        if self.lane != "local" and self.shards:
            raise ConfigError(
                f"shards_dir: found {[str(s) for s in self.shards]} with lane {self.lane!r}; allowed: only with lane 'local'"
            )
        if self.pooling not in get_args(PoolingPlace):
            raise ConfigError(f"pooling: found {self.pooling!r}; allowed: {', '.join(get_args(PoolingPlace))}")
        if not 0 <= self.hedge_budget <= 1:
            raise ConfigError(f"hedge_budget: found {self.hedge_budget}; allowed: 0 to 1")
        if not 0 <= self.window_delay_us <= MAX_WINDOW_DELAY_US:
            raise ConfigError(f"window_delay_us: found {self.window_delay_us}; allowed: 0 (off) to {MAX_WINDOW_DELAY_US}")
        if not 0 <= self.max_ids <= MAX_MAX_IDS:
            raise ConfigError(f"max_ids: found {self.max_ids}; allowed: 0 (no bound) to {MAX_MAX_IDS}")
        if not self.connect_timeout_s > 0:
            raise ConfigError(f"connect_timeout_s: found {self.connect_timeout_s}; allowed: above 0")
        if not 1 <= self.rdma_engines <= MAX_RDMA_ENGINES:
            raise ConfigError(f"rdma_engines: found {self.rdma_engines}; allowed: 1 to {MAX_RDMA_ENGINES}")

    def peers(self, plan: Plan) -> list[str]:
        """What each native lane leads to, for messages."""
        if self.lane == "local":
            return ["this process"]
        return [f"sidecar {s.name!r} ({s.address})" for s in plan.sidecars]

    def check(self, plan: Plan) -> None:
        """Refuse what `plan` does not allow; raises `ConfigError`."""
        computed = [t.name for t in plan.tables if t.program is not None]
        if self.pooling == "ranker" and computed:
            raise ConfigError(f"pooling: found 'ranker'; allowed with programs in the plan ({computed[0]}): sidecar")

    def legs(self, plan: Plan) -> list[tuple[int, int, int, int, int, list[int], bool]]:
        """Every shard of every feature's table, and the native lanes that lead to it (`sidepool._native.LookupClient`)."""
        legs = []
        for i, feature in enumerate(plan.features):
            table = plan.table_index[feature.table]
            cut = plan.rows_cut(table)
            for s in plan.placed_shards[table]:
                holders = [0] if self.lane == "local" else list(s.sidecars)
                legs.append((i, s.columns[0], s.column_count, s.rows[0], s.number, holders, cut))
        return legs


class _Outage:
    """One sidecar's absence: when to try next, and what has been said about it."""

    def __init__(self) -> None:
        self.attempts = 0
        self.due = 0.0
        self._said: type[SidepoolError] | None = None

    def add(self, fault: SidepoolError) -> None:
        """Count a failed attempt; log the first of its kind. A wrong plan will not cure itself, so that is an error."""
        self.attempts += 1
        self.due = time.monotonic() + retry_delay_s(self.attempts)
        if type(fault) is not self._said:
            self._said = type(fault)
            level = logging.ERROR if isinstance(fault, PlanError) else logging.WARNING
            _log.log(level, "%s; trying again in the background", fault)


class Lanes:
    """Keeps one lane per sidecar attached to a native client. `connect` and `close` are called by its owner, once."""

    def __init__(self, native: _native.LookupClient, plan: Plan, options: LaneOptions) -> None:
        self._native = native
        self._plan = plan
        self._options = options
        self._peers = options.peers(plan)
        self._credentials = options.tls.credentials() if options.tls else None
        self._grpc_lanes: dict[int, GrpcLane] = {}
        self._stop = threading.Event()
        self._supervisor: threading.Thread | None = None

    def connect(self) -> None:
        """Attach every lane; raises what the first failing sidecar raised, unless `require_all` is off."""
        if self._options.lane == "local":
            self._native.attach_local(0, build_table_set(self._plan, self._shard_directories(), verify=self._options.verify))
            return
        count = len(self._peers)
        with ThreadPoolExecutor(min(count, CONNECT_THREADS), thread_name_prefix="sidepool-connect") as pool:
            faults = list(pool.map(self._try_attach, range(count), [self._options.connect_timeout_s] * count))
        for fault in faults:
            if isinstance(fault, PlanError) or (fault and self._options.require_all):
                raise fault
            if fault:
                _log.warning("%s; trying again in the background", fault)
        self._supervisor = threading.Thread(target=self._supervise, name="sidepool-lanes", daemon=True)
        self._supervisor.start()

    def close(self) -> None:
        """Stop reconnecting, close every lane and channel. Idempotent."""
        self._stop.set()
        self._native.close()
        if self._supervisor and self._supervisor is not threading.current_thread():
            self._supervisor.join()
        for lane in self._grpc_lanes.values():
            lane.close()

    def _supervise(self) -> None:
        outages: dict[int, _Outage] = {}
        while not self._stop.is_set():
            down = [s for s in range(len(self._peers)) if not self._native.lane_alive(s)]
            if not down:
                self._native.wait_lane_lost(WATCH_S)
                continue
            for sidecar in down:
                if sidecar not in outages and (why := self._native.stats()["lanes"][sidecar]["lost"]):
                    _log.warning("%s: lane lost: %s", self._peers[sidecar], why)
                outage = outages.setdefault(sidecar, _Outage())
                if time.monotonic() < outage.due or self._stop.is_set():
                    continue
                fault = self._try_attach(sidecar, RETRY_TIMEOUT_S)
                if fault is not None:
                    outage.add(fault)
                    continue
                _log.info("%s: connected again after %d failed attempts", self._peers[sidecar], outage.attempts)
                del outages[sidecar]
            if outages:
                self._stop.wait(max(min(outage.due for outage in outages.values()) - time.monotonic(), 0.0))

    def _try_attach(self, sidecar: int, timeout_s: float) -> SidepoolError | None:
        fault: SidepoolError | None = None
        for lane in self._candidates(sidecar):
            try:
                self._attach(sidecar, lane, timeout_s)
            except SidepoolError as e:
                fault = e
            else:
                return None
            if isinstance(fault, PlanError):
                break
        return fault

    def _address(self, sidecar: int) -> str:
        """Where a sidecar is now, as far as anybody says so; else where the plan has it."""
        known = self._plan.sidecars[sidecar]
        found = self._options.address_of(known.name) if self._options.address_of is not None else None
        return found or known.address

    def _candidates(self, sidecar: int) -> tuple[Lane, ...]:
        if self._options.lane != "auto":
            return (self._options.lane,)
        host, _ = split_address(self._address(sidecar))
        return ("shm", "tcp") if is_this_host(host) else ("tcp",)

    def _attach(self, sidecar: int, lane: Lane, timeout_s: float) -> None:
        peer, address = self._peers[sidecar], self._address(sidecar)
        channel = self._open_channel(address)
        kept = False
        try:
            stub = SidecarStub(channel)  # type: ignore[no-untyped-call]
            request = ConnectRequest(
                lane=lane,
                plan_epoch=self._plan.epoch,
                plan_fingerprint=self._plan.fingerprint,
                wire_version=_native.WIRE_VERSION,
                client=self._options.name[:MAX_NAME_CHARACTERS],
            )
            offer = self._offer_rdma(stub, timeout_s) if lane == "rdma" else None
            if offer is not None:
                request.rdma = offer.end
            reply: ConnectReply = stub.Connect(request, timeout=timeout_s)
            if lane == "grpc":
                if lost := self._grpc_lanes.pop(sidecar, None):
                    lost.close()
                self._grpc_lanes[sidecar] = GrpcLane(self._native, sidecar, channel, stub, reply)
                kept = True
            elif offer is not None:
                self._native.attach_rdma(sidecar, offer, reply.rdma)
            else:
                self._attach_native(sidecar, lane, reply, address, timeout_s)
        except grpc.RpcError as e:
            raise fault_of(e, peer, plaintext=self._credentials is None) from e
        except _native.NativeError as e:
            status, message = e.args
            raise error_for(status, f"{peer}: {lane} lane: {message}") from e
        finally:
            if not kept:
                channel.close()

    def _offer_rdma(self, stub: SidecarStub, timeout_s: float) -> _native.RdmaOffer:
        """This end of an rdma lane, with slots of the sidecar's sizes."""
        sizes = stub.Describe(DescribeRequest(), timeout=timeout_s)
        options, engines = self._options.rdma.native(), self._options.rdma_engines
        return self._native.offer_rdma(options, engines, sizes.slots, sizes.request_bytes, sizes.response_bytes)

    def _attach_native(self, sidecar: int, lane: Lane, reply: ConnectReply, address: str, timeout_s: float) -> None:
        if lane == "shm":
            self._native.attach_shm(sidecar, reply.address, reply.token, timeout_s)
            return
        host, port = split_address(reply.address)
        if _is_wildcard(host):
            host, _ = split_address(address)
        self._native.attach_tcp(sidecar, host, port, reply.token, timeout_s)

    def _open_channel(self, address: str) -> grpc.Channel:
        options = [
            # A fresh pool: a retry must really connect, not inherit the back-off of an earlier channel to the same address.
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.initial_reconnect_backoff_ms", int(FIRST_RETRY_S * 1000)),
            ("grpc.max_reconnect_backoff_ms", int(LAST_RETRY_S * 1000)),
            *GrpcLane.CHANNEL_OPTIONS,
        ]
        if self._credentials is None:
            return grpc.insecure_channel(address, options)
        return grpc.secure_channel(address, self._credentials, options)

    def _shard_directories(self) -> list[Path]:
        """Every directory with a manifest, at or below the given ones."""
        directories = shard_directories(self._plan, self._options.shards)
        count = len(self._plan.sidecars)
        if len(directories) != count:
            given = [str(shards) for shards in self._options.shards]
            found = f"{len(directories)} directories with a {MANIFEST_FILE} at or below {given}"
            raise ConfigError(f"shards_dir: found {found}; allowed: {count}, one per sidecar of the plan")
        return directories


def retry_delay_s(tries: int) -> float:
    """Seconds before the next attempt: exponential, capped, and jittered so that many clients do not come back at once."""
    return random.uniform(0.5, 1.0) * min(FIRST_RETRY_S * 2.0 ** min(tries - 1, 10), LAST_RETRY_S)


def split_address(address: str) -> tuple[str, int]:
    """`("host", port)` of `host:port`; an IPv6 host comes without its brackets."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise TransportError(f"address: found {address!r}; allowed: host:port")
    return host.removeprefix("[").removesuffix("]"), int(port)


def is_this_host(host: str) -> bool:
    """Whether `host` is certainly this machine: a loopback address or its own name."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        own = socket.gethostname()
        return host in ("localhost", own, own.partition(".")[0])


def _is_wildcard(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False
