"""Calls from tools, and from other sidecars, to a sidecar's control plane."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from sidepool.wire.errors import ConfigError, SidepoolError, error_with_code

# Trailing metadata of every failed call: the stable code, for clients that match on it rather than on the gRPC status.
CODE_KEY = "sidepool-code"
# A sidecar that starts again is found within a second or two of its return; gRPC's own two minutes are for busy services.
FIRST_RETRY_MS, LAST_RETRY_MS = 100, 2000
# Bytes per second of a move. Slower, one block would hold up all other moves of its sidecar for long; faster is no network.
LEAST_BYTES_PER_S, MOST_BYTES_PER_S = 1_000_000, 100_000_000_000


def check_rate(field: str, bytes_per_s: float) -> None:
    """Refuse a rate that no move can have: `ConfigError`. 0: each sidecar's own."""
    if bytes_per_s != 0 and not LEAST_BYTES_PER_S <= bytes_per_s <= MOST_BYTES_PER_S:
        allowed = f"{LEAST_BYTES_PER_S} to {MOST_BYTES_PER_S}, or 0 for move_bytes_per_s"
        raise ConfigError(f"{field}: found {bytes_per_s}; allowed: {allowed}")


@dataclass(frozen=True)
class ClientTls:
    """PEM files for a control plane under TLS; all None: plain text."""

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None

    def channel(self, address: str) -> grpc.Channel:
        """A channel of its own, to be closed by the caller. Raises `ConfigError` for files that cannot be read."""
        # A fresh pool: a new call must really connect, not inherit the back-off of an earlier channel to the same address.
        options = [
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.initial_reconnect_backoff_ms", FIRST_RETRY_MS),
            ("grpc.max_reconnect_backoff_ms", LAST_RETRY_MS),
        ]
        if (self.cert is None) != (self.key is None) or (self.ca is None and self.cert is not None):
            found = [name for name in ("ca", "cert", "key") if getattr(self, name) is not None]
            raise ConfigError(f"tls: found {', '.join(found)} alone; allowed: ca, or ca, cert and key, or none of them")
        if self.ca is None:
            return grpc.insecure_channel(address, options)
        try:
            ca, key, cert = (None if file is None else file.read_bytes() for file in (self.ca, self.key, self.cert))
        except OSError as e:
            raise ConfigError(f"tls: cannot be read: {e}") from e
        return grpc.secure_channel(address, grpc.ssl_channel_credentials(ca, key, cert), options)


def fault_of(error: Any, peer: str) -> SidepoolError:
    """The error that `peer` sent the code of; a call that never came there is a transport error."""
    code = next((str(value) for key, value in error.trailing_metadata() or () if key == CODE_KEY), "TRANSPORT")
    return error_with_code(code, f"{peer}: {error.details()}")
