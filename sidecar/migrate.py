"""`sidepool sidecar migrate`: moving a lane by hand."""

from __future__ import annotations

import grpc

from sidepool.wire.control_channel import ClientTls, fault_of
from sidepool.wire.control_pb2 import MigrateRequest
from sidepool.wire.control_pb2_grpc import SidecarStub

# The call returns when the move has begun, which takes a few system calls.
TIMEOUT_S = 10.0


def migrate(address: str, lane: int, engine: int, tls: ClientTls) -> None:
    """Ask the sidecar at `address` to move `lane` to `engine`; raises what it answers."""
    with tls.channel(address) as channel:
        try:
            SidecarStub(channel).Migrate(MigrateRequest(lane=lane, engine=engine), timeout=TIMEOUT_S)  # type: ignore[no-untyped-call]
        except grpc.RpcError as e:
            raise fault_of(e, address) from e
