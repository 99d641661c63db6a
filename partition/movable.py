"""Which operators sidecars can run behind lookups.

An operator may leave when it works on rows that are not pooled, or leads to one that does: what reduces them, such as attention
over a history, makes less of them travel.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, float32, fx

from sidepool.partition.capture import Captured
from sidepool.partition.lookups import Lookup
from sidepool.partition.lowering import Mixing, Unsupported, Values, sample_shape
from sidepool.partition.native_operators import lower
from sidepool.partition.sources import SIZES, Columns, is_moved, packet
from sidepool.wire.plan import Pooling


def varying_nodes(captured: Captured) -> frozenset[fx.Node]:
    """Inputs, and what depends on their values, not only on their sizes."""
    found = set(captured.inputs)
    for node in captured.graph.nodes:
        if packet(node) not in SIZES and not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return frozenset(found)


@dataclass(frozen=True)
class Movable:
    """What sidecars can run besides lookups."""

    operators: frozenset[fx.Node]
    free: frozenset[fx.Node]
    """Those of them that no lookup leads to: the ranker computes them, or the program does."""
    reasons: Mapping[fx.Node, str]
    """Why an operator behind unpooled rows cannot be among them."""
    torch: frozenset[fx.Node] = frozenset()
    """Those of the operators that take torch."""


NOTHING = Movable(frozenset(), frozenset(), {})


def movable_operators(captured: Captured, lookups: Sequence[Lookup], *, torch: bool = False) -> Movable:
    """Operators over unpooled rows of fixed width that programs have, and what leads to them; torch: or that torch has."""
    varying = varying_nodes(captured)
    given = {x.output: x for x in lookups if _readable(x)}
    behind = _behind(captured, [x.output for x in lookups], varying)
    over_rows = _over_rows(captured, given, varying)
    wanted = _leading_to(over_rows, varying, frozenset(x.output for x in lookups))
    free = frozenset(n for n in wanted if n not in behind)
    leaves = [*given, *(n for n in free if is_sendable(n))]
    values = Values(captured, varying, leaves)
    reasons, foreign = {}, set()
    for node in captured.graph.nodes:
        if node in wanted and node not in free:
            try:
                lower(values, node)
            except Unsupported as e:
                known = all(n in values for n in node.all_input_nodes if n in varying)
                if torch and known and is_sendable(node) and not isinstance(e, Mixing):
                    foreign.add(node)
                    values.stand_in(node)
                else:
                    reasons[node] = f"sidecars do not run {e}"
    return Movable(frozenset(wanted - reasons.keys()), free, reasons, frozenset(foreign))


def _readable(lookup: Lookup) -> bool:
    """Whether a program can look it up: a fixed number of ids, rows that are not weighted behind it, results in fp32."""
    return isinstance(lookup.source, Columns) and lookup.weights is None and lookup.weight.dtype is float32 and not lookup.flat


def is_sendable(node: fx.Node) -> bool:
    """Whether a value can be part of a record."""
    try:
        sample_shape(node)
    except Unsupported:
        return False
    return True


def _behind(captured: Captured, ends: Sequence[fx.Node], varying: frozenset[fx.Node]) -> frozenset[fx.Node]:
    """Operators that depend on lookups, these included."""
    found = set(ends)
    for node in captured.graph.nodes:
        if node in varying and not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return frozenset(found)


def _over_rows(captured: Captured, given: Mapping[fx.Node, Lookup], varying: frozenset[fx.Node]) -> set[fx.Node]:
    """Operators that read values with a dimension as long as a sequence of rows, and that depend on the rows."""
    lengths: dict[fx.Node, set[int]] = {}
    for output, lookup in given.items():
        assert isinstance(lookup.source, Columns)
        if lookup.pooling is Pooling.NONE:
            sizes = {int(n) for n in output.meta["val"].shape[1:-1]}
            lengths[output] = sizes - {1}
    found: set[fx.Node] = set()
    for node in captured.graph.nodes:
        if node not in varying or node in given:
            continue
        read = set().union(*(lengths.get(n, set()) for n in node.all_input_nodes))
        taken = node.target is operator.getitem and node.args[0] in found  # of several results, with what gives them
        if (read or taken) and _tensors(node):
            found.add(node)
            lengths[node] = {n for t in _tensors(node) for n in _lengths(node, t, read)}
    return found


def _lengths(node: fx.Node, result: Tensor, read: set[int]) -> set[int]:
    """Which sizes of a result are as long as sequences: those that `read` has, or what a part has in their place."""
    before = node.all_input_nodes[0].meta.get("val")
    if is_moved(node) and isinstance(before, Tensor) and before.dim() == result.dim():
        pairs = [pair for pair in zip(result.shape[1:], before.shape[1:], strict=True) if all(isinstance(n, int) for n in pair)]
        return {int(n) for n, whole in pairs if whole in read or n in read} - {1}
    return read.intersection(n for n in result.shape[1:] if isinstance(n, int))


def _tensors(node: fx.Node) -> list[Tensor]:
    value = node.meta.get("val")
    return [t for t in (value if isinstance(value, list | tuple) else (value,)) if isinstance(t, Tensor)]


def _leading_to(nodes: set[fx.Node], varying: frozenset[fx.Node], stop: frozenset[fx.Node]) -> set[fx.Node]:
    """`nodes` and the operators before them, up to lookups and inputs."""
    found: set[fx.Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found and node not in stop and node in varying and node.op == "call_function":
            found.add(node)
            waiting.extend(node.all_input_nodes)
    return found
