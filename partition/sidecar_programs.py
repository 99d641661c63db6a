"""Programs of sidecars: what the cut put on the CPU side besides lookups, brought into the form that plans have.

A program is a connected set of operators; what it gives is one feature of the plan, and its tables lie on one sidecar.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from sidepool.partition.capture import Captured
from sidepool.partition.cut_model import CutOptions
from sidepool.partition.decision import Decision, decide
from sidepool.partition.exporting import source_line
from sidepool.partition.lookups import NAME_LENGTH, Lookup
from sidepool.partition.lowering import Steps, Unsupported, Values, sample_shape
from sidepool.partition.movable import Movable, is_sendable, varying_nodes
from sidepool.partition.native_operators import lower
from sidepool.partition.programs import Copier, batch_sizes, program_bytes
from sidepool.partition.sources import Columns
from sidepool.wire.checksum import crc32c
from sidepool.wire.plan import MAX_DIM, Pooling
from sidepool.wire.program import MAX_LEAVES, MAX_WORDS, Program, ProgramInput, ProgramLookup, TorchFile

aten = torch.ops.aten
# Letters that file names do without.
_ODD = re.compile(r"[^A-Za-z0-9_.\-]")
# Bytes of a float and of a truth value in a record.
_BYTES = {torch.float32: 4, torch.bool: 1}


@dataclass(frozen=True)
class Sketch:
    """A connected set of operators that the cut put on the CPU side."""

    operators: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    """What of it the dense program needs."""
    lookups: tuple[Lookup, ...]
    """What it reads."""

    @property
    def columns(self) -> int:
        """Values of its result per sample."""
        return sum(math.prod(sample_shape(n)) for n in self.outputs)

    @property
    def tables(self) -> frozenset[str]:
        """Tables that must lie together."""
        return frozenset(x.table for x in self.lookups)

    def shrinks(self, travelling: frozenset[fx.Node]) -> bool:
        """Whether its result is less than the rows that travel without it alone."""
        saved = sum(math.prod(sample_shape(x.output)) for x in self.lookups if x.output not in travelling)
        return self.columns < saved

    def refused(self, travelling: frozenset[fx.Node], sidecar_bytes: int | None) -> str | None:
        """Why it does not become a program, if so. travelling: results of lookups that the dense program needs as well."""
        if not self.shrinks(travelling):
            return "what it gives is no less than the rows that it reads"
        if self.columns > MAX_DIM:
            return f"as a program it would send {self.columns} values a sample; allowed: {MAX_DIM}"
        held = {x.table: x.weight.numel() * x.weight.element_size() for x in self.lookups}
        if sidecar_bytes is not None and sum(held.values()) > sidecar_bytes:
            return f"a program reads tables whole on one sidecar, and these take {sum(held.values())} bytes of {sidecar_bytes}"
        return None


def sketches(decision: Decision, movable: Movable) -> tuple[Sketch, ...]:
    """The programs that a decision asks for, in graph order."""
    items = decision.model.items
    sent = {items[i].node for i in decision.sent}
    lookups = {x.lookup.output: x.lookup for x in items if x.lookup is not None}
    placed = [items[i].node for i in sorted(decision.chosen.placement.cpu) if items[i].kind == "dense"]
    placed = [n for n in placed if n not in movable.free]
    group: dict[fx.Node, fx.Node] = {}

    def leader(node: fx.Node) -> fx.Node:
        while group.setdefault(node, node) is not node:
            node = group[node]
        return node

    members = set(placed)
    for node in placed:
        for read in node.all_input_nodes:
            if read in members or read in lookups:
                group[leader(read)] = leader(node)
    connected: dict[fx.Node, list[fx.Node]] = {}
    for node in placed:
        connected.setdefault(leader(node), []).append(node)
    return tuple(found for nodes in connected.values() if (found := _sketch(nodes, sent, lookups)) is not None)


def _sketch(nodes: Sequence[fx.Node], sent: set[fx.Node], lookups: Mapping[fx.Node, Lookup]) -> Sketch | None:
    outputs = tuple(n for n in nodes if n in sent)
    members, needed = set(nodes), set[fx.Node]()
    waiting = list(outputs)
    while waiting:
        node = waiting.pop()
        if node in members and node not in needed:
            needed.add(node)
            waiting.extend(node.all_input_nodes)
    read = dict.fromkeys(x for n in nodes if n in needed for x in n.all_input_nodes if x in lookups)
    return Sketch(tuple(n for n in nodes if n in needed), outputs, tuple(lookups[x] for x in read)) if outputs else None


def make_computed(captured: Captured, sketch: Sketch, name: str, torch_nodes: frozenset[fx.Node] = frozenset()) -> Lookup:
    """The feature that a program is: its record, whose arithmetic is added to the captured graph, its steps and its weights.

    torch_nodes: operators that no step does; with one of them, torch runs the whole program. Raises `Unsupported` where the whole
    is more than a program may be.
    """
    varying = varying_nodes(captured)
    members = set(sketch.operators)
    ends = {x.output for x in sketch.lookups}
    frontier = dict.fromkeys(
        x for n in sketch.operators for x in n.all_input_nodes if x in varying and x not in members and x not in ends
    )
    boundary: dict[fx.Node, None] = {}
    inside: set[fx.Node] = set()
    for node in frontier:
        _shrink(captured, varying, node, boundary, inside)
    inside -= boundary.keys()
    leaves = [*(x.output for x in sketch.lookups), *boundary]
    words = sum(_ids(x) for x in sketch.lookups) + sum(-(-_size(n) // 8) for n in boundary)
    if len(leaves) > MAX_LEAVES or words > MAX_WORDS:
        raise Unsupported(f"{len(leaves)} lookups and inputs of {words} words; allowed: {MAX_LEAVES} and {MAX_WORDS}")
    values, content, steps, file = Values(captured, varying, leaves), b"", Steps(), None
    foreign = sorted({str(n.target) for n in members & torch_nodes})
    if foreign:
        content = _torch_file(captured, sketch, leaves)
        file = TorchFile(file=f"{_ODD.sub('_', name)}.pt2", crc32c=crc32c(content), operators=tuple(foreign))
    else:
        steps = values.steps
        for node in captured.graph.nodes:
            if node in members or node in inside:
                lower(values, node)
        column = 0
        for output in sketch.outputs:
            column = steps.result(values.view(output), column)
    record, reads, inputs = _record(captured, sketch.lookups, list(boundary))
    program = Program(
        words=words, floats=steps.floats, lookups=tuple(reads), inputs=tuple(inputs), steps=tuple(steps.steps), torch=file
    )
    weights, source, first = _as_rows(steps.weights(), sketch.columns), Columns(record, 0, words), sketch.outputs[0]
    return Lookup(
        first, first, name, weights, Pooling.SUM, source,
        program=program, outputs=sketch.outputs, reads={x.table: x.weight for x in sketch.lookups}, torch_file=content,
    )  # fmt: skip


def _torch_file(captured: Captured, sketch: Sketch, leaves: Sequence[fx.Node]) -> bytes:
    """The program for torch: `[samples, values]` of every leaf in, `[samples, columns]` out."""
    copier = Copier(captured, f"program over {sketch.outputs[0].name}", batch_sizes(captured, sketch.lookups))
    graph = copier.graph
    flat = [graph.placeholder(f"leaf_{i}") for i in range(len(leaves))]
    copier.anchor = flat[0]
    examples = []
    for node, given in zip(leaves, flat, strict=True):
        shape = sample_shape(node)
        value = graph.call_function(aten.reshape.default, (given, [-1, *shape]))
        truth = node.meta["val"].dtype is torch.bool
        copier.copies[node] = graph.call_function(aten.ne.Scalar, (value, 0)) if truth else value
        examples.append(torch.zeros(captured.expected[0].shape[0], math.prod(shape)))
    for node in copier.needed(*sketch.outputs):
        copier.copy(node)
    columns = [(copier.copies[n], [-1, math.prod(sample_shape(n))]) for n in sketch.outputs]
    joined = graph.call_function(aten.cat.default, ([graph.call_function(aten.reshape.default, c) for c in columns], 1))
    return program_bytes(copier.export([joined], examples))


def _as_rows(weights: Tensor, dim: int) -> Tensor:
    """Weights as rows of a table, at least one, the last filled up with zeros."""
    rows = max(1, -(-weights.numel() // dim))
    filled = torch.zeros(rows * dim)
    filled[: weights.numel()] = weights
    return filled.view(rows, dim)


def _shrink(
    captured: Captured, varying: frozenset[fx.Node], node: fx.Node, boundary: dict[fx.Node, None], inside: set[fx.Node]
) -> None:
    """Send `node`, or what it is computed from where that is no more and programs have its operator."""
    needed = [n for n in node.all_input_nodes if n in varying]
    if node.op == "call_function" and needed and all(map(is_sendable, needed)) and sum(map(_size, needed)) <= _size(node):
        try:
            lower(Values(captured, varying, needed), node)
        except Unsupported:
            pass
        else:
            inside.add(node)
            for n in needed:
                _shrink(captured, varying, n, boundary, inside)
            return
    boundary.setdefault(node)


def _ids(lookup: Lookup) -> int:
    assert isinstance(lookup.source, Columns)
    return lookup.source.end - lookup.source.begin


def _size(node: fx.Node) -> int:
    return math.prod(sample_shape(node)) * _BYTES[node.meta["val"].dtype]


def _record(
    captured: Captured, lookups: Sequence[Lookup], given: Sequence[fx.Node]
) -> tuple[fx.Node, list[ProgramLookup], list[ProgramInput]]:
    """A node `[batch, words]`, int64, with ids and packed numbers, and where in it they lie."""
    graph = captured.graph
    last = next(n for n in graph.nodes if n.op == "output")
    parts: list[fx.Node] = []
    reads, inputs, at = [], [], 0
    with graph.inserting_before(last):
        for lookup in lookups:
            source = lookup.source
            assert isinstance(source, Columns)
            ids = _ids(lookup)
            sizes = source.root.meta["val"].shape[1:]
            matrix = _add(graph, aten.reshape.default, source.root, [-1, math.prod(int(n) for n in sizes) if sizes else ids])
            columns = _add(graph, aten.slice.Tensor, matrix, 1, source.begin, source.end)
            parts.append(_add(graph, aten.to.dtype, columns, torch.int64))
            padding = lookup.padding_index
            reads.append(ProgramLookup(table=lookup.table, pooling=str(lookup.pooling), padding_index=padding, begin=at, ids=ids))  # type: ignore[arg-type]
            at += ids
        for node in given:
            truth = node.meta["val"].dtype is torch.bool
            count = math.prod(sample_shape(node))
            packed = ProgramInput(kind="bytes" if truth else "float32", begin=at, count=count)
            flat = _add(graph, aten.reshape.default, node, [-1, count])
            flat = _add(graph, aten.to.dtype, flat, torch.uint8) if truth else flat
            filling = packed.words * (8 if truth else 2) - count
            padded = _add(graph, aten.constant_pad_nd.default, flat, [0, filling])
            parts.append(_add(graph, aten.view.dtype, padded, torch.int64))
            inputs.append(packed)
            at += packed.words
        return _add(graph, aten.cat.default, parts, 1), reads, inputs


def _add(graph: fx.Graph, target: Any, *args: Any) -> fx.Node:
    node = graph.call_function(target, args)
    values = fx.node.map_arg(args, lambda n: n.meta["val"])
    node.meta["val"] = target(*values)
    return node


@dataclass(frozen=True)
class Programs:
    """A decided cut, and the features of the plan that it makes."""

    decision: Decision
    lookups: tuple[Lookup, ...]
    """Lookups whose results travel, then programs."""
    refused: tuple[str, ...]
    """Operators that would have become a program, and why they did not."""

    @property
    def lines(self) -> tuple[str, ...]:
        """What every program is, for people."""
        return tuple(_described(x) for x in self.lookups if x.program is not None)

    @property
    def together(self) -> tuple[frozenset[str], ...]:
        """Tables that must lie on one sidecar."""
        return tuple(frozenset([x.table, *x.reads]) for x in self.lookups if x.program is not None)


def decide_programs(
    captured: Captured,
    lookups: Sequence[Lookup],
    ids: Mapping[Lookup, float],
    options: CutOptions,
    movable: Movable,
    sidecar_bytes: int | None,
) -> Programs:
    """The cheapest cut whose operators behind lookups all become programs. Raises as `decide` does.

    sidecar_bytes: what a sidecar can hold, so that tables of one program must not take more; None: not checked.
    """
    refused: list[str] = []
    while True:
        decision = decide(captured, lookups, ids, options, movable)
        travelling = frozenset(decision.model.items[i].node for i in decision.sent)
        found = sketches(decision, movable)
        why = {s: reason for s in found if (reason := s.refused(travelling, sidecar_bytes)) is not None}
        computed = []
        for sketch, name in zip(found, _names(found, {x.table for x in lookups}), strict=True):
            try:
                computed += [] if why else [make_computed(captured, sketch, name, movable.torch)]
            except Unsupported as e:
                why[sketch] = f"sidecars do not run {e}"
        if not why:
            break
        refused += [
            f"{s.outputs[0].name} ({source_line(s.outputs[0])}): {reason}" for s, reason in why.items() if s.shrinks(travelling)
        ]
        wrong = {n: reason for s, reason in why.items() for n in s.operators}
        movable = Movable(movable.operators - wrong.keys(), movable.free, {**movable.reasons, **wrong}, movable.torch)
    read = {x for s in found for x in s.lookups}
    left = [x for x in decision.lookups if x.output in travelling or x not in read]
    return Programs(decision, (*left, *computed), tuple(refused))


def _described(found: Lookup) -> str:
    assert found.program is not None
    rows = sum(x.ids for x in found.program.lookups)
    outputs = ", ".join(n.name for n in found.outputs)
    by_torch = found.program.torch
    how = f"{len(found.program.steps)} steps" if by_torch is None else f"torch ({', '.join(by_torch.operators)})"
    return (
        f"program {found.table}: {how} over {rows} rows of {', '.join(found.reads)} to {outputs}; "
        f"{found.program.words} words a sample go there, {found.dim} values come back"
    )


def _names(found: Sequence[Sketch], taken: set[str]) -> list[str]:
    """A table name per program, after the first table whose rows it reduces."""
    names: list[str] = []
    for sketch in found:
        first = next((x for x in sketch.lookups if x.pooling is Pooling.NONE), sketch.lookups[0])
        name = f"{first.table[:NAME_LENGTH]}.program"
        number = 2
        while name in taken:
            name, number = f"{first.table[:NAME_LENGTH]}.program.{number}", number + 1
        taken.add(name)
        names.append(name)
    return names
