"""Decide the cut of a model, and compare it with what else could have been done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sidepool.partition.capture import Captured
from sidepool.partition.costs import COMPUTE_HEAVY
from sidepool.partition.cut_model import UNITS_PER_NS, CutModel, CutOptions, build_model
from sidepool.partition.lookups import Lookup
from sidepool.partition.mincut import Placement, Problem, Solution, cost_of, gpu_table_bytes, pruned, solve
from sidepool.partition.movable import NOTHING, Movable
from sidepool.partition.profiles import find_link
from sidepool.partition.sources import packet
from sidepool.wire.errors import CutError


@dataclass(frozen=True)
class Alternative:
    """A way to place the model, costed as the chosen one is."""

    name: str
    placement: Placement
    cost_ns: float
    """Weighted by the objective."""
    cpu_ns: float
    gpu_ns: float
    link_ns: float
    link_bytes: float
    gpu_table_bytes: int
    note: str = ""


@dataclass(frozen=True)
class Decision:
    """The cut of a model."""

    model: CutModel
    chosen: Alternative
    proved: bool
    """Whether no placement that can be executed today is cheaper; otherwise `bound_ns` is what is proved."""
    bound_ns: float
    others: tuple[Alternative, ...]
    unrestricted: Alternative
    """The optimum if sidecars ran any operator."""
    sent: tuple[int, ...]
    """What travels to the GPU side."""

    @property
    def lookups(self) -> tuple[Lookup, ...]:
        """The lookups that leave the model."""
        items = self.model.items
        return tuple(x.lookup for i, x in enumerate(items) if x.lookup is not None and i in self.chosen.placement.cpu)

    @property
    def kept(self) -> tuple[Lookup, ...]:
        """The lookups that stay in the dense program."""
        items = self.model.items
        return tuple(x.lookup for i, x in enumerate(items) if x.lookup is not None and i in self.chosen.placement.gpu)

    @property
    def would_move(self) -> tuple[int, ...]:
        """Operators behind lookups that only the unrestricted optimum computes on the CPU side."""
        more = self.unrestricted.placement.cpu - self.chosen.placement.cpu
        return tuple(i for i in sorted(more) if self.model.items[i].kind == "dense")


def decide(
    captured: Captured, lookups: Sequence[Lookup], ids: Mapping[Lookup, float], options: CutOptions, movable: Movable = NOTHING
) -> Decision:
    """The cheapest cut that can be executed. Raises `CutError` for wrong options, or where nothing is left for sidecars.

    movable: operators that sidecars can run besides lookups.
    """
    model = build_model(captured, lookups, ids, options, movable)
    free, today = model.problem(today=False), model.problem(today=True)
    everything = sum(t.bytes for t in free.tables)
    found, best = solve(today), solve(free)
    decision = Decision(
        model,
        _alternative(model, free, "chosen", found.placement),
        found.bound == found.cost,
        found.bound / UNITS_PER_NS,
        tuple(_others(model, model.problem(today=False, gpu_table_bytes=everything))),
        _alternative(model, free, "optimum if sidecars ran any operator", best.placement, _unproved(best)),
        tuple(found.placement.sent(today)),
    )
    if not decision.lookups:
        raise CutError(
            f"gpu_table_bytes: found {options.gpu_table_bytes}; every table stays with the dense program, and nothing is left for "
            f"sidecars\nremedy: allow fewer bytes (0 moves every table), or serve the model as it is"
        )
    return decision


def _others(model: CutModel, problem: Problem) -> list[Alternative]:
    """The extremes and the heuristic, memory aside."""
    every = range(len(problem.operators))
    dense = frozenset(i for i in every if model.items[i].kind == "dense")
    last = frozenset([len(model.items) - 1])
    cpu = frozenset(i for i in every if problem.operators[i].cpu_cost is not None)
    gpu = frozenset(i for i in every if problem.operators[i].gpu_cost is not None)
    coloured = _coloured(model)
    named = {
        "lookups only": (cpu - dense, dense | last),
        "all on the CPU side": (cpu, last),
        "all on the GPU side": (frozenset[int](), gpu),
        "Prism-style colouring": (cpu - coloured, coloured | last),
    }
    found = [_alternative(model, problem, name, pruned(problem, Placement(*sides))) for name, sides in named.items()]
    limit = model.options.gpu_table_bytes
    return [x if x.gpu_table_bytes <= limit else _with_note(x, "tables exceed gpu_table_bytes") for x in found]


def _with_note(found: Alternative, note: str) -> Alternative:
    return Alternative(**{**found.__dict__, "note": note})


def _coloured(model: CutModel) -> frozenset[int]:
    """Colour the GPU side from its seeds, products of matrices, over neighbours up to the lookups; then all that follows it."""
    readers: dict[int, list[int]] = {}
    for i, item in enumerate(model.items):
        for u in item.needs:
            readers.setdefault(u, []).append(i)
    dense = {i for i, x in enumerate(model.items) if x.kind == "dense"}
    waiting = [i for i in dense if packet(model.items[i].node) in COMPUTE_HEAVY]
    found: set[int] = set()
    while waiting:
        i = waiting.pop()
        if i in dense and i not in found:
            found.add(i)
            waiting += [*model.items[i].needs, *readers.get(i, [])]
    return frozenset(found)


def _alternative(model: CutModel, problem: Problem, name: str, placement: Placement, note: str = "") -> Alternative:
    """`placement` with what it costs in `problem`, where everything may move."""
    items, link = model.items, find_link(model.options.link)
    sent = placement.sent(problem)
    travels = sum(items[i].request_bytes for i in placement.cpu) + sum(items[i].result_bytes for i in sent)
    contact = any(problem.operators[i].remote for i in placement.cpu)
    return Alternative(
        name,
        placement,
        cost_of(problem, placement) / UNITS_PER_NS,
        sum(items[i].cpu_ns for i in placement.cpu),
        sum(items[i].gpu_ns for i in placement.gpu),
        travels / link.bytes_per_s * 1e9 + (link.round_trip_ns if contact else 0.0),
        travels,
        gpu_table_bytes(problem, placement),
        note,
    )


def _unproved(found: Solution) -> str:
    return "" if found.bound == found.cost else f"best found; nothing below {found.bound / UNITS_PER_NS / 1000:.1f} us exists"
