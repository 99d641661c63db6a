"""From tables and features to a plan: where every table lies, and where every sidecar listens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sidepool.partition.placement import place_tables
from sidepool.wire.config import decode
from sidepool.wire.errors import PlanError
from sidepool.wire.plan import Feature, OnMissingShard, Plan, Table, validate_plan

# The port that a sidecar takes by default, and the next ones for further sidecars on the same machine.
FIRST_PORT = 50151


def make_plan(
    model: str,
    tables: Sequence[Table],
    features: Sequence[Feature],
    loads: Mapping[str, float],
    *,
    sidecars: int,
    addresses: Sequence[str] | None,
    epoch: int,
    on_missing_shard: OnMissingShard = OnMissingShard.FAIL,
    together: Sequence[frozenset[str]] = (),
) -> Plan:
    """Place `tables` on `sidecars` by bytes and `loads` (pooling work per sample and table name); raises `PlanError`.

    addresses: `host:port` of every sidecar's control plane; default: 127.0.0.1, ports from 50151. together: tables that must lie
    on one sidecar.
    """
    owners = place_tables(tables, loads, sidecars, together)
    plan = decode(
        {
            "epoch": epoch,
            "model": model,
            "on_missing_shard": str(on_missing_shard),
            "tables": [t.model_dump(mode="json") for t in tables],
            "features": [f.model_dump(mode="json") for f in features],
            "sidecars": [{"name": f"sidecar-{i}", "address": a} for i, a in enumerate(_addresses(addresses, sidecars))],
            "shards": [
                {"table": t.name, "sidecar": f"sidecar-{owner}", "rows": [0, t.rows], "columns": [0, t.dim]}
                for t, owner in zip(tables, owners, strict=True)
            ],
        },
        Plan,
        where="plan",
        error=PlanError,
    )
    validate_plan(plan)
    return plan


def check_memory(plan: Plan, sidecar_bytes: int | None) -> None:
    """Raise `PlanError` where the rows of a sidecar's tables take more than `sidecar_bytes`; None: nothing is checked."""
    if sidecar_bytes is None:
        return
    held = [sum(s.bytes(plan.tables[t]) for t, s in plan.held_by(i)) for i in range(len(plan.sidecars))]
    fullest = max(range(len(held)), key=held.__getitem__)
    if held[fullest] > sidecar_bytes:
        largest = max(t.bytes for t in plan.tables)
        remedy = (
            "a narrower row_format: the largest table alone needs more"
            if largest > sidecar_bytes
            else f"more sidecars (at least {-(-sum(held) // sidecar_bytes)}), or a narrower row_format"
        )
        raise PlanError(
            f"sidecar_bytes: found {sidecar_bytes}; {plan.sidecars[fullest].name} needs {held[fullest]} for its tables\n"
            f"remedy: {remedy}"
        )


def _addresses(found: Sequence[str] | None, sidecars: int) -> Sequence[str]:
    if not found:
        return [f"127.0.0.1:{FIRST_PORT + i}" for i in range(sidecars)]
    if len(found) != sidecars or len(set(found)) != sidecars:
        raise PlanError(f"addresses: found {list(found)}; allowed: {sidecars} different addresses, one per sidecar")
    for address in found:
        host, colon, port = address.rpartition(":")
        if not host or not colon or not port.isdigit():
            raise PlanError(f"addresses: found {address!r}; allowed: HOST:PORT, such as 127.0.0.1:{FIRST_PORT}")
    return found
