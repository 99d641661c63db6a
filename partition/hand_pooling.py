"""Pooling written by hand behind a lookup: told apart from what only looks like it, so that pooled vectors travel, not rows.

Rows `[batch, ids, dim]` that are summed, averaged or maximised over their ids, all of them or those that a mask keeps. A mask
counts where it provably is one: truth values, computed from inputs and buffers alone, one per id and alike for all of its row.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from sidepool.partition.capture import Captured
from sidepool.partition.sources import MOVES, PROBE_BATCHES, evaluate, find_columns, is_piece, packet, probe_inputs, value_ancestors
from sidepool.wire.plan import Pooling

aten = torch.ops.aten
# Operators that repeat elements, or keep truth values as numbers.
_SPREADS = {aten.repeat, aten.repeat_interleave, aten.expand_as, aten._to_copy, aten.to, aten.type_as}
_LOOKUPS = {aten.embedding, aten.embedding_bag, aten._embedding_bag, aten._embedding_bag_forward_only}


@dataclass(frozen=True)
class Mask:
    """Truth values, one per id: the ids that a bag keeps, or with `keeps` False those that it leaves out."""

    node: fx.Node
    keeps: bool


@dataclass(frozen=True)
class HandPooling:
    """What a model does to rows `[batch, ids, dim]`, as a pooled lookup does it."""

    pooling: Pooling
    output: fx.Node
    """The node whose value the pooled vectors are."""
    mask: Mask | None = None
    empty: float | None = None
    """What a bag without ids gives, where that is not zero."""


def find_hand_pooling(captured: Captured, rows: fx.Node, table: Tensor) -> HandPooling | None:
    """The pooling that `rows`, looked up in `table`, are only used for; None where they are used otherwise."""
    user = _only_user(rows)
    if user is None or rows.meta["val"].dim() != 3:
        return None
    if user.target in {aten.bmm.default, aten.matmul.default} and user.args[1] is rows:
        mask = _mask(captured, user.args[0], rows, flat=True)
        return None if mask is None else HandPooling(Pooling.SUM, user, mask)
    plain = _reduction(user)
    if plain is not None:
        return HandPooling(*plain)
    value = user.meta["val"]
    same = isinstance(value, Tensor) and value.dtype is rows.meta["val"].dtype and value.dim() == 3
    selected = _selection(captured, user, rows, table) if same else None
    reducer = _only_user(user)
    reduced = _reduction(reducer) if selected is not None and reducer is not None else None
    if selected is None or reduced is None:
        return None
    mask, others = selected
    pooling, output = reduced
    if pooling is Pooling.SUM and others == 0:
        return HandPooling(pooling, output, mask)
    # Left out ids must lose against every row; a bag that has no other gives what stands for them.
    if pooling is Pooling.MAX and others < float(table.detach().min()) and output not in captured.outputs:
        return HandPooling(pooling, output, mask, others)
    return None


def apply_mask(captured: Captured, ids: fx.Node, found: HandPooling, rows: int) -> tuple[fx.Node, int | None]:
    """The ids and the padding index that give `found`'s pooling over a table of `rows` rows.

    Where the mask is not simply one id, ids that it leaves out become `rows`, an id that is nothing but padding. May add
    nodes to the captured graph.
    """
    if found.mask is None:
        return ids, None
    padding: int | None = _padding_id(captured, ids, found.mask, rows)
    graph = captured.graph
    # Before the reduction itself: the element taken from its results must follow it.
    with graph.inserting_before(found.output.all_input_nodes[0] if found.output.target is operator.getitem else found.output):
        keep = found.mask.node
        if found.empty is not None or padding is None:
            if keep.meta["val"].dim() > 2:
                keep = _added(graph, aten.flatten.using_ints, (keep, 1, -1), keep.meta["val"].flatten(1))
            if not found.mask.keeps:
                keep = _added(graph, aten.logical_not.default, (keep,), keep.meta["val"])
        if padding is None:
            ids, padding = _added(graph, aten.where.ScalarOther, (keep, ids, rows), ids.meta["val"]), rows
    if found.empty is not None:
        _set_empty(captured, found, keep)
    return ids, padding


def _set_empty(captured: Captured, found: HandPooling, keep: fx.Node) -> None:
    """Behind the pooled vectors: what a bag without ids gives."""
    graph, output = captured.graph, found.output
    with graph.inserting_after(output):
        some = _added(graph, aten.any.dim, (keep, 1, True), keep.meta["val"].any(1, True))
    last = some
    if output.meta["val"].dim() == 3:
        with graph.inserting_after(some):
            last = _added(graph, aten.unsqueeze.default, (some, 2), some.meta["val"].unsqueeze(2))
    with graph.inserting_after(last):
        fixed = _added(graph, aten.where.ScalarOther, (last, output, found.empty), output.meta["val"])
    output.replace_all_uses_with(fixed, delete_user_cb=lambda user: user is not fixed)


def _added(graph: fx.Graph, target: Any, args: tuple[Any, ...], value: Any) -> fx.Node:
    node = graph.call_function(target, args)
    node.meta["val"] = value
    return node


def _padding_id(captured: Captured, ids: fx.Node, mask: Mask, rows: int) -> int | None:
    """The one id that the mask leaves out, if that is what it does. A lookup has no negative ids, so `> 0` is `!= 0`."""
    node = mask.node
    leaves_out = {aten.ne.Scalar: True, aten.gt.Scalar: True, aten.eq.Scalar: False, aten.le.Scalar: False}
    if leaves_out.get(node.target) is not mask.keeps:  # type: ignore[call-overload]
        return None
    compared: Any = node.args[0]
    value: Any = node.args[1]
    if value != int(value) or not 0 <= value < rows or (value != 0 and node.target in {aten.gt.Scalar, aten.le.Scalar}):
        return None
    width = int(ids.meta["val"].shape[1])
    same = compared is ids or find_columns(captured, compared, width) == find_columns(captured, ids, width)
    return int(value) if same else None


def _selection(captured: Captured, user: fx.Node, rows: fx.Node, table: Tensor) -> tuple[Mask, float] | None:
    """The mask that `user` applies to `rows`, and what it puts in place of the rows that are left out."""
    args: Any = user.args
    if user.target is aten.mul.Tensor:
        other = args[0] if args[1] is rows else args[1]
        mask = _mask(captured, other, rows)
        return None if mask is None else (mask, 0.0)
    if user.target is aten.masked_fill.Scalar and args[0] is rows:
        mask = _mask(captured, args[1], rows)
        return None if mask is None else (Mask(mask.node, not mask.keeps), float(args[2]))
    if user.target is aten.where.ScalarOther and args[1] is rows:
        mask = _mask(captured, args[0], rows)
        return None if mask is None else (mask, float(args[2]))
    if user.target is aten.sub.Tensor and args[0] is rows:
        return _penalty(captured, args[1], rows, table)
    return None


def _penalty(captured: Captured, penalty: object, rows: fx.Node, table: Tensor) -> tuple[Mask, float] | None:
    """Rows from which `(1 - mask) * number` is taken: as if replaced, where the number is so large that no row shows in it."""
    if not isinstance(penalty, fx.Node) or penalty.target not in {aten.mul.Tensor, aten.mul.Scalar}:
        return None
    inverse, number = penalty.args
    if not isinstance(number, float | int) or not isinstance(inverse, fx.Node) or inverse.target is not aten.rsub.Scalar:
        return None
    if inverse.args[1] != 1 or len(inverse.args) > 2:
        return None
    mask = _mask(captured, inverse.args[0], rows)
    ends = torch.stack(table.detach().aminmax()) - float(number)
    return (mask, -float(number)) if mask is not None and bool((ends == -float(number)).all()) else None


def _mask(captured: Captured, spread: object, rows: fx.Node, *, flat: bool = False) -> Mask | None:
    """The truth values that `spread` is, one per id of `rows` (`flat`: laid out `[batch, 1, ids]`); None for anything else."""
    root, keeps = spread, True
    while isinstance(root, fx.Node) and root.all_input_nodes:
        if _is_truth(root) and not _is_truth(root.all_input_nodes[0]):
            break
        if packet(root) in {aten.logical_not, aten.bitwise_not} and _is_truth(root):
            keeps = not keeps
        elif not (packet(root) in MOVES | _SPREADS or is_piece(root)):
            break
        root = root.all_input_nodes[0]
    if not isinstance(root, fx.Node) or not isinstance(spread, fx.Node) or not _is_truth(root):
        return None
    if any(n in captured.parameters or packet(n) in _LOOKUPS for n in value_ancestors(root)):
        return None
    inner = root.meta["val"].shape[1:]
    ids, dim = (int(n) for n in rows.meta["val"].shape[1:])
    if not all(isinstance(n, int) for n in inner) or math.prod(inner) != ids:
        return None
    alike = _spreads_evenly(captured, spread, root, ids, dim, keeps=keeps, flat=flat)
    return Mask(root, keeps) if alike else None


def _is_truth(node: fx.Node) -> bool:
    """Whether a node gives truth values: a tensor of them, or, before one is chosen, several."""
    value = node.meta["val"]
    return getattr(value[0] if isinstance(value, list | tuple) else value, "dtype", None) is torch.bool


def _spreads_evenly(captured: Captured, spread: fx.Node, root: fx.Node, ids: int, dim: int, *, keeps: bool, flat: bool) -> bool:
    """Whether each element of `root` lands on the row of its own id, all along it: tell it by numbering them.

    Numbers do not pass a negation; behind one, every bit of the numbers passes by itself.
    """
    inner = [int(n) for n in root.meta["val"].shape[1:]]
    for batch in PROBE_BATCHES:
        numbers = torch.arange(1, batch * ids + 1).view(batch, *inner)
        known = probe_inputs(captured, batch)
        bits = [numbers] if keeps else [(numbers >> i) & 1 == 1 for i in range(int(numbers.max()).bit_length())]
        for given in bits:
            expected = given if keeps else ~given
            if not _lies_along(evaluate(spread, known | {root: given}), expected, batch, ids, dim, flat=flat):
                return False
    return True


def _lies_along(found: Tensor, element: Tensor, batch: int, ids: int, dim: int, *, flat: bool) -> bool:
    if flat:
        return found.shape == (batch, 1, ids) and torch.equal(found.double(), element.reshape(batch, 1, ids).double())
    if found.dim() != 3 or found.shape[:2] != (batch, ids) or found.shape[2] not in (1, dim):
        return False
    return torch.equal(found.double(), element.reshape(batch, ids, 1).expand(found.shape).double())


def _reduction(node: fx.Node) -> tuple[Pooling, fx.Node] | None:
    """What reduces `[batch, ids, dim]` over its ids, and the node that holds the result."""
    if node.target in {aten.sum.dim_IntList, aten.mean.dim} and node.args[1] in ([1], [-2]) and node.kwargs.get("dtype") is None:
        return (Pooling.SUM if node.target is aten.sum.dim_IntList else Pooling.MEAN), node
    if node.target is aten.amax.default and node.args[1] in ([1], [-2]):
        return Pooling.MAX, node
    if node.target is aten.max.dim and node.args[1] in (1, -2):
        result = _only_user(node)
        return (Pooling.MAX, result) if result is not None and result.args[1] == 0 else None
    return None


def _only_user(node: fx.Node) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 else None
