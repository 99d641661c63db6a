"""The RDMA devices that tests find: rankers on one, sidecars on another where there are two, so that packets really cross."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sidepool.wire.rdma import RdmaPath

DEVICES = sorted(d.name for d in Path("/sys/class/infiniband").glob("*"))
# An emulated machine may stand still for seconds; only tests about dying peers want to know sooner.
PATIENT_S = 60.0

# The guest's two ends of a veth pair, else whatever is there.
_RANKER, _SIDECAR = ("rxeA", "rxeB") if {"rxeA", "rxeB"} <= set(DEVICES) else ("auto", "auto")
RANKER_PATH = RdmaPath(device=_RANKER, peer_timeout_s=PATIENT_S)


def listen(*, peer_timeout_s: float = PATIENT_S, **options: Any) -> dict[str, Any]:
    """`listen.rdma` of a sidecar's configuration."""
    return {"path": {"device": _SIDECAR, "peer_timeout_s": peer_timeout_s}, **options}


# Slots are registered, so their whole size counts: small ones, that an emulated guest registers quickly.
SMALL_SLOTS = {"request_slot_bytes": 512 << 10, "response_slot_bytes": 2 << 20}
SIDECAR_SETTINGS = {"listen": {"rdma": listen()}, **SMALL_SLOTS}
