"""The grpc lane: the frames of an external native lane, carried as unary calls. Slow, and works on any network."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import grpc

from sidepool import _native
from sidepool.wire.control_channel import CODE_KEY
from sidepool.wire.control_pb2 import ConnectReply, LookupFrame, LookupFrames
from sidepool.wire.control_pb2_grpc import SidecarStub
from sidepool.wire.errors import SidepoolError, Status, TransportError, error_with_code

# The native core keeps one bit per slot in a word.
MAX_SLOTS = 64
# A sidecar may grant more; this is what a message may weigh before gRPC's own copying dominates everything.
MAX_RESPONSE_BYTES = 8 << 20
# What frame headers add to a full response slot.
MESSAGE_MARGIN_BYTES = 1 << 20
# How long the pump sleeps in the core at a time; it also ends within this time when the lane is closed.
TAKE_S = 0.2
# What gRPC says where the other end accepts and hangs up at the first bytes, as one that wants TLS does.
_HUNG_UP = ("Socket closed", "Connection reset")
TLS_HINT = " (this client speaks no TLS; the sidecar may want it: tls=, or tls_ca in a ranker's parameters)"

_STATUS_OF_CODE = {
    "REJECTED": Status.REJECTED,
    "OVERLOADED": Status.OVERLOADED,
    "DEADLINE": Status.DEADLINE,
    "FRAME": Status.FRAME,
    "PLAN": Status.PLAN,
    "SHARD": Status.SHARD,
}
# What gRPC itself reports, without a code of ours.
_STATUS = {
    grpc.StatusCode.DEADLINE_EXCEEDED: Status.DEADLINE,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Status.OVERLOADED,
    grpc.StatusCode.INVALID_ARGUMENT: Status.FRAME,
}


class GrpcLane:
    """Takes request frames from the native client and delivers what the sidecar's `Lookup` returns.

    One thread takes; gRPC's own threads deliver. The native slots bound how many calls are under way. When the peer is
    lost the lane detaches itself, and whoever watches the lanes attaches a new one.
    """

    CHANNEL_OPTIONS = (("grpc.max_receive_message_length", MAX_RESPONSE_BYTES + MESSAGE_MARGIN_BYTES),)

    def __init__(
        self, native: _native.LookupClient, sidecar: int, channel: grpc.Channel, stub: SidecarStub, admitted: ConnectReply
    ) -> None:
        """Attach to `native` with the sizes the sidecar admitted, and start. The lane owns `channel` from then on."""
        self._native = native
        self._sidecar = sidecar
        self._channel = channel
        self._call: grpc.UnaryUnaryMultiCallable[LookupFrame, LookupFrames] = stub.Lookup
        self._ended = threading.Lock()  # taken once, by whoever ends the lane
        slots = min(admitted.slots, MAX_SLOTS)
        native.attach_external(sidecar, slots, admitted.request_bytes, min(admitted.response_bytes, MAX_RESPONSE_BYTES))
        self._pump = threading.Thread(target=self._run, name=f"sidepool-grpc-{sidecar}", daemon=True)
        self._pump.start()

    def close(self) -> None:
        """End the pump and the channel; calls under way are cancelled. Idempotent."""
        self._ended.acquire(blocking=False)
        self._channel.close()
        self._pump.join()

    def _run(self) -> None:
        while not self._ended.locked():
            taken = self._native.take(self._sidecar, TAKE_S)
            if taken is None:
                if not self._native.lane_alive(self._sidecar):  # closed or replaced: `take` would not wait any more
                    return
                continue
            ticket, frame, budget_ns = taken
            try:
                call = self._call.future(LookupFrame(frame=frame), timeout=budget_ns / 1e9)
            except ValueError:  # the channel was closed meanwhile
                self._native.deliver(self._sidecar, ticket, None, Status.TRANSPORT)
                return
            call.add_done_callback(partial(self._deliver, ticket))

    def _deliver(self, ticket: int, call: Any) -> None:
        """On one of gRPC's threads."""
        if call.code() is grpc.StatusCode.OK:
            self._native.deliver(self._sidecar, ticket, call.result().frames, Status.OK)
            return
        status = _STATUS_OF_CODE.get(sent_code(call)) or _STATUS.get(call.code(), Status.TRANSPORT)
        self._native.deliver(self._sidecar, ticket, None, status)
        if status is Status.TRANSPORT and self._ended.acquire(blocking=False):
            self._native.detach(self._sidecar)


def sent_code(call: Any) -> str:
    """The stable code in the trailing metadata of a failed call, or nothing."""
    return next((str(value) for key, value in call.trailing_metadata() or () if key == CODE_KEY), "")


def fault_of(error: Any, peer: str, *, plaintext: bool = False) -> SidepoolError:
    """The error of a failed control call to `peer`, over a `plaintext` channel or TLS, with what the sidecar said."""
    code, details = sent_code(error), error.details() or ""
    if code:
        return error_with_code(code, f"{peer}: {details}")
    hint = TLS_HINT if plaintext and any(words in details for words in _HUNG_UP) else ""
    return TransportError(f"{peer}: cannot be connected: {error.code().name.lower().replace('_', ' ')}: {details}{hint}")
