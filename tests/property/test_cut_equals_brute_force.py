"""The cut costs exactly what the cheapest of all placements costs, found by trying every one."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sidepool.partition.capture import Captured, capture
from sidepool.partition.cut_model import CutOptions, build_model
from sidepool.partition.lookups import Lookup, find_lookups
from sidepool.partition.mincut import Infeasible, Operator, Placement, Problem, Resident, cost_of, faults, solve

COSTS = st.integers(0, 30)
MAYBE = st.one_of(st.none(), COSTS)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Up to five operators in any shape a model gives them, then what the model returns."""
    count = draw(st.integers(1, 5))
    operators: list[Operator] = []
    for i in range(count):
        needs = tuple(u for u in range(i) if draw(st.booleans()))
        cpu, gpu = draw(st.sampled_from([(True, True), (True, True), (True, False), (False, True)]))
        operators.append(
            Operator(
                name=f"op{i}",
                cpu_cost=draw(COSTS) if cpu else None,
                gpu_cost=draw(COSTS) if gpu else None,
                send_cost=draw(MAYBE) if cpu else None,
                cpu_needs=needs,
                gpu_needs=needs if draw(st.booleans()) else tuple(u for u in needs if draw(st.booleans())),
                remote=draw(st.booleans()),
            )
        )
    operators.append(Operator("return", None, 0, gpu_needs=tuple(range(count)), wanted=True))
    free = [i for i in range(count) if operators[i].cpu_cost is not None and operators[i].gpu_cost is not None]
    tables = []
    for name in draw(st.sampled_from([(), ("a",), ("a", "b")])):
        lookups = tuple(i for i in free if draw(st.booleans()))
        free = [i for i in free if i not in lookups]
        if lookups:
            tables.append(Resident(name, draw(st.integers(1, 10)), lookups))
    of_tables = {i for t in tables for i in t.lookups}
    whole = tuple(
        Operator(x.name, x.cpu_cost, x.gpu_cost, x.send_cost, x.cpu_needs, x.gpu_needs, i in of_tables, x.wanted, x.remote)
        for i, x in enumerate(operators)
    )
    return Problem(whole, tuple(tables), draw(COSTS), draw(st.integers(0, 15)))


def cheapest(problem: Problem) -> int | None:
    """The definition, literally: every set for each side, every rule, every cost."""
    operators, best = problem.operators, None
    for sides in itertools.product(((0, 0), (0, 1), (1, 0), (1, 1)), repeat=len(operators)):
        cost, legal, sent = 0, True, set()
        for x, (cpu, gpu) in zip(operators, sides, strict=True):
            legal &= not (cpu and x.cpu_cost is None) and not (gpu and x.gpu_cost is None) and not (x.wanted and not gpu)
            legal &= not (x.exclusive and cpu and gpu) and (not cpu or all(sides[u][0] for u in x.cpu_needs))
            legal &= bool(cpu) or not (x.gpu_cost is None and x.send_cost is not None)  # a lookup that only a sidecar can do
            legal &= bool(cpu or gpu) or x.cpu_cost is None or x.gpu_cost is None
            if not legal:
                break
            cost += (x.cpu_cost or 0) * cpu + (x.gpu_cost or 0) * gpu
            if gpu:
                sent |= {u for u in x.gpu_needs if not sides[u][1]}
        if not legal or any(not sides[u][0] or operators[u].send_cost is None for u in sent):
            continue
        on_gpu = [{bool(sides[i][1]) for i in t.lookups} for t in problem.tables]
        if any(len(found) > 1 for found in on_gpu):
            continue
        if sum(t.bytes for t, found in zip(problem.tables, on_gpu, strict=True) if found == {True}) > problem.gpu_table_bytes:
            continue
        cost += sum(operators[u].send_cost or 0 for u in sent)
        cost += problem.contact_cost if any(x.remote and cpu for x, (cpu, _) in zip(operators, sides, strict=True)) else 0
        best = cost if best is None else min(best, cost)
    return best


@settings(max_examples=200, deadline=None)
@given(problems())
def test_the_cut_costs_what_the_cheapest_of_all_placements_costs(problem: Problem) -> None:
    expected = cheapest(problem)
    try:
        found = solve(problem)
    except Infeasible:
        assert expected is None
        return
    assert list(faults(problem, found.placement)) == []
    assert (found.cost, found.bound) == (expected, expected)
    assert cost_of(problem, found.placement) == found.cost


class Product(nn.Module):
    """Two lookups whose product shrinks what travels, beside one that a layer follows."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Embedding(40, 64), nn.Embedding(30, 64)

    def forward(self, ids: Tensor) -> Tensor:
        return (self.a(ids[:, 0]) * self.b(ids[:, 1])).sum(1)


@cache
def small_model() -> tuple[Captured, tuple[Lookup, ...]]:
    captured = capture(Product().eval(), torch.randint(0, 30, (3, 2)))
    return captured, find_lookups(captured).lookups


@pytest.mark.parametrize("link", ["10g-tcp", "200g-roce"])
@pytest.mark.parametrize("objective", ["latency", "throughput", "gpu_cost"])
@pytest.mark.parametrize("gpu_table_bytes", [0, 8_000, 1 << 30])
@pytest.mark.parametrize("today", [True, False])
def test_the_cut_of_a_real_model_is_the_cheapest_of_all(link: str, objective: Any, gpu_table_bytes: int, today: bool) -> None:
    captured, lookups = small_model()
    options = CutOptions(link, objective, gpu_table_bytes=gpu_table_bytes)
    problem = build_model(captured, lookups, dict.fromkeys(lookups, 1.0), options).problem(today=today)
    assert 4 < len(problem.operators) < 10
    found = solve(problem)
    assert (found.cost, found.bound) == (cheapest(problem),) * 2


def test_a_small_result_is_sent_where_several_larger_ones_behind_it_would_travel() -> None:
    """Both need `wide`, which the CPU side needs as well: it is computed twice, and only `small` travels."""
    operators = (
        Operator("small", 1, None, send_cost=2),
        Operator("wide", 1, 1, send_cost=50, cpu_needs=(0,), gpu_needs=(0,)),
        Operator("only on the cpu", 1, None, send_cost=1, cpu_needs=(1,)),
        Operator("return", None, 0, gpu_needs=(1, 2), wanted=True),
    )
    found = solve(Problem(operators))
    assert found.placement == Placement(cpu=frozenset({0, 1, 2}), gpu=frozenset({1, 3}))
    assert found.placement.sent(Problem(operators)) == [0, 2]
    assert found.cost == 1 + 1 + 1 + 1 + 2 + 1


def test_tables_fill_the_memory_that_the_gpu_side_has_for_the_greatest_gain() -> None:
    """A knapsack in which taking the best table per byte first is wrong: 6 for 60, or twice 5 for 50 each, into 10 bytes."""
    gains = ((60, 6), (50, 5), (50, 5))
    lookups = tuple(Operator(f"l{i}", gain, 0, send_cost=0, exclusive=True, remote=True) for i, (gain, _) in enumerate(gains))
    tables = tuple(Resident(f"t{i}", size, (i,)) for i, (_, size) in enumerate(gains))
    problem = Problem((*lookups, Operator("return", None, 0, gpu_needs=(0, 1, 2), wanted=True)), tables, 0, 10)
    found = solve(problem)
    assert found.placement.gpu == {1, 2, 3}
    assert (found.cost, found.bound) == (60, 60)
