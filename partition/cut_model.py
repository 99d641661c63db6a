"""The cut's problem for a captured model: what there is to place, what each costs on either side, what may move at all.

Where things are: model inputs lie at the ranker, so its index program and the GPU side have them for nothing; a lookup in a
sidecar pays for its ids. Constants and sizes cost nothing anywhere: they are folded into the program that uses them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor, fx

from sidepool.partition.capture import Captured
from sidepool.partition.costs import BATCHES, Size, Sizes, Work, result_bytes, work_of
from sidepool.partition.lookups import Jagged, Lookup
from sidepool.partition.mincut import Operator, Problem, Resident
from sidepool.partition.movable import NOTHING, Movable, varying_nodes
from sidepool.partition.profiles import DEFAULT_CPU, DEFAULT_GPU, DEFAULT_LINK, find_link, find_processor
from sidepool.partition.sources import Columns, is_moved
from sidepool.wire.errors import CutError
from sidepool.wire.plan import Pooling

Objective = Literal["latency", "throughput", "gpu_cost"]
Kind = Literal["input", "index", "lookup", "dense", "return"]
# Costs are whole picoseconds (weighted): a rounding of half of one per operator is far below what any profile knows.
UNITS_PER_NS = 1000
ID_BYTES, LENGTH_BYTES = 8, 4
# A feature's block in a response: its entry and the padding to 64 bytes (docs/wire-format.md).
BLOCK_BYTES = 64

ONLY_LOOKUPS = "sidecars run lookups, pooling, and what reduces unpooled rows"
ONLY_SIDECARS = "ids of varying number, or weights, reach sidecars only"


@dataclass(frozen=True)
class CutOptions:
    """What the cut is costed for."""

    link: str = DEFAULT_LINK
    objective: Objective = "latency"
    cpu: str = DEFAULT_CPU
    gpu: str = DEFAULT_GPU
    gpu_table_bytes: int = 0
    """Tables that may stay with the dense program. None by default: that they leave is why a model is partitioned."""
    sidecars: int = 1
    batches: Mapping[int, float] = field(default_factory=lambda: BATCHES)
    """Samples per lookup → share of the lookups."""

    def check(self) -> None:
        """Raise `CutError` for what is not allowed."""
        if self.objective not in get_args(Objective):
            raise CutError(f"objective: found {self.objective!r}; allowed: {', '.join(get_args(Objective))}")
        if type(self.gpu_table_bytes) is not int or self.gpu_table_bytes < 0:
            raise CutError(f"gpu_table_bytes: found {self.gpu_table_bytes!r}; allowed: 0 or more")
        find_link(self.link), find_processor("cpu", self.cpu), find_processor("gpu", self.gpu)

    @property
    def weights(self) -> tuple[float, float, float]:
        """What a nanosecond of CPU side, GPU side and link counts.

        latency: one after the other, as a request waits for them. throughput: sidecars share the CPU side's work. gpu_cost: the
        CPU side and its link count as its power does beside the GPU's, in place of prices, which differ between any two users.
        """
        if self.objective == "latency":
            return 1.0, 1.0, 1.0
        if self.objective == "throughput":
            return 1.0 / self.sidecars, 1.0, 1.0
        share = find_processor("cpu", self.cpu).watts / find_processor("gpu", self.gpu).watts
        return share, 1.0, share


@dataclass(frozen=True)
class Item:
    """One thing to place. Times and bytes are means over the batch sizes."""

    kind: Kind
    node: fx.Node
    needs: tuple[int, ...] = ()
    index_needs: tuple[int, ...] = ()
    """Of a lookup in a sidecar: the index program's operators."""
    cpu_ns: float = 0.0
    gpu_ns: float = 0.0
    request_bytes: float = 0.0
    """What computing it in a sidecar makes travel there."""
    result_bytes: float = 0.0
    flops: float = 0.0
    lookup: Lookup | None = None
    pinned: str | None = None
    """Why it cannot be anywhere else today."""
    sendable: bool = True
    """Whether its result can travel today: floats that lookups lead to."""


@dataclass(frozen=True)
class CutModel:
    """Items in graph order, the last of them what the model returns."""

    items: tuple[Item, ...]
    options: CutOptions

    def problem(self, *, today: bool, gpu_table_bytes: int | None = None) -> Problem:
        """As an exact problem. today: only what can be executed today; otherwise as if sidecars ran any operator."""
        limit = self.options.gpu_table_bytes if gpu_table_bytes is None else gpu_table_bytes
        tables: dict[str, list[int]] = {}
        for i, item in enumerate(self.items):
            if item.lookup is not None:
                tables.setdefault(item.lookup.table, []).append(i)
        stuck = {i for held in tables.values() if any(self.items[i].pinned for i in held) for i in held}
        operators = tuple(self._operator(i, today, i in stuck) for i in range(len(self.items)))
        residents = tuple(
            Resident(name, _table_bytes(self.items[held[0]]), tuple(held))
            for name, held in tables.items()
            if not (today and held[0] in stuck)
        )
        round_trip = find_link(self.options.link).round_trip_ns * self.options.weights[2]
        return Problem(operators, residents, round(round_trip * UNITS_PER_NS), limit)

    def _operator(self, i: int, today: bool, stuck: bool) -> Operator:
        item, (cpu_weight, gpu_weight, _) = self.items[i], self.options.weights
        name = item.node.name
        if item.kind == "return":
            return Operator(name, None, 0, gpu_needs=self._sendable(item.needs), wanted=True)
        cpu = round(cpu_weight * item.cpu_ns * UNITS_PER_NS) + self._link_units(item.request_bytes)
        gpu = round(gpu_weight * item.gpu_ns * UNITS_PER_NS)
        send = self._link_units(item.result_bytes + BLOCK_BYTES) if item.sendable or not today else None
        if item.kind in ("index", "input"):  # on the ranker's CPU, or on the way to a sidecar
            return Operator(name, cpu, None, cpu_needs=item.index_needs)
        if item.kind == "lookup":
            only_cpu = today and stuck
            needs = () if only_cpu else self._sendable(item.needs)
            return Operator(
                name, cpu, None if only_cpu else gpu, send, item.index_needs, needs, exclusive=not only_cpu, remote=True
            )
        if item.pinned is not None and today:
            return Operator(name, None, gpu, gpu_needs=self._sendable(item.needs))
        return Operator(name, cpu, gpu, send, item.needs, self._sendable(item.needs), remote=True)

    def _sendable(self, needs: Sequence[int]) -> tuple[int, ...]:
        """`needs` without the model's inputs, which the GPU side has."""
        return tuple(u for u in needs if self.items[u].kind != "input")

    def _link_units(self, count: float) -> int:
        link = find_link(self.options.link)
        return round(self.options.weights[2] * count / link.bytes_per_s * 1e9 * UNITS_PER_NS) if count else 0


def build_model(
    captured: Captured, lookups: Sequence[Lookup], ids: Mapping[Lookup, float], options: CutOptions, movable: Movable = NOTHING
) -> CutModel:
    """What there is to place. ids: mean ids per bag of every lookup. Raises `CutError` for wrong options."""
    options.check()
    return _Builder(captured, lookups, ids, options, movable).build()


class _Builder:
    def __init__(
        self, captured: Captured, lookups: Sequence[Lookup], ids: Mapping[Lookup, float], options: CutOptions, movable: Movable
    ) -> None:
        self.captured, self.lookups, self.ids, self.options, self.movable = captured, lookups, ids, options, movable
        self.cpu, self.gpu = find_processor("cpu", options.cpu), find_processor("gpu", options.gpu)
        self.sizes = Sizes(
            {
                str(x.source.values.meta["val"].shape[0]): ids[x]
                for x in lookups
                if isinstance(x.source, Jagged) and isinstance(x.source.values.meta["val"].shape[0], torch.SymInt)
            }
        )
        self.items: list[Item] = []
        self.index: dict[fx.Node, int] = {}
        self.of: dict[fx.Node, int] = {}
        """Items by the graph node whose result they give to the GPU side or to operators behind lookups."""
        self.varying = varying_nodes(captured)

    def build(self) -> CutModel:
        roots = [x.source.root for x in self.lookups if isinstance(x.source, Columns)]
        at_ranker = self._before(roots, frozenset())
        ends = {x.output: x for x in self.lookups}
        live = self._before(self.captured.outputs, frozenset(ends))
        between = {x: self._between(x) for x in self.lookups}
        kept_ids = self._before([n for x in self.lookups for n in self._ids_of(between[x])], frozenset(ends))
        for node in self.captured.inputs:
            self._add(node, Item("input", node, request_bytes=self._mean(partial(result_bytes, node))))
        for node in self.captured.graph.nodes:
            if node in at_ranker:
                needs = tuple(self.index[n] for n in node.all_input_nodes if n in self.index)
                self.index[node] = len(self.items)
                self.items.append(self._timed(Item("index", node, index_needs=needs, pinned="index arithmetic for sidecars")))
            if node in ends:
                self._add(node, self._lookup(ends[node], between[ends[node]]))
            elif node in live or node in kept_ids:
                self._add(node, self._dense(node))
        back = next(n for n in self.captured.graph.nodes if n.op == "output")
        self.items.append(Item("return", back, tuple(dict.fromkeys(self.of[n] for n in self.captured.outputs if n in self.of))))
        return CutModel(tuple(self.items), self.options)

    def _add(self, node: fx.Node, item: Item) -> None:
        self.of[node] = len(self.items)
        self.items.append(item)

    def _dense(self, node: fx.Node) -> Item:
        if node in self.movable.free and is_moved(node) and all(self.items[i].kind == "input" for i in self._needs([node])):
            return Item("input", node, request_bytes=self._mean(partial(result_bytes, node)))  # a part of an input travels alone
        pinned = None if node in self.movable.operators else self.movable.reasons.get(node, ONLY_LOOKUPS)
        value = node.meta.get("val")
        floats = isinstance(value, Tensor) and value.dtype is torch.float32
        return self._timed(
            Item("dense", node, self._needs([node]), pinned=pinned, sendable=floats and node not in self.movable.free)
        )

    def _needs(self, nodes: Sequence[fx.Node]) -> tuple[int, ...]:
        """Items that the inputs of `nodes` from outside are."""
        outside = (n for node in nodes for n in node.all_input_nodes if n not in nodes)
        return tuple(dict.fromkeys(self.of[n] for n in outside if n in self.of))

    def _before(self, nodes: Sequence[fx.Node], stop: frozenset[fx.Node]) -> set[fx.Node]:
        """Operators that `nodes` depend on, themselves included, whose values vary with the inputs; not through `stop`."""
        seen: set[fx.Node] = set()
        waiting = list(nodes)
        while waiting:
            node = waiting.pop()
            if node in seen or node in stop or node.op == "placeholder" or node not in self.varying:
                continue
            seen.add(node)
            waiting.extend(node.all_input_nodes)
        return seen

    def _between(self, lookup: Lookup) -> list[fx.Node]:
        """The operators that a lookup stands for: from its own to the one whose result it replaces, in graph order."""
        found: dict[fx.Node, None] = {lookup.node: None}
        for node in self._after(lookup):
            if not found.keys().isdisjoint(node.all_input_nodes):
                found[node] = None
        return list(found)

    def _after(self, lookup: Lookup) -> Iterator[fx.Node]:
        node = lookup.node
        while node is not lookup.output:
            node = node.next
            yield node

    def _ids_of(self, between: Sequence[fx.Node]) -> list[fx.Node]:
        return [n for node in between for n in node.all_input_nodes if n not in between and n.op != "placeholder"]

    def _lookup(self, lookup: Lookup, between: Sequence[fx.Node]) -> Item:
        ids, element = self.ids[lookup], lookup.weight.element_size()
        vectors = ids if lookup.pooling is Pooling.NONE else 1.0
        samples = sum(b * share for b, share in self.options.batches.items())
        read, written = samples * ids * lookup.dim * element, samples * vectors * lookup.dim * element
        request = samples * (ids * ID_BYTES + (LENGTH_BYTES if isinstance(lookup.source, Jagged) else 0))
        in_sidecar = Work(samples * ids * lookup.dim, written + samples * ids * ID_BYTES, read, launches=0, lookups=1)
        root = lookup.source.root if isinstance(lookup.source, Columns) else None
        fixed = root is not None and lookup.weights is None
        return Item(
            "lookup",
            lookup.output,
            self._needs(between),
            (self.index[root],) if root in self.index else (),
            cpu_ns=in_sidecar.time_ns(self.cpu),
            gpu_ns=self._mean(lambda size: sum(work_of(n, size).time_ns(self.gpu) for n in between)),
            request_bytes=request,
            result_bytes=written,
            flops=in_sidecar.flops,
            lookup=lookup,
            pinned=None if fixed else ONLY_SIDECARS,
        )

    def _timed(self, item: Item) -> Item:
        node = item.node
        return Item(
            item.kind,
            node,
            item.needs,
            item.index_needs,
            cpu_ns=self._mean(lambda size: work_of(node, size).time_ns(self.cpu)),
            gpu_ns=self._mean(lambda size: work_of(node, size).time_ns(self.gpu)),
            result_bytes=self._mean(lambda size: result_bytes(node, size)),
            flops=self._mean(lambda size: work_of(node, size).flops),
            pinned=item.pinned,
            sendable=item.sendable,
        )

    def _mean(self, value: Callable[[Size], float]) -> float:
        return sum(share * value(self.sizes.of(batch)) for batch, share in self.options.batches.items())


def _table_bytes(item: Item) -> int:
    assert item.lookup is not None
    weight: Tensor = item.lookup.weight
    return weight.numel() * weight.element_size()
