"""`sidepool sidecar migrate`: moving a lane by hand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from sidepool.sidecar.grpc_errors import CODE_KEY
from sidepool.wire.control_pb2 import MigrateRequest
from sidepool.wire.control_pb2_grpc import SidecarStub
from sidepool.wire.errors import ConfigError, SidepoolError, error_with_code

# The call returns when the move has begun, which takes a few system calls.
TIMEOUT_S = 10.0


@dataclass(frozen=True)
class ClientTls:
    """PEM files for a control plane under TLS."""

    ca: Path | None
    cert: Path | None
    key: Path | None

    def channel(self, address: str) -> grpc.Channel:
        if self.ca is None:
            return grpc.insecure_channel(address)
        try:
            ca, key, cert = (None if file is None else file.read_bytes() for file in (self.ca, self.key, self.cert))
        except OSError as e:
            raise ConfigError(f"tls: cannot be read: {e}") from e
        return grpc.secure_channel(address, grpc.ssl_channel_credentials(ca, key, cert))


def migrate(address: str, lane: int, engine: int, tls: ClientTls) -> None:
    """Ask the sidecar at `address` to move `lane` to `engine`; raises what it answers."""
    with tls.channel(address) as channel:
        try:
            SidecarStub(channel).Migrate(MigrateRequest(lane=lane, engine=engine), timeout=TIMEOUT_S)  # type: ignore[no-untyped-call]
        except grpc.RpcError as e:
            raise fault_of(e, address) from e


def fault_of(error: Any, address: str) -> SidepoolError:
    """The error that the sidecar sent the code of; a call that never came there is a transport error."""
    code = next((str(value) for key, value in error.trailing_metadata() or () if key == CODE_KEY), "TRANSPORT")
    return error_with_code(code, f"{address}: {error.details()}")
