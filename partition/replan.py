"""From tables, an inventory and an access profile to a plan: choose machines, place, and say what to expect."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sidepool.partition.inventory import CpuNode, Inventory
from sidepool.partition.load_model import Demand, NodeLoad, Placement, demands, latency_ns, node_loads
from sidepool.partition.optimal import optimal
from sidepool.partition.strategies import capacity_balanced, load_balanced, net_specific
from sidepool.wire.access import AccessProfile, TableAccess
from sidepool.wire.config import decode
from sidepool.wire.errors import PlanError
from sidepool.wire.plan import Plan, validate_plan

STATIC: dict[str, Callable[[Sequence[Demand], Sequence[CpuNode]], Placement]] = {
    "capacity_balanced": capacity_balanced,
    "load_balanced": load_balanced,
    "net_specific": net_specific,
}
STRATEGIES = (*STATIC, "optimal")
# Without a profile: a thousand lookups per second of a hundred samples (MLPerf's smallest query), each with one id per feature.
ASSUMED_LOOKUPS_PER_S, ASSUMED_SAMPLES = 1000.0, 100.0
# Room that a placement of the fewest machines leaves for bursts.
MOST_BUSY = 0.6
# One access switch is preferred to several where it costs no more than the estimate's own error.
NEAR_ENOUGH = 1.05


@dataclass(frozen=True)
class Replanned:
    """A plan, and what it should cost."""

    plan: Plan
    placement: Placement
    loads: tuple[NodeLoad, ...]
    p50_ns: float
    p99_ns: float
    gap: float | None
    """`optimal` only: how far the busiest node is above the lower bound for these shards."""
    chosen: str


def assumed_access(plan: Plan) -> AccessProfile:
    """What is taken where nothing was recorded: every feature alike."""
    rate = ASSUMED_LOOKUPS_PER_S * ASSUMED_SAMPLES
    counts = {t.name: sum(f.table == t.name for f in plan.features) for t in plan.tables}
    tables = tuple(TableAccess(table=name, bags_per_s=n * rate, rows_per_s=n * rate) for name, n in counts.items())
    return AccessProfile(model=plan.model, lookups_per_s=ASSUMED_LOOKUPS_PER_S, tables=tables)


def replan(
    old: Plan,
    inventory: Inventory,
    access: AccessProfile,
    strategy: str,
    *,
    objective: str = "latency",
    time_limit_s: float = 30.0,
) -> Replanned:
    """Place the tables of `old` anew, under the next epoch. Raises `PlanError` with what does not fit and by how much.

    A service never spans pods; within a pod, one rack is taken where that is not slower than several. objective: `latency`
    (p99), or `cost`: the cheapest machines that stay below 60 % busy.
    """
    computed = [t.name for t in old.tables if t.program is not None]
    if computed:
        raise PlanError(
            f"table {computed[0]}: is computed by a program, which keeps its tables together; allowed: tables that may move\n"
            "remedy: sidepool partition --no-programs, or place by --sidecars there"
        )
    if strategy not in STRATEGIES:
        raise PlanError(f"strategy: found {strategy!r}; allowed: {', '.join(STRATEGIES)}")
    _check_access(access, old)
    wanted = demands(old.tables, access, {f.table: f.pooling for f in old.features})
    racks = frozenset(node.rack for node in inventory.gpu_nodes)
    rate = access.lookups_per_s

    def p99(placement: Placement) -> float:
        return latency_ns(placement, rate, [0.99], racks)[0]

    def place(nodes: Sequence[CpuNode], limit_s: float) -> tuple[Placement, float | None, str]:
        if strategy != "optimal":
            return STATIC[strategy](wanted, nodes), None, strategy
        best = optimal(wanted, nodes, _score(p99, rate), limit_s)
        return best.placement, best.gap, best.chosen

    choices, fault = [], None
    groups = _groups(inventory)
    for nodes in groups:
        try:
            limit_s = time_limit_s / len(groups)
            choices.append(_fewest(place, nodes, rate, limit_s) if objective == "cost" else place(nodes, limit_s))
        except PlanError as e:
            fault = fault or e
    if not choices:
        assert fault is not None
        raise fault
    if objective == "cost":
        placement, gap, chosen = min(choices, key=lambda c: (_cost(c[0]), *_score(p99, rate)(c[0])))
    else:
        fastest = min(p99(c[0]) for c in choices)
        near = [c for c in choices if p99(c[0]) <= NEAR_ENOUGH * fastest]
        placement, gap, chosen = min(near, key=lambda c: (len({n.rack for n in c[0].nodes}), *_score(p99, rate)(c[0])))
    p50_ns, p99_ns = latency_ns(placement, rate, [0.5, 0.99], racks)
    return Replanned(_plan(old, placement), placement, tuple(node_loads(placement, rate)), p50_ns, p99_ns, gap, chosen)


def _check_access(access: AccessProfile, plan: Plan) -> None:
    """Refuse the profile of another model: `PlanError`. Tables that it does not name are never asked."""
    if access.model != plan.model:
        raise PlanError(f"profile: model: found {access.model!r}; allowed: {plan.model!r}, that of the plan")
    known = set()
    for i, found in enumerate(access.tables):
        where = f"profile: tables.{i}"
        if found.table not in plan.table_index or found.table in known:
            raise PlanError(f"{where}.table: found {found.table!r}; allowed: every table of the plan once")
        known.add(found.table)
        rows = plan.tables[plan.table_index[found.table]].rows
        if wrong := next((hot.row for hot in found.hot_rows if hot.row >= rows), None):
            raise PlanError(f"{where}.hot_rows: found row {wrong}; allowed: 0 to {rows - 1}")


def _score(p99: Callable[[Placement], float], rate: float) -> Callable[[Placement], tuple[float, float]]:
    """P99, and between overloaded placements the busiest node."""
    return lambda placement: (p99(placement), max(load.busy for load in node_loads(placement, rate)))


def _groups(inventory: Inventory) -> list[list[CpuNode]]:
    """Machines that may serve together: each rack of the pods, then each whole pod; of pods with rankers where there are any."""
    pods = {node.pod for node in inventory.gpu_nodes} or {node.pod for node in inventory.cpu_nodes}
    groups: list[list[CpuNode]] = []
    for pod in sorted(pods):
        nodes = [n for n in inventory.cpu_nodes if n.pod == pod]
        racks = sorted({n.rack for n in nodes})
        if len(racks) > 1:
            groups += [[n for n in nodes if n.rack == rack] for rack in racks]
        if nodes:
            groups.append(nodes)
    if not groups:
        raise PlanError(f"inventory: found no cpu_nodes in the pods of the gpu_nodes, {sorted(pods)}; no service spans pods")
    return groups


def _fewest(
    place: Callable[[Sequence[CpuNode], float], tuple[Placement, float | None, str]],
    nodes: Sequence[CpuNode],
    rate: float,
    time_limit_s: float,
) -> tuple[Placement, float | None, str]:
    """The cheapest machines first, as few as carry the load."""
    by_cost = sorted(nodes, key=lambda n: n.cost / min(n.memory_bytes, n.cores * 1e9))
    fault: PlanError | None = None
    for count in range(1, len(nodes) + 1):
        try:
            found = place(by_cost[:count], time_limit_s / len(nodes))
        except PlanError as e:
            fault = e
            continue
        if count == len(nodes) or max(load.busy for load in node_loads(found[0], rate)) <= MOST_BUSY:
            return found
    assert fault is not None
    raise fault


def _cost(placement: Placement) -> float:
    return sum(node.cost for node in placement.nodes)


def _plan(old: Plan, placement: Placement) -> Plan:
    used = sorted({n for holders in placement.holders for n in holders})
    shards = [
        {"table": p.demand.table.name, "sidecar": placement.nodes[n].name, "rows": list(p.rows), "columns": [0, p.demand.table.dim]}
        for p, holders in zip(placement.pieces, placement.holders, strict=True)
        for n in holders
    ]
    content = old.model_dump(mode="json", exclude_none=True) | {
        "epoch": old.epoch + 1,
        "sidecars": [placement.nodes[n].sidecar.model_dump(mode="json") for n in used],
        "shards": shards,
    }
    plan = decode(content, Plan, where="plan", error=PlanError)
    validate_plan(plan)
    return plan
