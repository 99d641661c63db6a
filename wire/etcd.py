"""etcd's v3 API over gRPC, as far as coordination needs it: read, compare and swap, leases, watching.

Any thread may call. A call is tried at every endpoint in turn, beginning with the one that answered last.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import grpc
from google.protobuf.message import Message

from sidepool.wire import etcd_pb2 as pb
from sidepool.wire.errors import ConfigError, SidepoolError, TransportError

# A healthy cluster answers within milliseconds and elects a leader within a second or two.
CALL_TIMEOUT_S = 2.0
# A watch whose server has gone without a word is noticed after both. etcd refuses pings that come faster than every 5 s.
KEEPALIVE_MS, KEEPALIVE_TIMEOUT_MS = 6_000, 3_000
# Reconnecting to an endpoint that was lost: gRPC's own two minutes would keep a client out long after etcd's return.
FIRST_RECONNECT_MS, LAST_RECONNECT_MS = 100, 2_000
# What one attempt to connect may take, TLS included; below a call's time, so that the next endpoint gets its turn.
CONNECT_MS = 1_500
# etcd takes requests of up to 1.5 MiB by default; responses are as large as what was put, several under one prefix.
MAX_RESPONSE_BYTES = 64 << 20

_OPTIONS = [
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", FIRST_RECONNECT_MS),
    ("grpc.min_reconnect_backoff_ms", CONNECT_MS),
    ("grpc.max_reconnect_backoff_ms", LAST_RECONNECT_MS),
    ("grpc.keepalive_time_ms", KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    ("grpc.http2.ping_timeout_ms", KEEPALIVE_TIMEOUT_MS),  # what newer gRPC goes by, a minute by default
    # By default a quiet connection is asked twice and never again.
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", MAX_RESPONSE_BYTES),
]
# Another endpoint, or a later time, may do better.
_PASSING = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}
# etcd then ends the stream where its member has lost the majority, instead of being silent.
_NEEDS_LEADER = (("hasleader", "true"),)

Reply = TypeVar("Reply", bound=Message)
Answer = TypeVar("Answer")


class Snapshot:
    """What lay under a key or prefix at one revision."""

    def __init__(self, revision: int, items: Sequence[pb.KeyValue]) -> None:
        self.revision = revision
        self.items = {bytes(item.key).decode(errors="replace"): item for item in items}


class Etcd:
    """A cluster, reached through `endpoints` (`host:port`)."""

    def __init__(self, endpoints: Sequence[str], credentials: grpc.ChannelCredentials | None = None) -> None:
        """credentials: TLS towards etcd; None: plain text."""
        self.endpoints = tuple(endpoints)
        self._credentials = credentials
        self._channels: dict[str, grpc.Channel] = {}
        self._lock = threading.Lock()
        self._first = 0
        self._closed = False

    def read(self, key: str, *, prefix: bool = False) -> Snapshot:
        """What lies under `key`, or under all keys that begin with it. Raises `TransportError`, `ConfigError`."""
        request = pb.RangeRequest(key=key.encode(), range_end=_end(key) if prefix else b"")
        reply = self._call("/etcdserverpb.KV/Range", request, pb.RangeResponse)
        return Snapshot(reply.header.revision, reply.kvs)

    def swap(self, key: str, value: bytes, *, seen: int, lease: int = 0) -> bool:
        """Put `value` where `key` was last changed at revision `seen` (0: where it does not exist); whether it was."""
        compare = pb.Compare(target=pb.Compare.MOD, key=key.encode(), mod_revision=seen)
        put = pb.RequestOp(request_put=pb.PutRequest(key=key.encode(), value=value, lease=lease))
        request = pb.TxnRequest(compare=[compare], success=[put])
        return bool(self._call("/etcdserverpb.KV/Txn", request, pb.TxnResponse).succeeded)

    def grant(self, seconds: int) -> int:
        """A new lease; keys put with it vanish `seconds` after it was last kept alive."""
        return int(self._call("/etcdserverpb.Lease/LeaseGrant", pb.LeaseGrantRequest(TTL=seconds), pb.LeaseGrantResponse).ID)

    def keep_alive(self, lease: int) -> bool:
        """Begin the lease's time anew; False where it has run out."""

        def once(channel: grpc.Channel) -> bool:
            stub = channel.stream_stream(
                "/etcdserverpb.Lease/LeaseKeepAlive",
                request_serializer=pb.LeaseKeepAliveRequest.SerializeToString,
                response_deserializer=pb.LeaseKeepAliveResponse.FromString,
            )
            for reply in stub(iter([pb.LeaseKeepAliveRequest(ID=lease)]), timeout=CALL_TIMEOUT_S):
                return bool(reply.TTL > 0)
            raise TransportError("etcd: no answer to a sign of life")

        return self._try(once)

    def revoke(self, lease: int) -> None:
        """End a lease and remove its keys."""
        self._call("/etcdserverpb.Lease/LeaseRevoke", pb.LeaseRevokeRequest(ID=lease), pb.LeaseRevokeResponse)

    def changes(self, key: str, after: int, started: Callable[[grpc.Call], None], *, prefix: bool = False) -> Iterator[int]:
        """Revisions above `after` at which something under `key` changed, as they come. Ends where `after` has been compacted:
        read again, and go on from there. `started` gets the call, whose `cancel()` ends the iteration. Raises as `read`.
        """
        create = pb.WatchCreateRequest(key=key.encode(), range_end=_end(key) if prefix else b"", start_revision=after + 1)
        ended = threading.Event()

        def requests() -> Iterator[pb.WatchRequest]:
            yield pb.WatchRequest(create_request=create)
            ended.wait()  # a stream whose client has said its last word may be closed

        endpoint = self.endpoints[self._first % len(self.endpoints)]
        stub = self._channel(endpoint).stream_stream(
            "/etcdserverpb.Watch/Watch",
            request_serializer=pb.WatchRequest.SerializeToString,
            response_deserializer=pb.WatchResponse.FromString,
        )
        try:
            call = stub(requests(), metadata=_NEEDS_LEADER)
        except ValueError as e:  # closed between being taken and being used
            raise TransportError(f"etcd at {endpoint}: {e}") from e
        try:
            started(call)
            for reply in call:
                if reply.canceled and reply.compact_revision:
                    return
                if reply.canceled:
                    raise TransportError(f"etcd at {endpoint}: watch ended: {reply.cancel_reason}")
                if reply.events:
                    yield int(reply.header.revision)
            raise TransportError(f"etcd at {endpoint}: watch ended")
        except grpc.RpcError as e:
            self._first += 1
            raise _fault(e, endpoint) from e
        finally:
            ended.set()
            call.cancel()  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """End every call. Idempotent."""
        with self._lock:
            self._closed = True
            channels, self._channels = self._channels, {}
        for channel in channels.values():
            channel.close()

    def _call(self, method: str, request: Message, reply: type[Reply]) -> Reply:
        def once(channel: grpc.Channel) -> Reply:
            stub = channel.unary_unary(
                method, request_serializer=type(request).SerializeToString, response_deserializer=reply.FromString
            )
            answer: Reply = stub(request, timeout=CALL_TIMEOUT_S)
            return answer

        return self._try(once)

    def _try(self, once: Callable[[grpc.Channel], Answer]) -> Answer:
        """At every endpoint in turn, until one answers. What is called may be repeated without harm."""
        fault: SidepoolError | None = None
        for turn in range(len(self.endpoints)):
            number = (self._first + turn) % len(self.endpoints)
            endpoint = self.endpoints[number]
            try:
                answer = once(self._channel(endpoint))
            except grpc.RpcError as e:
                fault = _fault(e, endpoint)
                if not isinstance(fault, TransportError):
                    raise fault from e
            except ValueError as e:  # closed between being taken and being used
                raise TransportError(f"etcd at {endpoint}: {e}") from e
            else:
                self._first = number
                return answer
        assert fault is not None, "there is at least one endpoint"
        raise fault

    def _channel(self, endpoint: str) -> grpc.Channel:
        with self._lock:
            if self._closed:
                raise TransportError(f"etcd at {endpoint}: this client is closed")
            channel = self._channels.get(endpoint)
            if channel is None:
                if self._credentials is None:
                    channel = grpc.insecure_channel(endpoint, _OPTIONS)
                else:
                    channel = grpc.secure_channel(endpoint, self._credentials, _OPTIONS)
                self._channels[endpoint] = channel
            return channel


def _end(prefix: str) -> bytes:
    """The first key behind all that begin with `prefix`, whose last byte is below 255."""
    raw = prefix.encode()
    return raw[:-1] + bytes([raw[-1] + 1])


def _fault(error: grpc.RpcError, endpoint: str) -> SidepoolError:
    code = error.code() if isinstance(error, grpc.Call) else grpc.StatusCode.UNKNOWN
    said = error.details() if isinstance(error, grpc.Call) else str(error)
    kind = TransportError if code in _PASSING else ConfigError
    return kind(f"etcd at {endpoint}: {code.name}: {said}")
