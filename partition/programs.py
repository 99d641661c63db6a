"""Cut programs out of a captured graph and save them: the index program and the dense program."""

from __future__ import annotations

import io
import itertools
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.utils._sympy.value_ranges import ValueRanges

from sidepool.partition.capture import Captured
from sidepool.partition.exporting import quiet_torch
from sidepool.partition.lookups import Jagged, Lookup
from sidepool.partition.pieces import Pieces
from sidepool.partition.sources import Columns, packet
from sidepool.wire.errors import CutError
from sidepool.wire.plan import Pooling

aten = torch.ops.aten


@dataclass(frozen=True)
class Cut:
    """The programs of a partitioned model. `lookups` is in plan order."""

    lookups: tuple[Lookup, ...]
    dense: ExportedProgram
    dense_inputs: tuple[fx.Node, ...]
    """Model inputs that the dense program takes, after `pooled` and the sequences."""
    index: ExportedProgram | None
    index_inputs: tuple[fx.Node, ...]
    index_roots: tuple[fx.Node, ...]
    """What the index program computes, one output each."""


def cut_programs(captured: Captured, lookups: Sequence[Lookup]) -> Cut:
    """Build both programs. Raises `CutError` where the dense half needs what only the lookups have."""
    ordered = plan_order(captured, lookups)
    dense, dense_inputs = _dense_program(captured, ordered)
    widths = {
        x.source.root: _width(x.source) for x in ordered if isinstance(x.source, Columns) and x.source.root.op != "placeholder"
    }
    index, index_inputs = _index_program(captured, widths, ordered) if widths else (None, ())
    return Cut(ordered, dense, dense_inputs, index, index_inputs, tuple(widths))


def plan_order(captured: Captured, lookups: Sequence[Lookup]) -> tuple[Lookup, ...]:
    """Features in the order in which the widest concatenations take them, so that these become slices of `pooled`."""
    by_output = {lookup.output: lookup for lookup in lookups if lookup.program is None}
    order: dict[Lookup, None] = {}
    joins = [n for n in captured.graph.nodes if packet(n) in {aten.cat, aten.stack}]
    for join in sorted(joins, key=lambda n: -len(n.args[0])):
        for item in join.args[0]:
            while item not in by_output and packet(item) in {aten.view, aten.unsqueeze, aten.squeeze, aten.reshape}:
                item = item.all_input_nodes[0]
            if item in by_output:
                order.setdefault(by_output[item])
    for lookup in lookups:
        order.setdefault(lookup)
    return tuple(order)


def program_bytes(program: ExportedProgram) -> bytes:
    """What `torch.export.save` writes for a program; equal programs give equal bytes, so what it was traced from is left out."""
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
            node.meta.pop("from_node", None)  # holds addresses of this process
    buffer = io.BytesIO()
    with quiet_torch():
        torch.export.save(program, buffer)
    return buffer.getvalue()


class Copier:
    """Copies nodes of a captured graph into a new graph, with what they need, states as attributes.

    Sizes that equal the batch are read from `anchor`, so that a program needs no input only for its size; its first dimension
    is the batch and `anchor_beyond`.
    """

    def __init__(self, captured: Captured, where: str, batch_sizes: frozenset[str]) -> None:
        self.captured, self.where, self.batch_sizes = captured, where, batch_sizes
        self.graph = fx.Graph()
        self.copies: dict[fx.Node, fx.Node] = {}
        self.states: dict[str, Tensor] = {}
        self.anchor: fx.Node | None = None
        self.anchor_beyond = 0
        self.batch: fx.Node | None = None

    def needed(self, *targets: fx.Node) -> list[fx.Node]:
        """Nodes that must be copied for `targets`, in graph order; stops at copies that exist and at the batch size."""
        seen: set[fx.Node] = set()
        waiting = list(targets)
        while waiting:
            node = waiting.pop()
            if node in seen or node in self.copies:
                continue
            seen.add(node)
            if not self.is_batch_size(node):
                waiting.extend(node.all_input_nodes)
        return [n for n in self.captured.graph.nodes if n in seen]

    def copy(self, node: fx.Node) -> fx.Node:
        """Copy one node whose inputs are copied."""
        if self.is_batch_size(node):
            self.copies[node] = self.batch_size()
        elif node in self.captured.states:
            name, value = self.captured.states[node]
            flat = f"{name.replace('.', '_')}_{len(self.states)}"  # numbered, since `a.b` and `a_b` may both exist
            self.states[flat] = value
            self.copies[node] = self.graph.get_attr(flat)
        elif node.op == "placeholder":
            raise CutError(
                f"{self.where}: needs {node.target!r}, which only the lookups have\nremedy: give it as an input of its own"
            )
        else:
            self.copies[node] = self.graph.node_copy(node, self.copies.__getitem__)
        return self.copies[node]

    def export(self, outputs: Sequence[fx.Node], examples: Sequence[Tensor]) -> ExportedProgram:
        """Close the graph with `outputs` and export it; every example's first dimension varies."""
        self.graph.output(tuple(outputs))
        self.graph.eliminate_dead_code()
        root = nn.Module()
        for name, value in self.states.items():
            # Buffers, so that programs carry no gradient settings.
            root.register_buffer(name, value.detach())
        module = fx.GraphModule(root, self.graph)
        try:
            with quiet_torch(), torch.no_grad():
                shapes = tuple({0: Dim.DYNAMIC} for _ in examples)
                program = torch.export.export(module, tuple(examples), dynamic_shapes=shapes, strict=False)
        except Exception as e:
            raise CutError(f"{self.where}: torch.export refuses it: {type(e).__name__}: {str(e)[:500]}") from e
        # It takes a batch for 2 at least, and lets a smaller one pass; not so the offsets of one, which are one more.
        for symbol, range_ in program.range_constraints.items():
            program.range_constraints[symbol] = ValueRanges(0, range_.upper)
        return program

    def is_batch_size(self, node: fx.Node) -> bool:
        value = node.meta.get("val")
        return isinstance(value, torch.SymInt) and str(value.node.expr) in self.batch_sizes

    def batch_size(self) -> fx.Node:
        if self.batch is None:
            assert self.anchor is not None
            self.batch = self.graph.call_function(aten.sym_size.int, (self.anchor, 0))
            if self.anchor_beyond:
                self.batch = self.graph.call_function(operator.sub, (self.batch, self.anchor_beyond))
        return self.batch


def batch_sizes(captured: Captured, lookups: Sequence[Lookup]) -> frozenset[str]:
    """Expressions that mean the batch size: the first dimension of every input that does not hold jagged ids.

    Raises `CutError` for an output that has a row per jagged id.
    """
    sources = [x.source for x in lookups if isinstance(x.source, Jagged)]
    last = {s.offsets for s in sources if s.include_last_offset} | {n for n, (_, x) in captured.keys.items() if x == "offsets"}
    ids = (captured.keys.keys() | _of_bags(lookups)) - {s.offsets for s in sources} - last
    sizes = {_first_size(n, int(n in last)) for n in captured.inputs if n not in ids}
    uneven = {_first_size(n) for n in ids} - sizes
    for name, node in zip(captured.output_names, captured.outputs, strict=False):
        if _first_size(node) in uneven:
            raise CutError(f"model: output {name}: found a row per id; allowed: the batch as its first dimension")
    return frozenset(filter(None, sizes | {_first_size(n) for n in captured.outputs}))


def _first_size(node: fx.Node, beyond: int = 0) -> str:
    """The expression of a value's first size without `beyond` of it; empty where it does not vary."""
    size = node.meta["val"].shape[0] - beyond
    return str(size.node.expr) if isinstance(size, torch.SymInt) else ""


def _of_bags(lookups: Sequence[Lookup]) -> set[fx.Node]:
    """Inputs that make up the ids of jagged features."""
    sources = [x.source for x in lookups if isinstance(x.source, Jagged)]
    return {node for s in sources for node in (s.values, s.offsets, s.weights) if node is not None}


def _dense_program(captured: Captured, lookups: Sequence[Lookup]) -> tuple[ExportedProgram, tuple[fx.Node, ...]]:
    copier = Copier(captured, "dense program", batch_sizes(captured, lookups))
    parts = [part for x in lookups if x.pooling is not Pooling.NONE for part in x.parts]
    pooled_dims = [dim for _, dim in parts]
    sequences = [x for x in lookups if x.pooling is Pooling.NONE]
    pooled = copier.graph.placeholder("pooled")
    copier.anchor = pooled
    sequence_inputs = [copier.graph.placeholder(f"sequence_{i}") for i in range(len(sequences))]
    copier.copies = dict.fromkeys((n for x in lookups for n, _ in x.parts), pooled)  # stand-ins, so that the search stops there
    weighting = [node for x in sequences if x.weights is not None for node in _weighting(x)]
    found = copier.needed(*captured.outputs, *weighting)
    inputs = tuple(n for n in captured.inputs if n in found)
    _check_inputs(copier, inputs, lookups)
    # Prefixed, since a model's own input may be called `pooled`.
    copier.copies = {n: copier.graph.placeholder(f"input_{n.target}") for n in inputs}
    pieces = Pieces(copier.graph, pooled, pooled_dims)
    for (output, _), piece in zip(parts, pieces.nodes, strict=True):
        copier.copies[output] = _shaped(copier, output, piece, pieces)
    given = dict(zip(sequences, sequence_inputs, strict=True))
    copier.copies |= {x.output: _unflattened(copier, x, node) for x, node in given.items() if x.weights is None}
    position = {node: i for i, node in enumerate(captured.graph.nodes)}
    for lookup in sorted((x for x in sequences if x.weights is not None), key=lambda x: position[x.node]):
        copier.copies[lookup.output] = _weighted_sum(copier, lookup, given[lookup])
    for node in copier.needed(*captured.outputs):
        copier.copies[node] = pieces.join(node, copier.copies) or pieces.move(node, copier.copies) or copier.copy(node)
    _reuse_buffers(copier.graph)
    batch = captured.expected[0].shape[0]
    rows = [_rows_of(captured, x) for x in sequences]
    shapes = [(batch, sum(pooled_dims)), *((*n, x.dim) for n, x in zip(rows, sequences, strict=True))]
    examples = [torch.zeros(shape, dtype=lookups[0].weight.dtype) for shape in shapes]
    examples += [e for n, e in zip(captured.inputs, captured.examples, strict=True) if n in inputs]
    return copier.export([copier.copies[n] for n in captured.outputs], examples), inputs


def _index_program(
    captured: Captured, widths: Mapping[fx.Node, int], lookups: Sequence[Lookup]
) -> tuple[ExportedProgram, tuple[fx.Node, ...]]:
    """Ids `[batch, width]` int64, one output per root of `widths`."""
    copier = Copier(captured, "index program", batch_sizes(captured, lookups))
    found = set(copier.needed(*widths))
    inputs = tuple(n for n in captured.inputs if n in found)
    _check_inputs(copier, inputs, lookups)
    copier.copies = {n: copier.graph.placeholder(str(n.target)) for n in inputs}
    _anchor(copier, inputs)
    outputs = []
    for root, width in widths.items():
        for node in copier.needed(root):
            copier.copy(node)
        matrix = copier.graph.call_function(aten.reshape.default, (copier.copies[root], [copier.batch_size(), width]))
        outputs.append(copier.graph.call_function(aten.to.dtype, (matrix, torch.int64)))
    examples = [e for n, e in zip(captured.inputs, captured.examples, strict=True) if n in inputs]
    return copier.export(outputs, examples), inputs


def _width(source: Columns) -> int:
    """Ids per sample of the matrix that a root is; a flat root is one bag after another."""
    sizes = source.root.meta["val"].shape[1:]
    return math.prod(int(n) for n in sizes) if sizes else source.end - source.begin


def _anchor(copier: Copier, inputs: Sequence[fx.Node]) -> None:
    """Read the batch size from an input: one with a sample per row, or the offsets of a key."""
    for beyond, node in itertools.product((0, 1), inputs):
        if _first_size(node, beyond) in copier.batch_sizes:
            copier.anchor, copier.anchor_beyond = copier.copies[node], beyond
            return


def _check_inputs(copier: Copier, inputs: Sequence[fx.Node], lookups: Sequence[Lookup]) -> None:
    """Refuse a key that nothing looks up: its ids come to the ranker with a feature's, or not at all."""
    brought = _of_bags(lookups)
    for node in inputs:
        if node in copier.captured.keys and node not in brought:
            key, what = copier.captured.keys[node]
            raise CutError(
                f"{copier.where}: needs the {what} of the key {key!r}; allowed: what lookups read of a KeyedJaggedTensor\n"
                "remedy: give it as an input of its own, padded to one length"
            )


def _shaped(copier: Copier, output: fx.Node, piece: fx.Node, pieces: Pieces) -> fx.Node:
    """`piece`, `[batch, dim]`, in the shape that the replaced operator had."""
    shape = output.meta["val"].shape
    if len(shape) == 2:
        return piece
    if len(shape) == 3 and shape[1] == 1:
        return pieces.unsqueezed(piece)
    return copier.graph.call_function(aten.reshape.default, (piece, [copier.batch_size(), *map(int, shape[1:])]))


def _unflattened(copier: Copier, lookup: Lookup, sequence: fx.Node) -> fx.Node:
    """`sequence`, `[batch, ids, dim]` or `[ids, dim]`, in the shape of the replaced operator."""
    shape = lookup.output.meta["val"].shape
    if lookup.flat:
        return copier.graph.call_function(aten.reshape.default, (sequence, [-1, lookup.dim]))
    if isinstance(lookup.source, Jagged) or len(shape) == 3:
        return sequence
    return copier.graph.call_function(aten.unflatten.int, (sequence, 1, [int(n) for n in shape[1:-1]]))


def _weighted_sum(copier: Copier, lookup: Lookup, sequence: fx.Node) -> fx.Node:
    """Rows `[batch, ids, dim]` times weights `[batch · ids]`, those of padded ids 0, summed over each bag."""
    for node in copier.needed(*_weighting(lookup)):
        copier.copy(node)
    weights, *ids = (copier.copies[node] for node in _weighting(lookup))
    if ids:
        padded = copier.graph.call_function(aten.eq.Scalar, (ids[0], lookup.padding_index))
        weights = copier.graph.call_function(aten.masked_fill.Scalar, (weights, padded, 0.0))
    weights = copier.graph.call_function(aten.reshape.default, (weights, [-1, 1, _bag_ids(lookup)]))
    product = copier.graph.call_function(aten.bmm.default, (weights, sequence))
    return copier.graph.call_function(aten.squeeze.dim, (product, 1))


def _weighting(lookup: Lookup) -> list[fx.Node]:
    """What weights rows in the dense program: the weights and, to find padding among them, the ids."""
    assert lookup.weights is not None
    ids = lookup.node.all_input_nodes[1]
    return [lookup.weights] if lookup.padding_index is None else [lookup.weights, ids]


def _bag_ids(lookup: Lookup) -> int:
    assert isinstance(lookup.source, Columns)
    return lookup.source.end - lookup.source.begin


def _rows_of(captured: Captured, lookup: Lookup) -> tuple[int, ...]:
    """How many rows a sequence has for the examples: `[batch, ids]`, or `[ids]` where their number varies."""
    if isinstance(lookup.source, Jagged):
        return (len(captured.examples[captured.inputs.index(lookup.source.values)]),)
    return len(captured.expected[0]), _bag_ids(lookup)


def _reuse_buffers(graph: fx.Graph) -> None:
    """ReLU right behind a linear layer works in place: functionalising took that from models that ask for it."""
    for node in graph.nodes:
        if node.target is aten.relu.default and node.args[0].target is aten.linear.default and len(node.args[0].users) == 1:
            node.target = aten.relu_.default


def example_arguments(cut: Cut, captured: Captured, looked_up: Mapping[Lookup, Tensor]) -> list[Tensor]:
    """Arguments of the dense program for the captured examples, given each lookup's result."""
    pooled = [looked_up[x] for x in cut.lookups if x.pooling is not Pooling.NONE]
    first = next(iter(looked_up.values()))
    arguments = [torch.cat(pooled, dim=1) if pooled else first.new_zeros(len(captured.expected[0]), 0)]
    arguments += [looked_up[x] for x in cut.lookups if x.pooling is Pooling.NONE]
    by_input = dict(zip(captured.inputs, captured.examples, strict=True))
    return arguments + [by_input[n] for n in cut.dense_inputs]


def last_sample(cut: Cut, captured: Captured, arguments: Sequence[Tensor]) -> list[Tensor]:
    """Of arguments as `example_arguments` gives them, those of the last sample alone."""
    by_input = dict(zip(captured.inputs, captured.examples, strict=True))
    ids: dict[fx.Node, Tensor] = {}
    first: dict[fx.Node, int] = {}
    for source in (x.source for x in cut.lookups if isinstance(x.source, Jagged)):
        own = by_input[source.offsets][-1 - source.include_last_offset :]
        ids[source.offsets] = own - own[0]
        first |= dict.fromkeys(filter(None, (source.values, source.weights)), int(own[0]))
    sequences = [x.source for x in cut.lookups if x.pooling is Pooling.NONE]
    begins = [-1, *(first[s.values] if isinstance(s, Jagged) else -1 for s in sequences)]
    taken = [argument[begin:] for argument, begin in zip(arguments, begins, strict=False)]
    return taken + [ids.get(n, by_input[n][first.get(n, -1) :]) for n in cut.dense_inputs]
