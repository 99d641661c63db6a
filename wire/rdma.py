"""What either end of an rdma lane can be told about its device and its path. docs/rdma.md explains the fabric's side."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from sidepool.wire.config import Frozen

ServiceLevel = Annotated[int, Field(ge=0, le=15)]
TrafficClass = Annotated[int, Field(ge=0, le=255)]


class RdmaPath(Frozen):
    """Device, address, classes of traffic and patience of one end."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    device: Annotated[str, Field(min_length=1, max_length=63)] = "auto"
    """Name of the RDMA device, as `sidepool doctor` lists them; auto: the first with an active port."""
    port: Annotated[int, Field(ge=1, le=254)] | Literal["auto"] = "auto"
    """Port of the device; auto: the first active one."""
    gid_index: Annotated[int, Field(ge=0, le=65_535)] | Literal["auto"] = "auto"
    """Entry of the port's GID table; auto: RoCE v2 over IPv4, else RoCE v2 over IPv6, else the first in use (InfiniBand)."""
    window_bytes: Annotated[int, Field(ge=0, le=1 << 36)] = 0
    """Bytes that the peer may have under way to this end, at least two slots. 0: four slots, what one large lookup keeps under
    way."""
    peer_timeout_s: Annotated[float, Field(ge=1, le=600)] = 2.0
    """A peer that acknowledges nothing for about this long is dead. A fabric that reroutes takes less; 2 s still fails over well
    within a ranker's patience. Rounded up to seven tries of 4.096 µs times a power of two."""
    service_level: ServiceLevel = 0
    """InfiniBand service level of requests and responses."""
    control_service_level: ServiceLevel = 1
    """Service level of the credit queue pairs. Fabrics without QoS map every level to one lane."""
    traffic_class: TrafficClass = 0
    """RoCE: IP traffic class (DSCP times 4) of requests and responses; 0 is best effort, use your fabric's lossless class."""
    control_traffic_class: TrafficClass = 192
    """Traffic class of the credit queue pairs. 192 is DSCP CS6, network control, which switches queue before bulk data."""

    def native(self) -> dict[str, Any]:
        """As `sidepool._native` takes it."""
        options = self.model_dump()
        options["port"] = 0 if self.port == "auto" else self.port
        options["gid_index"] = -1 if self.gid_index == "auto" else self.gid_index
        return options
