"""What an operator costs: FLOPs and bytes from the shapes in the graph, time from a roofline.

Sizes that vary are weighted by a distribution of batch sizes; ids per bag are those of the example inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from sidepool.partition.profiles import Processor
from sidepool.partition.sources import is_moved, packet

aten = torch.ops.aten

# Query sizes of MLPerf's DLRM-v2 (mlcommons/inference): samples per query → share of the queries.
BATCHES: Mapping[int, float] = {100: 0.1, 200: 0.6, 300: 0.1, 400: 0.05, 500: 0.05, 600: 0.05, 700: 0.05}

# Products over the last dimension of the first argument: two FLOPs per element of the result and of that dimension.
_PRODUCTS = {aten.linear, aten.mm, aten.bmm, aten.matmul, aten.mv, aten.dot, aten.einsum}
_ADDED_PRODUCTS = {aten.addmm, aten.baddbmm, aten.addmv}
_CONVOLUTIONS = {aten.conv1d, aten.conv2d, aten.convolution}
_RECURRENT = {aten.gru, aten.lstm, aten.rnn_tanh, aten.rnn_relu}
_ATTENTION = {aten.scaled_dot_product_attention}
_GATHERS = {aten.embedding, aten.index, aten.index_select, aten.gather, aten.embedding_bag, aten._embedding_bag,
            aten._embedding_bag_forward_only}  # fmt: skip
COMPUTE_HEAVY = _PRODUCTS | _ADDED_PRODUCTS | _CONVOLUTIONS | _RECURRENT | _ATTENTION

Size = Callable[[Any], float]
"""The value of a size, symbolic or not, for one batch."""


@dataclass(frozen=True)
class Work:
    """What an operator does for one batch."""

    flops: float = 0.0
    streamed_bytes: float = 0.0
    gathered_bytes: float = 0.0
    launches: int = 1
    lookups: int = 0

    def time_ns(self, on: Processor) -> float:
        """The larger of computing and moving, and what starting it costs."""
        moving = self.streamed_bytes / on.bytes_per_s + self.gathered_bytes / on.gather_bytes_per_s
        return 1e9 * max(self.flops / on.flops_per_s, moving) + self.launches * on.launch_ns + self.lookups * on.lookup_ns


def work_of(node: fx.Node, size: Size) -> Work:
    """The work of one operator of the graph; nothing for one that only gives its input another shape."""
    if is_moved(node):
        return Work(launches=0)
    out, read = result_bytes(node, size), sum(result_bytes(n, size) for n in dict.fromkeys(node.all_input_nodes))
    if packet(node) in _GATHERS:
        source = node.all_input_nodes[0]
        return Work(0.0, out + read - result_bytes(source, size), out)
    return Work(_flops(node, size), out + read)


def result_bytes(node: fx.Node, size: Size) -> float:
    """Bytes of a node's result; 0 where it is not a tensor."""
    return sum(_elements(t, size) * t.element_size() for t in _tensors(node))


def _flops(node: fx.Node, size: Size) -> float:
    out = sum(_elements(t, size) for t in _tensors(node))
    inputs = [t for n in node.all_input_nodes for t in _tensors(n)]
    operator = packet(node)
    if operator in _PRODUCTS:
        return 2 * out * size(inputs[0].shape[-1])
    if operator in _ADDED_PRODUCTS:
        return 2 * out * size(inputs[1].shape[-1])
    if operator in _CONVOLUTIONS:
        return 2 * out * math.prod(size(n) for n in inputs[1].shape[1:])
    if operator in _RECURRENT:  # every weight once per step of every sequence
        steps = _elements(inputs[0], size) / size(inputs[0].shape[-1])
        return 2 * steps * sum(_elements(t, size) for t in inputs[1:] if t.dim() == 2)
    if operator in _ATTENTION:  # scores, then their product with the values
        return 4 * _elements(inputs[0], size) * size(inputs[1].shape[-2])
    return max(out, sum(_elements(t, size) for t in inputs))  # element-wise and reductions: one per element


def _tensors(node: fx.Node) -> list[Tensor]:
    value = node.meta.get("val")
    found = value if isinstance(value, list | tuple) else (value,)
    return [t for t in found if isinstance(t, Tensor)]


def _elements(tensor: Tensor, size: Size) -> float:
    return math.prod(size(n) for n in tensor.shape)


class Sizes:
    """Values of symbolic sizes for a batch. `per_sample`: what a size symbol is per sample; any other is the batch."""

    def __init__(self, per_sample: Mapping[str, float]) -> None:
        self._per_sample = per_sample
        self._known: dict[tuple[str, int], float] = {}

    def of(self, batch: int) -> Size:
        """The sizes of one batch size."""

        def size(n: Any) -> float:
            if isinstance(n, int):
                return float(n)
            key = (str(n.node.expr), batch)
            if key not in self._known:
                values = {s: self._per_sample.get(str(s), 1.0) * batch for s in n.node.expr.free_symbols}
                self._known[key] = float(n.node.expr.subs(values))
            return self._known[key]

        return size
