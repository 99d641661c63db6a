"""Where ids come from: walk an id tensor of the graph back to model inputs."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from sidepool.partition.capture import Captured
from sidepool.partition.exporting import source_line

aten = torch.ops.aten

# Operators that only move elements: what comes out are entries of what went in.
MOVES = {
    aten.view, aten.reshape, aten._unsafe_view, aten.flatten, aten.unflatten, aten.unsqueeze, aten.squeeze, aten.select,
    aten.slice, aten.narrow, aten.split, aten.split_with_sizes, aten.chunk, aten.unbind, aten.permute, aten.transpose, aten.t,
    aten.clone, aten.contiguous, aten.detach, aten.alias, aten.lift_fresh_copy, aten.expand,
}  # fmt: skip
# Operators that read sizes only: what lies before them does not reach the values.
SIZES = {aten.sym_size, aten.sym_numel, aten.sym_stride}
# Column probing runs the movement operators on this many rows; two sizes tell a batch from a constant.
PROBE_BATCHES = (2, 3)


@dataclass(frozen=True)
class Columns:
    """Ids that are columns `[begin, end)` of `root`, `[batch, …]`, seen as a matrix `[batch, width]`."""

    root: fx.Node
    begin: int
    end: int


def packet(node: fx.Node) -> Any:
    """The operator of a node without its overload (`aten.view` for `aten.view.default`); the function itself otherwise."""
    return getattr(node.target, "overloadpacket", node.target)


def is_moved(node: fx.Node) -> bool:
    """Whether a node gives its input another shape, or a part of it, and computes nothing."""
    return packet(node) in MOVES or node.target is operator.getitem


def value_ancestors(*nodes: fx.Node) -> Iterator[fx.Node]:
    """`nodes` and everything whose values (not only sizes) they depend on."""
    seen: set[fx.Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        if packet(node) not in SIZES:
            waiting.extend(node.all_input_nodes)


def behind_casts(node: fx.Node) -> fx.Node:
    """`node` without the integer casts and copies in front of it."""
    while packet(node) in {aten.clone, aten.contiguous, aten.detach, aten.alias} or _is_integer_cast(node):
        node = node.all_input_nodes[0]
    return node


def find_columns(captured: Captured, ids: fx.Node, bag_ids: int) -> Columns:
    """The matrix whose columns `ids` (`[batch, bag_ids]` in row-major order) are: a model input wherever possible.

    Where arithmetic lies between, the matrix is the arithmetic's result, or `ids` itself where they are not adjacent columns.
    """
    root = ids
    while packet(root) in MOVES or is_piece(root) or _is_integer_cast(root):
        root = root.all_input_nodes[0]
    sizes = root.meta["val"].shape
    if len(sizes) and all(isinstance(n, int) for n in sizes[1:]):
        first = _probe(captured, ids, root, bag_ids)
        if first is not None:
            return Columns(root, first, first + bag_ids)
    return Columns(ids, 0, bag_ids)


def foreign_ids(captured: Captured, root: fx.Node, lookups: frozenset[fx.Node]) -> str | None:
    """What ids depend on beside model inputs and constants, as part of a message; None where there is nothing."""
    for node in value_ancestors(root):
        if node in lookups:
            what = f"on the lookup {node.name} ({source_line(node)})"
        elif node in captured.parameters:
            what = f"on the parameter {captured.states[node][0]}"
        else:
            continue
        return (
            f"its ids ({root.name}, {source_line(root)}) depend {what}; allowed: ids computed from model inputs and buffers only\n"
            "remedy: compute these ids before calling the model"
        )
    return None


def constant_in(nodes: tuple[fx.Node, ...], captured: Captured) -> bool:
    """Whether the values of all `nodes` are independent of every model input (sizes may vary)."""
    return not any(node in captured.inputs for node in value_ancestors(*nodes))


def evaluate(target: fx.Node, known: Mapping[fx.Node, Any]) -> Any:
    """The value of a node, from those of `known` nodes; operators run for real."""
    values = dict(known)
    waiting = [target]
    while waiting:
        node = waiting[-1]
        if node in values:
            waiting.pop()
            continue
        missing = [n for n in node.all_input_nodes if n not in values]
        if missing:
            waiting.extend(missing)
            continue
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        waiting.pop()
    return values[target]


def probe_inputs(captured: Captured, batch: int) -> dict[fx.Node, Tensor]:
    """Zeros in the shape of every model input with every varying size set to `batch`, and the model's states."""
    known = {node: value for node, (_, value) in captured.states.items()}
    for node in captured.inputs:
        value = node.meta["val"]
        known[node] = torch.zeros([n if isinstance(n, int) else batch for n in value.shape], dtype=value.dtype)
    return known


def _probe(captured: Captured, ids: fx.Node, root: fx.Node, bag_ids: int) -> int | None:
    """First column of `ids` in `root` if they are adjacent columns in order: tell it by numbering the elements of `root`."""
    begins = set()
    inner = [int(n) for n in root.meta["val"].shape[1:]]
    width = math.prod(inner)
    for batch in PROBE_BATCHES:
        numbered = torch.arange(batch * width)
        known = probe_inputs(captured, batch) | {root: numbered.view(batch, *inner)}
        found = evaluate(ids, known).reshape(-1)
        if found.numel() != batch * bag_ids:
            return None
        begin = int(found[0])
        columns = numbered.view(batch, width)[:, begin : begin + bag_ids]
        if not torch.equal(found.view(batch, bag_ids), columns):
            return None
        begins.add(begin)
    return begins.pop() if len(begins) == 1 else None


def is_piece(node: fx.Node) -> bool:
    """An element of a split, chunk or unbind."""
    return node.target is operator.getitem and packet(node.all_input_nodes[0]) in MOVES


def _is_integer_cast(node: fx.Node) -> bool:
    """A cast that keeps every id: between integer types, never to a narrower one."""
    if packet(node) not in {aten._to_copy, aten.to}:
        return False
    before, after = node.all_input_nodes[0].meta["val"].dtype, node.meta["val"].dtype
    return (before, after) in {(torch.int32, torch.int64), (torch.int64, torch.int64), (torch.int32, torch.int32)}
