"""A plan as values of the Helm chart (deploy/helm/sidepool): who the sidecars are, what they need, where they may run."""

from __future__ import annotations

from typing import Any

from sidepool.partition.inventory import Inventory
from sidepool.wire.plan import Plan

# What a sidecar takes beside its lanes, at most (docs/sidecar.md): the tables and their bookkeeping, also while it copies them.
PER_TABLE_BYTE, FIXED_BYTES = 1.10, 150_000_000
# What lanes in use may take: six of 160 MB, every slot touched.
LANES_BYTES = 1_000_000_000


def helm_values(plan: Plan, inventory: Inventory) -> dict[str, Any]:
    """Values for `helm install --values`; Helm merges them with the chart's own."""
    nodes = {node.name: node for node in inventory.cpu_nodes}
    used = [nodes[s.name] for s in plan.sidecars if s.name in nodes]
    members: list[dict[str, Any]] = []
    for sidecar in plan.sidecars:
        member: dict[str, Any] = {"name": sidecar.name}
        node = nodes.get(sidecar.name)
        if node is not None and node.nic.numa is not None:
            member["config"] = {"memory": {"numa": node.nic.numa}}
        members.append(member)
    held = max(sum(s.bytes(plan.tables[t]) for t, s in plan.held_by(i)) for i in range(len(plan.sidecars)))
    one_plan = int(PER_TABLE_BYTE * held) + FIXED_BYTES + LANES_BYTES
    # A reload holds the tables of two plans.
    two_plans = one_plan + int(PER_TABLE_BYTE * held)
    return {
        "sidecars": {
            "members": members,
            "resources": {"requests": {"memory": str(one_plan)}, "limits": {"memory": str(two_plans)}},
        },
        "topology": {
            "spreadNodes": True,
            "pod": min((node.pod for node in used), default=""),
            "racks": sorted({node.rack for node in used}),
        },
    }
