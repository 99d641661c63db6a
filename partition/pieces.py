"""The pooled output inside the dense graph: one matrix, cut into a piece per feature, joined again without copies.

Models concatenate or stack what their lookups give. Here these vectors already lie side by side in `pooled`,
so a run of neighbours in a `cat` or `stack` is a slice of it.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from sidepool.partition.sources import packet

aten = torch.ops.aten
_RESHAPES = {aten.view, aten.reshape, aten.unsqueeze, aten.squeeze, aten.flatten}


@dataclass(frozen=True)
class _Run:
    """Neighbouring features `[first, last]`, or another node where `node` is given."""

    first: int
    last: int
    node: fx.Node | None = None


class Pieces:
    """The pieces of `pooled` (`[batch, Σ dims]`) in a graph under construction. Owned by whoever builds the graph."""

    def __init__(self, graph: fx.Graph, pooled: fx.Node, dims: Sequence[int]) -> None:
        self.graph, self.pooled, self.dims = graph, pooled, list(dims)
        self.begins = [sum(self.dims[:i]) for i in range(len(self.dims) + 1)]
        if len(self.dims) == 1:
            self.nodes = [pooled]
        else:
            split = graph.call_function(aten.split_with_sizes.default, (pooled, self.dims, 1)) if self.dims else pooled
            self.nodes = [graph.call_function(operator.getitem, (split, i)) for i in range(len(self.dims))]
        self._flat = {node: i for i, node in enumerate(self.nodes)}
        self._rows: dict[fx.Node, int] = {}

    def unsqueezed(self, piece: fx.Node) -> fx.Node:
        """`piece` as `[batch, 1, dim]`."""
        node = self.graph.call_function(aten.unsqueeze.default, (piece, 1))
        self._rows[node] = self._flat[piece]
        return node

    def move(self, node: fx.Node, copies: Mapping[fx.Node, fx.Node]) -> fx.Node | None:
        """The piece that `node` reshapes to `[batch, dim]` or `[batch, 1, dim]`; None where it does anything else."""
        if packet(node) not in _RESHAPES:
            return None
        feature = self._feature(copies[node.all_input_nodes[0]])
        if feature is None:
            return None
        sizes = list(node.meta["val"].shape[1:])
        if sizes == [self.dims[feature]]:
            return self.nodes[feature]
        return self.unsqueezed(self.nodes[feature]) if sizes == [1, self.dims[feature]] else None

    def join(self, node: fx.Node, copies: Mapping[fx.Node, fx.Node]) -> fx.Node | None:
        """What replaces a `cat` or `stack` of pieces; None where there is nothing to gain."""
        if packet(node) not in {aten.cat, aten.stack}:
            return None
        rank = node.meta["val"].dim()
        dim = (int(node.args[1]) if len(node.args) > 1 else 0) % rank  # type: ignore[arg-type]
        items = [copies[item] for item in node.args[0]]  # type: ignore[union-attr,index]
        stacking = packet(node) is aten.stack
        known = self._flat if stacking or rank == 2 else self._rows
        # [batch, dims] side by side, or [batch, features, dim] one below the other.
        wide = not stacking and dim == rank - 1 and rank in (2, 3)
        tall = rank == 3 and dim == 1
        if not (wide or tall):
            return None
        runs = self._runs(items, known, same_dim=tall)
        if len(runs) == len(items):
            return None
        parts = [self._part(run, known, wide=wide, rank=rank, stacking=stacking) for run in runs]
        return parts[0] if len(parts) == 1 else self.graph.call_function(aten.cat.default, (parts, dim))

    def _feature(self, node: fx.Node) -> int | None:
        return self._flat.get(node, self._rows.get(node))

    def _runs(self, items: Sequence[fx.Node], known: Mapping[fx.Node, int], *, same_dim: bool) -> list[_Run]:
        runs: list[_Run] = []
        for item in items:
            feature = known.get(item)
            if feature is None:
                runs.append(_Run(0, 0, item))
                continue
            before = runs[-1] if runs else None
            follows = before is not None and before.node is None and before.last + 1 == feature
            if before is not None and follows and (not same_dim or self.dims[before.last] == self.dims[feature]):
                runs[-1] = _Run(before.first, feature)
            else:
                runs.append(_Run(feature, feature))
        return runs

    def _part(self, run: _Run, known: Mapping[fx.Node, int], *, wide: bool, rank: int, stacking: bool) -> fx.Node:
        if run.node is not None:
            return self.graph.call_function(aten.unsqueeze.default, (run.node, 1)) if stacking else run.node
        flat = self._slice(run.first, run.last)
        if wide:
            return flat if rank == 2 else self.graph.call_function(aten.unsqueeze.default, (flat, 1))
        count = run.last - run.first + 1
        return self.graph.call_function(aten.unflatten.int, (flat, 1, [count, self.dims[run.first]]))

    def _slice(self, first: int, last: int) -> fx.Node:
        if first == 0 and last == len(self.dims) - 1:
            return self.pooled
        if first == last:
            return self.nodes[first]
        return self.graph.call_function(aten.slice.Tensor, (self.pooled, 1, self.begins[first], self.begins[last + 1]))
