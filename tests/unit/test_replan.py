"""Planning: every placement is valid and fits, hot tables are spread, and optimal is never worse than the others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from sidepool.partition.inventory import CpuNode, Gpu, GpuNode, Inventory, Nic, load_inventory
from sidepool.partition.load_model import Demand, Piece, Placement, latency_ns
from sidepool.partition.plan_report import report
from sidepool.partition.replan import STATIC, STRATEGIES, assumed_access, replan
from sidepool.partition.strategies import cut_rows
from sidepool.wire.access import AccessProfile, HotRow, TableAccess
from sidepool.wire.errors import ConfigError, PlanError
from sidepool.wire.plan import Feature, Plan, Shard, SidecarAddress, Table, validate_plan

QUICK_S = 2.0


def node(i: int, memory: int = 1 << 30, **more: object) -> CpuNode:
    return CpuNode(
        name=f"n{i}", address=f"10.0.0.{i + 1}:50151", memory_bytes=memory, cores=8, nics=(Nic(name="eth0", gbps=25),), **more
    )


def plan_of(sizes: list[int], dim: int = 16) -> Plan:
    tables = tuple(Table(name=f"t{i}", rows=rows, dim=dim) for i, rows in enumerate(sizes))
    return Plan(
        epoch=1,
        model="m",
        tables=tables,
        features=tuple(Feature(name=f"f{i}", table=t.name) for i, t in enumerate(tables)),
        sidecars=(SidecarAddress(name="one", address="127.0.0.1:1"),),
        shards=tuple(Shard(table=t.name, sidecar="one", rows=(0, t.rows), columns=(0, t.dim)) for t in tables),
    )


def access_of(plan: Plan, rows_per_s: list[float], nets: list[str] | None = None) -> AccessProfile:
    tables = tuple(
        TableAccess(table=t.name, bags_per_s=r / 10, rows_per_s=r, net=nets[i] if nets else None)
        for i, (t, r) in enumerate(zip(plan.tables, rows_per_s, strict=True))
    )
    return AccessProfile(model="m", lookups_per_s=1000, tables=tables)


def p99(plan: Plan, nodes: tuple[CpuNode, ...], access: AccessProfile, strategy: str) -> float:
    return replan(plan, Inventory(cpu_nodes=nodes), access, strategy, time_limit_s=QUICK_S).p99_ns


@settings(max_examples=25, deadline=None)
@given(data=st.data(), strategy=st.sampled_from(STRATEGIES))
def test_every_plan_is_valid_fits_and_counts_every_row_once(data: st.DataObject, strategy: str) -> None:
    sizes = data.draw(st.lists(st.integers(1, 40_000), min_size=1, max_size=12))
    plan = plan_of(sizes)
    rates = data.draw(st.lists(st.floats(0, 1e6), min_size=len(sizes), max_size=len(sizes)))
    total = sum(t.bytes for t in plan.tables)
    nodes = tuple(node(i, memory=max(total, 4096)) for i in range(data.draw(st.integers(1, 5))))
    found = replan(plan, Inventory(cpu_nodes=nodes), access_of(plan, rates), strategy, time_limit_s=0.5)
    validate_plan(found.plan)
    assert found.plan.epoch == 2
    held = [sum(s.bytes(found.plan.tables[t]) for t, s in found.plan.held_by(i)) for i in range(len(found.plan.sidecars))]
    assert all(h <= nodes[0].memory_bytes for h in held)
    by_name = {n.name: load for n, load in zip(found.placement.nodes, found.loads, strict=True)}
    assert held == [by_name[s.name].bytes for s in found.plan.sidecars]
    assert sum(load.rows_per_s for load in found.loads) == pytest.approx(sum(rates), rel=1e-6)
    assert found.plan.model in report(found)


def test_optimal_is_never_worse_and_spreads_what_is_hot() -> None:
    random = np.random.default_rng(7)
    plan = plan_of(random.integers(1_000, 200_000, 60).tolist(), dim=64)
    rates = (1.5e8 * random.zipf(1.6, 60).clip(max=500) / 500).tolist()
    nodes = tuple(node(i) for i in range(6))
    access = access_of(plan, rates, nets=[f"net{i % 3}" for i in range(60)])
    static = {s: p99(plan, nodes, access, s) for s in STATIC}
    best = replan(plan, Inventory(cpu_nodes=nodes), access, "optimal", time_limit_s=QUICK_S)
    assert best.p99_ns <= min(static.values())
    assert best.p99_ns < 0.8 * min(static.values())
    assert best.gap is not None
    assert 0 <= best.gap < 0.2
    assert "replicated" in report(best) or "row_wise" in report(best)


def test_nets_keep_to_their_own_nodes_where_there_are_enough() -> None:
    plan = plan_of([1000] * 12)
    nets = ["user"] * 6 + ["item"] * 6
    found = replan(plan, Inventory(cpu_nodes=(node(0), node(1))), access_of(plan, [1000.0] * 12, nets), "net_specific")
    homes = [found.plan.sidecars_of_table[i] for i in range(12)]
    assert len({*homes[:6]}) == len({*homes[6:]}) == 1
    assert homes[0] != homes[6]


def test_a_service_never_spans_pods_and_prefers_the_rankers_rack() -> None:
    plan = plan_of([1000] * 4)
    nodes = (node(0, rack="a", pod="p"), node(1, rack="b", pod="p"), node(2, rack="c", pod="q"))
    cards = (Nic(name="a", gbps=100, numa=0), Nic(name="b", gbps=25, numa=1))
    ranker = GpuNode(name="g", gpus=(Gpu(name="0", numa=1),), nics=cards, rack="b", pod="p")
    found = replan(plan, Inventory(cpu_nodes=nodes, gpu_nodes=(ranker,)), access_of(plan, [1000.0] * 4), "load_balanced")
    assert {s.name for s in found.plan.sidecars} == {"n1"}
    assert ranker.nic_of(ranker.gpus[0]).name == "b"


def test_what_does_not_fit_is_named_with_what_is_missing() -> None:
    plan = plan_of([1000, 5000])  # 64,000 and 320,000 bytes
    small = Inventory(cpu_nodes=(node(0, memory=150_000), node(1, memory=150_000)))
    with pytest.raises(PlanError, match=r"table 't\d', rows .*too few; all tables need 84000 bytes more than there are"):
        replan(plan, small, assumed_access(plan), "capacity_balanced")


def test_tables_larger_than_any_node_are_cut_and_the_fewest_nodes_are_taken_for_cost() -> None:
    plan = plan_of([10_000, 100])
    nodes = tuple(node(i, memory=400_000) for i in range(5))
    found = replan(plan, Inventory(cpu_nodes=nodes), assumed_access(plan), "capacity_balanced")
    assert found.plan.rows_cut(0)
    cheap = replan(plan, Inventory(cpu_nodes=nodes), assumed_access(plan), "capacity_balanced", objective="cost")
    assert len(cheap.plan.sidecars) < len(found.plan.sidecars)


def test_row_ranges_have_equal_shares_of_the_ids() -> None:
    demand = Demand(Table(name="t", rows=1000, dim=4), 1, 10, "", True, (HotRow(row=10, share=0.5), HotRow(row=11, share=0.2)))
    ranges = [p.rows for p in cut_rows(demand, 3)]
    assert ranges == [(0, 11), (11, 12), (12, 1000)]
    assert sum(demand.share(r) for r in ranges) == pytest.approx(1)


def test_latency_grows_with_load_until_there_is_none() -> None:
    demand = Demand(Table(name="t", rows=1000, dim=64), 100, 1000, "", True)
    placement = Placement((node(0),), (Piece(demand, (0, 1000)),), ((0,),))
    found = [latency_ns(placement, rate, [0.5, 0.99]) for rate in (100, 50_000, 80_000, 10_000_000)]
    assert found[0][1] < found[1][1] < found[2][1]
    assert all(p50 <= p99 for p50, p99 in found)
    assert found[3] == [float("inf")] * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cores": 0}, r"cpu_nodes\.0\.cores: found 0; allowed"),
        ({"address": "nowhere"}, r"cpu_nodes\.0\.address: found 'nowhere'; allowed: host:port"),
        ({"colour": "red"}, r"cpu_nodes\.0\.colour: unknown key"),
        ({"name": "n1"}, r"cpu_nodes: name: 'n1' appears more than once"),
        ({"address": "two words:50151"}, r"cpu_nodes\.0\.address: found 'two words:50151'; allowed: host:port"),
        ({"address": "10.0.0.1:99999"}, r"cpu_nodes\.0\.address: found '10\.0\.0\.1:99999'; allowed: host:port, ports 1 to 65535$"),
        ({"cost": float("inf")}, r"cpu_nodes\.0\.cost: found inf; allowed: less than or equal to"),
        ({"memory_bytes": -1}, r"cpu_nodes\.0\.memory_bytes: found -1; allowed: greater than 0$"),
    ],
)
def test_a_wrong_inventory_is_refused_by_name(tmp_path: Path, change: dict[str, object], message: str) -> None:
    nodes = [node(i).model_dump(mode="json", exclude_none=True) for i in range(2)]
    nodes[0] |= change
    path = tmp_path / "nodes.yaml"
    path.write_text(yaml.safe_dump({"cpu_nodes": nodes}), encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        load_inventory(path)


@pytest.mark.parametrize("text", ["cpu_nodes: [{name: 2021-13-45}]", "cpu_nodes: " + "9" * 5000, "[" * 5000])
def test_text_that_only_looks_like_yaml_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "nodes.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_inventory(path)


def test_a_profile_of_other_tables_is_refused() -> None:
    plan, inventory = plan_of([100, 200]), Inventory(cpu_nodes=(node(0),))
    access = access_of(plan, [10.0, 10.0])
    hot = access.tables[0].model_copy(update={"hot_rows": (HotRow(row=100, share=0.5),)})
    for change, message in (
        ({"model": "other"}, "profile: model: found 'other'; allowed: 'm'"),
        ({"tables": access.tables[:1] * 2}, r"profile: tables\.1\.table: found 't0'; allowed: every table of the plan once"),
        ({"tables": (TableAccess(table="t9", bags_per_s=1, rows_per_s=1),)}, r"profile: tables\.0\.table: found 't9'"),
        ({"tables": (hot,)}, r"profile: tables\.0\.hot_rows: found row 100; allowed: 0 to 99"),
    ):
        with pytest.raises(PlanError, match=message):
            replan(plan, inventory, access.model_copy(update=change), "load_balanced")
