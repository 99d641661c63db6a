"""The gRPC control plane, the grpc lane, health and reflection, on one port."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from concurrent import futures
from dataclasses import asdict
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

import sidepool
from sidepool import _native
from sidepool.sidecar import logs
from sidepool.sidecar.config import SidecarConfig, Tls, join_endpoint, split_endpoint
from sidepool.sidecar.grpc_errors import translated, translated_stream
from sidepool.sidecar.moving import Mover
from sidepool.sidecar.sending import Sender
from sidepool.sidecar.serving import CONTROL_SERVICE, Serving, State
from sidepool.wire import control_pb2, control_pb2_grpc
from sidepool.wire.control_channel import check_rate
from sidepool.wire.errors import ConfigError, FrameError, Overloaded, PlanError, Status
from sidepool.wire.plan import Plan, unpack_plan

# Control calls are rare and short; what these threads are for is the grpc lane, which is bound by memory, not by threads.
RPC_THREADS = 8
# Every ranker may hold a health Watch and a few calls; beyond this many the rest are refused at once (RESOURCE_EXHAUSTED)
# instead of queueing without bound.
RPCS_PER_LANE = 4
# What frame headers and protobuf framing may add to a slot's bytes; also lets Describe of 10,000 tables through.
MESSAGE_MARGIN_BYTES = 1 << 20
# A ranker presents its token right after Connect; ten seconds cover a machine under full load.
TOKEN_TTL_S = 10.0
TOKEN_BYTES = 16
MAX_CLIENT_CHARACTERS = 128
MAX_DRAIN_S = 3600.0
# A response that carries no pooled vectors is one header; only such a one can report a bad frame.
BARE_RESPONSE_BYTES = 128
# A peer that connects says hello (TLS, HTTP/2) at once; one that does not holds a descriptor for no longer than this. Ten
# seconds cover a machine under full load; gRPC's own two minutes would let strangers hold all descriptors.
HANDSHAKE_MS = 10_000
# Calls still open after the drain are health watches and stragglers; they get this long to see the end coming.
STOP_GRACE_S = 0.2


class ControlServicer(control_pb2_grpc.SidecarServicer):
    """`sidepool.v1.Sidecar`. Called on gRPC's threads."""

    def __init__(self, config: SidecarConfig, serving: Serving, mover: Mover) -> None:
        self._config = config
        self._serving = serving
        self._mover = mover
        self._sender = Sender(serving, config.move_rate)
        self.lane_addresses: dict[str, str] = {}
        """Address of each lane that is on, by kind; set once before the sidecar opens."""

    @translated
    def Describe(self, request: control_pb2.DescribeRequest, context: grpc.ServicerContext) -> control_pb2.DescribeReply:
        published = self._serving.published
        reply = control_pb2.DescribeReply(
            name=self._config.name,
            lanes=sorted(self.lane_addresses),
            version=sidepool.__version__,
            wire_version=_native.WIRE_VERSION,
            simd=_native.simd_level(),
            engines=self._config.engines,
            state=self._serving.state,
            slots=self._config.slots,
            request_bytes=self._config.request_slot_bytes,
            response_bytes=self._config.response_slot_bytes,
        )
        if published is not None:
            plan = published.plan
            reply.plan_epoch, reply.plan_fingerprint = plan.epoch, plan.fingerprint
            reply.huge_bytes = published.tables.huge_bytes
            for i, shard in plan.held_by(plan.sidecar_index[self._config.name]):
                table = plan.tables[i]
                held = reply.tables.add(name=table.name, rows=shard.row_count, dim=shard.column_count, bytes=shard.bytes(table))
                held.row_format = table.row_format
                held.rows_ahead = published.tables.rows_ahead(plan.first_shard[i] + shard.number)
                held.first_row, held.first_column = shard.rows[0], shard.columns[0]
        return reply

    @translated
    def Connect(self, request: control_pb2.ConnectRequest, context: grpc.ServicerContext) -> control_pb2.ConnectReply:
        plan = self._serving.require_published(request.plan_epoch).plan
        if self._serving.state is State.DRAINING:
            raise Overloaded(f"sidecar {self._config.name!r} is draining")
        self._check_peer(request, plan)
        config = self._config
        slots = min(request.slots or config.slots, config.slots)
        sizes = (config.request_slot_bytes, config.response_slot_bytes)
        token = rdma = b""
        if request.lane == "rdma":  # everything that a token would lead to is in the call already
            rdma = self._serving.server.connect_rdma(slots, *sizes, request.rdma)
        elif request.lane != "grpc":  # its frames come through Lookup: nobody presents a token
            token = secrets.token_bytes(TOKEN_BYTES)
            self._serving.server.expect(token, request.lane, slots, *sizes, TOKEN_TTL_S)
        logs.info("lane admitted", lane=request.lane, client=request.client, peer=context.peer(), slots=slots)
        return control_pb2.ConnectReply(
            token=token,
            address=self.lane_addresses[request.lane],
            slots=slots,
            request_bytes=sizes[0],
            response_bytes=sizes[1],
            rdma=rdma,
        )

    @translated
    def Stats(self, request: control_pb2.StatsRequest, context: grpc.ServicerContext) -> control_pb2.StatsReply:
        counters: dict[str, Any] = {"name": self._config.name, "state": self._serving.state, "stats": self._serving.server.stats()}
        counters["move"] = asdict(self._mover.counters())
        return control_pb2.StatsReply(json=json.dumps(counters))

    @translated
    def Drain(self, request: control_pb2.DrainRequest, context: grpc.ServicerContext) -> control_pb2.DrainReply:
        if not 0 <= request.timeout_s <= MAX_DRAIN_S:
            raise ConfigError(f"timeout_s: found {request.timeout_s}; allowed: 0 (drain_timeout_s) to {MAX_DRAIN_S}")
        logs.info("drain asked for", peer=context.peer())
        self._serving.begin_drain()
        timeout_s = request.timeout_s or self._config.drain_timeout_s
        return control_pb2.DrainReply(drained=self._serving.wait_idle(timeout_s, given_up=lambda: not context.is_active()))

    @translated
    def Migrate(self, request: control_pb2.MigrateRequest, context: grpc.ServicerContext) -> control_pb2.MigrateReply:
        self._serving.server.migrate(request.lane, request.engine)
        logs.info("lane moves", lane=request.lane, target=request.engine, peer=context.peer())
        return control_pb2.MigrateReply()

    @translated_stream
    def Fetch(self, request: control_pb2.FetchRequest, context: grpc.ServicerContext) -> Iterator[control_pb2.FetchChunk]:
        return self._sender.stream(request, context)

    @translated
    def Prepare(self, request: control_pb2.PrepareRequest, context: grpc.ServicerContext) -> control_pb2.MoveReply:
        check_rate("bytes_per_s", request.bytes_per_s)
        plan, present = unpack_plan(request.plan, "plan"), unpack_plan(request.present, "present plan")
        self._mover.prepare(plan, present, request.bytes_per_s)
        return self._mover.progress()

    @translated
    def Progress(self, request: control_pb2.ProgressRequest, context: grpc.ServicerContext) -> control_pb2.MoveReply:
        return self._mover.progress()

    @translated
    def Drop(self, request: control_pb2.DropRequest, context: grpc.ServicerContext) -> control_pb2.MoveReply:
        logs.info("drop asked for", plan=request.plan_fingerprint[:16], at_once=request.at_once, peer=context.peer())
        self._mover.drop(request.plan_fingerprint, at_once=request.at_once)
        return self._mover.progress()

    @translated
    def Lookup(self, request: control_pb2.LookupFrame, context: grpc.ServicerContext) -> control_pb2.LookupFrames:
        self._serving.require_published()
        frames = self._serving.server.serve(request.frame)
        # Other outcomes belong to the ranker's router; bytes that are no frame belong to whoever wrote this call.
        if len(frames) <= BARE_RESPONSE_BYTES and _native.inspect_frame(frames)["status"] == Status.FRAME:
            most = self._config.request_slot_bytes
            found = f"{len(request.frame)} bytes that are no request frame of wire version {_native.WIRE_VERSION}"
            raise FrameError(f"frame: found {found}; allowed: one such frame of at most {most} bytes")
        return control_pb2.LookupFrames(frames=frames)

    def _check_peer(self, request: control_pb2.ConnectRequest, plan: Plan) -> None:
        """Refuse a peer that could not be answered correctly, saying which side has what."""
        if request.lane not in self.lane_addresses:
            raise ConfigError(f"lane: found {request.lane!r}; allowed: {', '.join(sorted(self.lane_addresses))}")
        if request.wire_version != _native.WIRE_VERSION:
            raise ConfigError(f"wire_version: found {request.wire_version}; allowed: {_native.WIRE_VERSION}")
        if len(request.client) > MAX_CLIENT_CHARACTERS:
            raise ConfigError(f"client: found {len(request.client)} characters; allowed: at most {MAX_CLIENT_CHARACTERS}")
        if request.plan_epoch != plan.epoch:
            raise PlanError(f"plan_epoch: found {request.plan_epoch}; allowed: {plan.epoch} (what this sidecar serves)")
        if request.plan_fingerprint != plan.fingerprint:
            raise PlanError(
                f"plan_fingerprint: found {request.plan_fingerprint[:16]!r}…; allowed: {plan.fingerprint[:16]!r}… "
                f"(another plan has the same epoch {plan.epoch})"
            )


class ControlPlane:
    """The gRPC server. Created bound and answering; `stop` ends it."""

    def __init__(self, config: SidecarConfig, serving: Serving, mover: Mover) -> None:
        """Bind `listen.grpc`; raises `ConfigError` when the address is taken or the TLS files are unusable."""
        self.servicer = ControlServicer(config, serving, mover)
        self._threads = futures.ThreadPoolExecutor(RPC_THREADS, thread_name_prefix="rpc")
        options = [
            # Two processes sharing a port would answer for each other's shards: a taken port must be an error.
            ("grpc.so_reuseport", 0),
            ("grpc.server_handshake_timeout_ms", HANDSHAKE_MS),
            ("grpc.max_receive_message_length", config.request_slot_bytes + MESSAGE_MARGIN_BYTES),
            ("grpc.max_send_message_length", config.response_slot_bytes + MESSAGE_MARGIN_BYTES),
        ]
        most_rpcs = RPC_THREADS + RPCS_PER_LANE * config.max_lanes
        self._server = grpc.server(self._threads, options=options, maximum_concurrent_rpcs=most_rpcs)
        control_pb2_grpc.add_SidecarServicer_to_server(self.servicer, self._server)  # type: ignore[no-untyped-call]
        health_pb2_grpc.add_HealthServicer_to_server(serving.health, self._server)
        reflection.enable_server_reflection((CONTROL_SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)
        self.address = self._bind(config)
        """`host:port` actually bound."""
        self.servicer.lane_addresses["grpc"] = self.address
        self._server.start()

    def stop(self) -> None:
        """End every call and close the port. Idempotent."""
        self._server.stop(STOP_GRACE_S).wait()
        self._threads.shutdown(wait=False)

    def _bind(self, config: SidecarConfig) -> str:
        endpoint = config.listen.grpc
        credentials = server_credentials(config.tls) if config.tls is not None else None
        try:
            if credentials is None:
                port = self._server.add_insecure_port(endpoint)
            else:
                port = self._server.add_secure_port(endpoint, credentials)
        except RuntimeError:
            port = 0
        if port == 0:
            self.stop()
            unusable = "port taken, or not an address of this machine"
            if credentials is not None:
                unusable += ", or tls.cert and tls.key are no pair"
            raise ConfigError(f"listen.grpc: found {endpoint!r}: {unusable}; allowed: a free host:port")
        return join_endpoint(split_endpoint(endpoint)[0], port)


def server_credentials(tls: Tls) -> grpc.ServerCredentials:
    """Read the files of `tls`; raises `ConfigError` naming the one that cannot be read."""

    def read(field: str, file: str) -> bytes:
        try:
            return Path(file).read_bytes()
        except OSError as e:
            raise ConfigError(f"tls.{field}: found {file!r}: cannot be read: {e}") from e

    authority = read("client_ca", tls.client_ca) if tls.client_ca is not None else None
    pair = (read("key", tls.key), read("cert", tls.cert))
    return grpc.ssl_server_credentials([pair], root_certificates=authority, require_client_auth=authority is not None)
