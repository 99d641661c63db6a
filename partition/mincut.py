"""The exact cut: which operators the CPU side computes and which the GPU side, as a minimum s-t cut.

Project selection (Picard 1976) with two binary variables per operator, *computed on the CPU side* and *computed on the GPU
side*: an operator may be both, so a small result can be sent where several larger ones behind it are computed again. Data flows
one way, CPU to GPU: what the CPU side computes needs everything before it there; what the GPU side lacks is sent once, however
many operators read it. In the cut, the source's side means "on the CPU side" for the first variable and "not on the GPU side" for
the second. Tables that must fit the GPU make the problem a knapsack: that part is branch and bound over tables, with a price per
byte as its lower bound.

Costs are integers, so sums are exact and the result depends on nothing but the problem.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import networkx as nx
from networkx.algorithms.flow import boykov_kolmogorov

# A price per byte is far below one cost unit for large tables: prices count in 1/PRICE_SCALE.
PRICE_SCALE = 1 << 20
# Prices tried per branch: each halves the interval in which the best one lies.
PRICE_STEPS = 12
# Operators times cuts that the search over tables may take, about half a minute (4,200 operators: 3 s a cut). Beyond, the best
# placement found is given with the bound that it could not be proved against.
MAX_WORK = 50_000

CPU_SIDE, GPU_SIDE = "cpu side", "gpu side"
_Variable = Any  # a side, or what is decided: ("cpu", 3), ("gpu", 3), ("sent", 3), "contact"


@dataclass(frozen=True)
class Operator:
    """Something to compute. Costs in any one unit; None: that side cannot compute it.

    One that only the CPU side computes is computed there when something needs it, and always if its result can be sent; one
    that only the GPU side computes, when something there needs it. One that both can compute is computed on at least one.
    """

    name: str
    cpu_cost: int | None
    gpu_cost: int | None
    send_cost: int | None = None
    """Of giving its result to the GPU side, once; None: it cannot be sent."""
    cpu_needs: tuple[int, ...] = ()
    """What must be on the CPU side for it to be computed there."""
    gpu_needs: tuple[int, ...] = ()
    exclusive: bool = False
    """Computed on one side only, never on both."""
    wanted: bool = False
    """Must be computed on the GPU side: what the model returns."""
    remote: bool = False
    """Computing it on the CPU side takes a message there and back."""


@dataclass(frozen=True)
class Resident:
    """A table: on the GPU side it takes memory. Its lookups, exclusive operators, go together."""

    name: str
    bytes: int
    lookups: tuple[int, ...]


@dataclass(frozen=True)
class Problem:
    """What to cut. `contact_cost` is paid once if anything remote is on the CPU side."""

    operators: tuple[Operator, ...]
    tables: tuple[Resident, ...] = ()
    contact_cost: int = 0
    gpu_table_bytes: int = 0
    """How many bytes of tables the GPU side may hold: a hard limit."""


@dataclass(frozen=True)
class Placement:
    """Which operators each side computes."""

    cpu: frozenset[int]
    gpu: frozenset[int]

    def sent(self, problem: Problem) -> list[int]:
        """Operators whose results travel, in order."""
        needed = {u for v in self.gpu for u in problem.operators[v].gpu_needs}
        return sorted(needed - self.gpu)


@dataclass(frozen=True)
class Solution:
    """The cheapest placement found; proved to be the cheapest of all where `bound` equals `cost`."""

    placement: Placement
    cost: int
    bound: int


class Infeasible(Exception):
    """No placement satisfies every constraint."""


def faults(problem: Problem, placement: Placement) -> Iterator[str]:
    """Constraints that a placement breaks."""
    operators = problem.operators
    sent = set(placement.sent(problem))
    for i, operator in enumerate(operators):
        on_cpu, on_gpu = i in placement.cpu, i in placement.gpu
        if (on_cpu and operator.cpu_cost is None) or (on_gpu and operator.gpu_cost is None):
            yield f"{operator.name}: on a side that cannot compute it"
        if operator.wanted and not on_gpu:
            yield f"{operator.name}: wanted on the GPU side"
        if operator.exclusive and on_cpu and on_gpu:
            yield f"{operator.name}: on both sides"
        if on_cpu and not placement.cpu.issuperset(operator.cpu_needs):
            yield f"{operator.name}: needs on the CPU side what is not there"
        if i in sent and (not on_cpu or operator.send_cost is None):
            yield f"{operator.name}: needed on the GPU side, and cannot be sent"
    for table in problem.tables:
        if len({i in placement.gpu for i in table.lookups}) > 1:
            yield f"table {table.name}: its lookups are on different sides"
    if gpu_table_bytes(problem, placement) > problem.gpu_table_bytes:
        yield "tables: more bytes than the GPU side may hold"


def cost_of(problem: Problem, placement: Placement) -> int:
    """What a placement costs."""
    operators = problem.operators
    cost = sum(operators[i].cpu_cost or 0 for i in placement.cpu) + sum(operators[i].gpu_cost or 0 for i in placement.gpu)
    cost += sum(operators[i].send_cost or 0 for i in placement.sent(problem))
    return cost + (problem.contact_cost if any(operators[i].remote for i in placement.cpu) else 0)


def gpu_table_bytes(problem: Problem, placement: Placement) -> int:
    """Bytes of tables on the GPU side."""
    return sum(t.bytes for t in problem.tables if not placement.gpu.isdisjoint(t.lookups))


def solve(problem: Problem) -> Solution:
    """The cheapest placement; raises `Infeasible` where there is none."""
    return _Search(problem).run()


def pruned(problem: Problem, placement: Placement) -> Placement:
    """`placement` without what nobody needs: from what is wanted back to what it takes. Never costs more."""
    cpu: set[int] = set()
    gpu: set[int] = set()
    waiting = [(i, True) for i, x in enumerate(problem.operators) if x.wanted]
    waiting += [(i, False) for i, x in enumerate(problem.operators) if _always_on_cpu(x)]
    while waiting:
        i, wants_gpu = waiting.pop()
        on_gpu = wants_gpu and i in placement.gpu
        side = gpu if on_gpu else cpu
        if i not in side:
            side.add(i)
            operator = problem.operators[i]
            waiting += [(u, on_gpu) for u in (operator.gpu_needs if on_gpu else operator.cpu_needs)]
    return Placement(frozenset(cpu), frozenset(gpu))


def _always_on_cpu(operator: Operator) -> bool:
    return operator.gpu_cost is None and operator.send_cost is not None


@dataclass
class _Search:
    problem: Problem
    best: Solution | None = None
    solves: int = 0
    open_bound: int | None = None
    """The lowest bound of the branches that were given up."""

    def run(self) -> Solution:
        limit = self.problem.gpu_table_bytes
        self._branch({i: False for i, t in enumerate(self.problem.tables) if t.bytes > limit})
        if self.best is None:  # given up before anything fitted: without tables on the GPU side everything fits
            self._branch(dict.fromkeys(range(len(self.problem.tables)), False))
        if self.best is None:
            raise Infeasible
        bound = self.best.cost if self.open_bound is None else min(self.best.cost, self.open_bound)
        return Solution(self.best.placement, self.best.cost, bound)

    def _branch(self, pins: Mapping[int, bool]) -> None:
        """Search the placements in which tables are where `pins` has them (True: on the GPU side)."""
        tables, limit = self.problem.tables, self.problem.gpu_table_bytes
        if sum(tables[i].bytes for i, on_gpu in pins.items() if on_gpu) > limit:
            return
        free = self._cut(pins, 0)
        if free is None:
            return
        bound = cost_of(self.problem, free)
        if self._worse(bound) or self._take(free):
            return
        bound = max(bound, self._priced_bound(pins))
        if self._worse(bound):
            return
        if self._tired():
            self.open_bound = bound if self.open_bound is None else min(self.open_bound, bound)
            return
        held = [i for i, t in enumerate(tables) if i not in pins and not free.gpu.isdisjoint(t.lookups)]
        largest = max(held, key=lambda i: tables[i].bytes)
        self._branch({**pins, largest: False})
        self._branch({**pins, largest: True})

    def _tired(self) -> bool:
        return self.solves * len(self.problem.operators) >= MAX_WORK

    def _worse(self, bound: int) -> bool:
        return self.best is not None and bound >= self.best.cost

    def _take(self, found: Placement) -> bool:
        """Keep a placement that fits and is the cheapest so far; whether it fits."""
        if gpu_table_bytes(self.problem, found) > self.problem.gpu_table_bytes:
            return False
        cost = cost_of(self.problem, found)
        if self.best is None or cost < self.best.cost:
            self.best = Solution(found, cost, cost)
        return True

    def _priced_bound(self, pins: Mapping[int, bool]) -> int:
        """The best lower bound that a price per byte gives: bytes beyond the limit cost, bytes below it earn."""
        low, high, best = 0, self._highest_price(), 0
        for _ in range(PRICE_STEPS):
            price = (low + high + 1) // 2
            found = self._cut(pins, price)
            if found is None or self._tired():
                break
            excess = gpu_table_bytes(self.problem, found) - self.problem.gpu_table_bytes
            scaled = cost_of(self.problem, found) * PRICE_SCALE + price * excess
            best = max(best, -(-scaled // PRICE_SCALE))  # costs are whole, so a bound may be rounded up
            if self._take(found):
                high = price
            else:
                low = price
        return best

    def _highest_price(self) -> int:
        total = sum((x.cpu_cost or 0) + (x.gpu_cost or 0) + (x.send_cost or 0) for x in self.problem.operators)
        smallest = min(t.bytes for t in self.problem.tables)
        return PRICE_SCALE * (total + self.problem.contact_cost) // max(smallest, 1) + 1

    def _cut(self, pins: Mapping[int, bool], price: int) -> Placement | None:
        self.solves += 1
        return _minimum_cut(self.problem, pins, price)


def _minimum_cut(problem: Problem, pins: Mapping[int, bool], price: int) -> Placement | None:
    """The cheapest placement with tables as pinned and `price` / PRICE_SCALE per byte of table; None: there is none."""
    network = _Network(_settled(problem, pins))
    for i, operator in enumerate(problem.operators):
        _add_operator(network, i, operator)
    for i, operator in enumerate(problem.operators):
        _add_needs(network, problem, i, operator)
    for table in problem.tables:
        network.add(CPU_SIDE, ("gpu", table.lookups[0]), price * table.bytes)
    network.add("contact", GPU_SIDE, problem.contact_cost * PRICE_SCALE)
    on_gpu_side = network.cut()
    if on_gpu_side is None:
        return None
    nodes = range(len(problem.operators))
    cpu = frozenset(i for i in nodes if network.variable(("cpu", i)) not in on_gpu_side)
    gpu = frozenset(i for i in nodes if network.variable(("gpu", i)) in on_gpu_side)
    return pruned(problem, Placement(cpu, gpu))


def _settled(problem: Problem, pins: Mapping[int, bool]) -> dict[_Variable, _Variable]:
    """Variables that are settled, or the same as another one: a smaller network is a faster cut."""
    same: dict[_Variable, _Variable] = {}
    for i, operator in enumerate(problem.operators):
        if operator.exclusive and operator.cpu_cost is not None and operator.gpu_cost is not None:
            same["cpu", i] = ("gpu", i)  # on the CPU side means not on the GPU side
        if operator.cpu_cost is None:
            same["cpu", i] = GPU_SIDE
        if operator.gpu_cost is None:
            same["gpu", i] = CPU_SIDE
            if _always_on_cpu(operator):
                same["cpu", i] = CPU_SIDE
        elif operator.wanted:
            same["gpu", i] = GPU_SIDE
    for i, table in enumerate(problem.tables):
        for other in table.lookups[1:]:
            same["gpu", other] = ("gpu", table.lookups[0])
        if i in pins:
            same["gpu", table.lookups[0]] = GPU_SIDE if pins[i] else CPU_SIDE
    return same


def _add_operator(network: _Network, i: int, operator: Operator) -> None:
    on_cpu, on_gpu = ("cpu", i), ("gpu", i)
    if operator.cpu_cost is not None:
        network.add(on_cpu, GPU_SIDE, operator.cpu_cost * PRICE_SCALE)
        if operator.remote:
            network.never(on_cpu, "contact")
        if operator.send_cost is not None:
            network.add(on_gpu, ("sent", i), operator.send_cost * PRICE_SCALE)
    if operator.gpu_cost is not None:
        network.add(CPU_SIDE, on_gpu, operator.gpu_cost * PRICE_SCALE)
        if operator.cpu_cost is not None:
            network.never(on_gpu, on_cpu)  # not on the GPU side, so on the CPU side


def _add_needs(network: _Network, problem: Problem, i: int, operator: Operator) -> None:
    if operator.cpu_cost is not None:
        for u in operator.cpu_needs:
            network.never(("cpu", i), ("cpu", u))
    if operator.gpu_cost is None:
        return
    for u in operator.gpu_needs:
        needed = problem.operators[u]
        sendable = needed.send_cost is not None and needed.cpu_cost is not None
        network.never(("sent" if sendable else "gpu", u), ("gpu", i))


class _Network:
    """A flow network under construction. `same`: variables that stand for another one, or for a side."""

    def __init__(self, same: Mapping[_Variable, _Variable]) -> None:
        self.same = same
        self.capacities: dict[tuple[_Variable, _Variable], int] = {}
        self.forbidden: dict[tuple[_Variable, _Variable], None] = {}

    def variable(self, of: _Variable) -> _Variable:
        """What a variable stands for in the network."""
        while of in self.same:
            of = self.same[of]
        return of

    def add(self, start: _Variable, end: _Variable, capacity: int) -> None:
        """What it costs when `start` is on the CPU side and `end` on the GPU side; the same pair twice costs both."""
        edge = (self.variable(start), self.variable(end))
        self.capacities[edge] = self.capacities.get(edge, 0) + capacity

    def never(self, start: _Variable, end: _Variable) -> None:
        """`start` on the CPU side and `end` on the GPU side must not be."""
        self.forbidden[self.variable(start), self.variable(end)] = None

    def cut(self) -> frozenset[_Variable] | None:
        """The GPU side of the minimum cut, the smallest where several are minimal; None where every cut is forbidden."""
        if (CPU_SIDE, GPU_SIDE) in self.forbidden:
            return None
        too_much = sum(self.capacities.values()) + 1
        graph = nx.DiGraph()
        graph.add_nodes_from((CPU_SIDE, GPU_SIDE))
        graph.add_edges_from((*edge, {"capacity": c}) for edge, c in self.capacities.items() if c and _may_be_cut(edge))
        graph.add_edges_from((*edge, {"capacity": too_much}) for edge in self.forbidden if _may_be_cut(edge))
        cost, (_, gpu_side) = nx.minimum_cut(graph, CPU_SIDE, GPU_SIDE, flow_func=boykov_kolmogorov)
        return None if cost >= too_much else frozenset(gpu_side)


def _may_be_cut(edge: tuple[_Variable, _Variable]) -> bool:
    start, end = edge
    return bool(start != end and start != GPU_SIDE and end != CPU_SIDE)
