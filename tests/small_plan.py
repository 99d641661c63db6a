"""The smallest plan there is: one table of four rows on one sidecar."""

from __future__ import annotations

from sidepool.wire.plan import Feature, Plan, Shard, SidecarAddress, Table


def plan_of(epoch: int, *, sidecar: str = "s", model: str = "m") -> Plan:
    return Plan(
        epoch=epoch,
        model=model,
        tables=(Table(name="t", rows=4, dim=2),),
        features=(Feature(name="f", table="t"),),
        sidecars=(SidecarAddress(name=sidecar, address="127.0.0.1:1"),),
        shards=(Shard(table="t", sidecar=sidecar, rows=(0, 4), columns=(0, 2)),),
    )
