"""Bring a captured graph into the form that recognition expects: nothing computed twice, nothing that does nothing."""

from __future__ import annotations

import sys
from collections.abc import Hashable
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten


def normalise(graph: fx.Graph) -> None:
    """Rewrite `graph`, a functionalised one, in place; every output stays equal for every batch size."""
    for node in list(graph.nodes):
        if node.target is aten.squeeze.default:
            _name_squeezed(node)
        elif node.target in {aten.view.default, aten._unsafe_view.default}:
            # Pieces of the pooled matrix are not contiguous where the model's own tensors were.
            node.target = aten.reshape.default
        replacement = _without_effect(node)
        if replacement is not None:
            node.replace_all_uses_with(replacement)
            graph.erase_node(node)
    _merge_repeats(graph)
    graph.eliminate_dead_code()


def _name_squeezed(node: fx.Node) -> None:
    """`squeeze()` of a batch drops the sizes that are always 1, not a batch that happens to be 1."""
    before = node.all_input_nodes[0].meta["val"].shape
    node.target = aten.squeeze.dims
    node.args = (node.args[0], [i for i, n in enumerate(before) if isinstance(n, int) and n == 1])


def _without_effect(node: fx.Node) -> fx.Node | None:
    """The input that `node` gives unchanged: a slice of everything, a cast to what it is."""
    if node.target is aten.slice.Tensor:
        given: Any = node.args[2:]
        whole = all(n in allowed for n, allowed in zip(given, ((None, 0), (None, sys.maxsize), (1,)), strict=False))
        return node.all_input_nodes[0] if whole else None
    if node.target in {aten.to.dtype, aten._to_copy.default, aten.detach.default, aten.alias.default, aten.detach_.default}:
        before = node.all_input_nodes[0]
        here, there = before.meta["val"], node.meta["val"]
        alike = here.dtype is there.dtype and here.device == there.device and here.stride() == there.stride()
        return before if alike and before.op != "placeholder" else None
    return None


def _merge_repeats(graph: fx.Graph) -> None:
    """Let one node stand for all that do the same to the same: models slice and cast one input again and again."""
    first: dict[Hashable, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or not _repeatable(node):
            continue
        key = (node.target, _frozen(node.args), _frozen(node.kwargs))
        if key in first:
            node.replace_all_uses_with(first[key])
            graph.erase_node(node)
        else:
            first[key] = node


def _repeatable(node: fx.Node) -> bool:
    """Whether an operator gives the same for the same: no random numbers, nothing written, no uninitialised memory."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return getattr(node.target, "__module__", None) == "_operator"  # arithmetic on sizes, an element of a tuple
    steady = torch.Tag.nondeterministic_seeded not in node.target.tags
    return steady and not node.target._schema.is_mutable and "empty" not in node.target._schema.name


def _frozen(value: Any) -> Hashable:
    """An argument as a dictionary key; numbers of different types stay different."""
    if isinstance(value, dict):
        return tuple((name, _frozen(item)) for name, item in value.items())
    if isinstance(value, list | tuple):
        return tuple(map(_frozen, value))
    return value if isinstance(value, fx.Node) else (type(value), str(value))
