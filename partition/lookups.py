"""Find the lookups of a captured model: embedding operators over a parameter, and where their ids come from."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from sidepool.partition.capture import Captured
from sidepool.partition.exporting import source_line
from sidepool.partition.hand_pooling import apply_mask, find_hand_pooling
from sidepool.partition.sources import (
    Columns,
    behind_casts,
    constant_in,
    evaluate,
    find_columns,
    foreign_ids,
    packet,
    probe_inputs,
    value_ancestors,
)
from sidepool.wire.errors import CutError
from sidepool.wire.model import OutputDtype
from sidepool.wire.plan import Pooling
from sidepool.wire.program import Program

aten = torch.ops.aten
_BAGS = {aten.embedding_bag, aten._embedding_bag, aten._embedding_bag_forward_only}
_BAG_POOLING = (Pooling.SUM, Pooling.MEAN, Pooling.MAX)  # torch's numbers for the modes
_BAG_DEFAULTS = {"offsets": None, "mode": 0, "per_sample_weights": None, "include_last_offset": False, "padding_idx": None}


# Letters that names in plans do not have, and the length of names less what tells two equal ones apart.
_ODD_LETTERS = re.compile(r"[^A-Za-z0-9_.\-/]|^[.\-/]")
NAME_LENGTH = 240
# What a model's rows may be. Lookups give the same dtype, as the model's own operators do.
ROW_DTYPES: dict[torch.dtype, OutputDtype] = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Jagged:
    """Ids in torch's EmbeddingBag form, all of them model inputs."""

    values: fx.Node
    offsets: fx.Node
    weights: fx.Node | None
    include_last_offset: bool
    key: str | None = None
    """Of the `KeyedJaggedTensor` that the ids are part of."""


@dataclass(frozen=True, eq=False)
class Lookup:
    """One embedding operator of the graph: one feature of the plan. Equal only to itself."""

    node: fx.Node
    """The operator."""
    output: fx.Node
    """The node that the looked-up vectors replace."""
    table: str
    weight: Tensor
    pooling: Pooling
    source: Columns | Jagged
    weights: fx.Node | None = None
    """Weights `[batch · ids]` of a fixed-width bag: its rows come back unpooled and the dense program reduces them."""
    padding_index: int | None = None
    """The id that bags pass over: a row, or the number of rows, an id that is nothing else."""
    program: Program | None = None
    """Of a computed table: its rows are the program's weights, its ids are records."""
    outputs: tuple[fx.Node, ...] = ()
    """Of a program: the nodes that the columns of its result replace, in their order."""
    reads: Mapping[str, Tensor] = field(default_factory=dict)
    """Of a program: the tables that it looks up."""
    torch_file: bytes = b""
    """Of a program that torch runs: what its file holds."""

    @property
    def dim(self) -> int:
        return int(self.weight.shape[1])

    @property
    def flat(self) -> bool:
        """Whether the rows of all samples are one matrix `[batch · ids, dim]` in the model."""
        fixed = isinstance(self.source, Columns) and self.weights is None
        return fixed and self.pooling is Pooling.NONE and self.output.meta["val"].dim() == 2

    @property
    def parts(self) -> tuple[tuple[fx.Node, int], ...]:
        """Nodes that its columns replace, and how many each."""
        if self.program is None:
            return ((self.output, self.dim),)
        return tuple((n, math.prod(int(size) for size in n.meta["val"].shape[1:])) for n in self.outputs)


@dataclass(frozen=True)
class Recognised:
    """What `find_lookups` found."""

    lookups: tuple[Lookup, ...]
    """Those that leave the model, in graph order."""
    kept: tuple[str, ...]
    """Lookups that stay in the dense program: operator, source line and reason."""


def find_lookups(captured: Captured) -> Recognised:
    """Every lookup that can leave the model; raises `CutError` naming operator and source line where none can.

    May add nodes to the captured graph: the arithmetic that pooling by hand becomes.
    """
    operators = [n for n in captured.graph.nodes if packet(n) is aten.embedding or packet(n) in _BAGS]
    tables = _table_names(captured, operators)
    staying = {n: "no parameter is looked up by the model's inputs there" for n in operators if n.args[0] not in tables}
    staying |= {n: "its ids are the same in every call" for n in operators if n not in staying and _constant_ids(captured, n)}
    staying |= _strays(captured, [n for n in operators if n not in staying])
    indexed = _indexed(captured)
    staying |= indexed
    tied = _tied(captured, [n for n in operators if n not in staying], frozenset(operators))
    leaving = [n for n in operators if n not in staying and n not in tied]
    if not leaving:
        reasons = [f"\n{_where(n)}: {why}" for n, why in (tied | staying).items()]
        raise CutError(
            f"model: found {len(operators)} embedding operators, none of them over a parameter with ids from the model's inputs; "
            f"allowed: at least one nn.Embedding or nn.EmbeddingBag that is looked up by an input{''.join(reasons[:3])}"
        )
    found = [
        _embedding(captured, node, tables) if packet(node) is aten.embedding else _bag(captured, node, tables) for node in leaving
    ]
    _check_dtypes(captured, found)
    stay = staying | tied
    # The first line says why; what to do about it is for a model that cannot be cut at all.
    return Recognised(tuple(found), tuple(f"{_where(n)}: {stay[n].splitlines()[0]}" for n in captured.graph.nodes if n in stay))


def _indexed(captured: Captured) -> dict[fx.Node, str]:
    """Operators that take rows of a parameter by index, and that this is why they stay: negative ids count from the end there."""
    found = {}
    for node in captured.graph.nodes:
        if packet(node) in {aten.index, aten.index_select} and node.args[0] in captured.parameters:
            by_row = node.args[1] == 0 if packet(node) is aten.index_select else node.args[1][0] is not None
            if by_row and node.args[0].meta["val"].dim() == 2 and not constant_in((node,), captured):
                name = captured.states[node.args[0]][0]
                found[node] = f"it takes rows of {name} by index; allowed: torch.nn.functional.embedding(ids, {name})"
    return found


def _tied(captured: Captured, lookups: Sequence[fx.Node], operators: frozenset[fx.Node]) -> dict[fx.Node, str]:
    """Lookups that cannot leave, and why: by their ids, or because their table is needed in the dense program anyway."""
    tied = {}
    for node in lookups:
        ids = node.args[1]
        why = foreign_ids(captured, ids, operators) if isinstance(ids, fx.Node) else None
        if why is not None:
            tied[node] = why
    needed: dict[int, str] = {}
    for weight, (name, value) in captured.states.items():
        for user in weight.users:
            if user in lookups and user not in tied:
                continue
            needed.setdefault(
                value.data_ptr(),
                f"table {name}: also read by {_where(user)}; allowed: a table that is only looked up by the model's inputs\n"
                "remedy: give that operator its own parameter",
            )
    for node in lookups:
        why = needed.get(captured.states[_node(node.args[0])][1].data_ptr())
        if why is not None:
            tied.setdefault(node, why)
    return tied


def feature_names(lookups: Sequence[Lookup]) -> tuple[str, ...]:
    """A name per lookup: after its ids (`sparse.3`, `values_0`), with its table where several share these ids."""
    names = [_source_name(lookup) for lookup in lookups]
    twice = {name for name, n in Counter(names).items() if n > 1}
    names = [f"{name}.{lookup.table}" if name in twice else name for name, lookup in zip(names, lookups, strict=True)]
    seen: Counter[str] = Counter()
    unique = []
    for name in names:
        seen[name] += 1
        unique.append(name if seen[name] == 1 else f"{name}.{seen[name]}")
    return tuple(unique)


def _where(node: fx.Node) -> str:
    return f"{node.name} ({source_line(node)})"


def _table_names(captured: Captured, operators: Sequence[fx.Node]) -> dict[fx.Node, str]:
    """Weights that are looked up → table names; weights that share memory are one table."""
    names: dict[fx.Node, str] = {}
    by_memory: dict[tuple[int, tuple[int, ...]], str] = {}
    taken: Counter[str] = Counter()
    for node in operators:
        weight = node.args[0]
        if not isinstance(weight, fx.Node) or weight not in captured.states or weight in names:
            continue
        name, value = captured.states[weight]
        short = _plain(name.removesuffix(".weight"))
        memory = (value.data_ptr(), tuple(value.shape))
        if memory not in by_memory:
            taken[short] += 1
            by_memory[memory] = short if taken[short] == 1 else f"{short}.{taken[short]}"
        names[weight] = by_memory[memory]
    return names


def _plain(name: str) -> str:
    """A model's own name in the letters that plans allow."""
    return _ODD_LETTERS.sub("_", name)[:NAME_LENGTH]


def _constant_ids(captured: Captured, node: fx.Node) -> bool:
    """Whether a lookup's ids are the same in every call (position embeddings): it stays in the dense program."""
    ids = node.args[1]
    return isinstance(ids, fx.Node) and constant_in((ids,), captured)


def _embedding(captured: Captured, node: fx.Node, tables: dict[fx.Node, str]) -> Lookup:
    weight, ids = _node(node.args[0]), _node(node.args[1])
    shape = ids.meta["val"].shape
    if len(shape) == 0 or isinstance(shape[0], int) or not all(isinstance(n, int) for n in shape[1:]):
        raise CutError(
            f"{_where(node)}: found ids of shape {list(shape)}; allowed: [batch, …] with every other size fixed\n"
            "remedy: use nn.EmbeddingBag for a varying number of ids"
        )
    table = captured.states[weight][1]
    offsets = _one_key(captured, ids)
    if offsets is not None:
        return Lookup(node, node, tables[weight], table, Pooling.NONE, _jagged(captured, node, ids, offsets, None, True))
    bag_ids = math.prod(int(n) for n in shape[1:]) * _ids_per_sample(captured, ids)
    if bag_ids == 1:
        return Lookup(node, node, tables[weight], table, Pooling.SUM, find_columns(captured, ids, 1))
    found = find_hand_pooling(captured, node, table) if len(shape) == 2 else None
    if found is None:
        return Lookup(node, node, tables[weight], table, Pooling.NONE, find_columns(captured, ids, bag_ids))
    ids, padding = apply_mask(captured, ids, found, int(table.shape[0]))
    source = find_columns(captured, ids, bag_ids)
    return Lookup(node, found.output, tables[weight], table, found.pooling, source, padding_index=padding)


def _strays(captured: Captured, operators: Sequence[fx.Node]) -> dict[fx.Node, str]:
    """Lookups with as many ids, or bags, as something else than the samples, and that this is why they stay."""
    samples = set().union(*(n.meta["val"].shape[0].node.expr.free_symbols for n in captured.outputs))
    found = {}
    for node in operators:
        given = _BAG_DEFAULTS | _bag_arguments(node)
        counted = given["indices"] if packet(node) is aten.embedding else given["offsets"]
        if not isinstance(counted, fx.Node) or counted.meta["val"].dim() == 0:
            continue
        size = counted.meta["val"].shape[0]
        if not isinstance(size, torch.SymInt):
            continue
        if packet(node) is aten.embedding:
            if samples.isdisjoint(size.node.expr.free_symbols) and _one_key(captured, counted) is None:
                found[node] = f"it has {size} ids, not [batch, …]; allowed: nn.EmbeddingBag where their number varies"
        elif size.node.has_hint() and size.node.hint - bool(given["include_last_offset"]) != captured.expected[0].shape[0]:
            found[node] = f"it has {size} offsets, not a bag per sample; allowed: a lookup for each feature"
    return found


def _ids_per_sample(captured: Captured, ids: fx.Node) -> int:
    """How many elements of flat ids belong to a sample: 1, but for matrices that were laid out as one row."""
    size, samples = (n.meta["val"].shape[0].node.expr for n in (ids, captured.outputs[0]))
    if size == samples or ids.meta["val"].dim() != 1:
        return 1
    ratio = size / samples
    return int(ratio) if ratio.is_Integer else 1


def _one_key(captured: Captured, ids: fx.Node) -> fx.Node | None:
    """The offsets of a `KeyedJaggedTensor`'s key, if `ids` has one element for each of its ids."""
    for node in value_ancestors(ids):
        if node in captured.keys and captured.keys[node][1] == "values" and node.meta["val"].shape == ids.meta["val"].shape:
            return captured.inputs[captured.inputs.index(node) + 1]
    return None


def _node(argument: object) -> fx.Node:
    """An operator's tensor argument: in a graph it is always a node."""
    assert isinstance(argument, fx.Node)
    return argument


def _bag(captured: Captured, node: fx.Node, tables: dict[fx.Node, str]) -> Lookup:
    arguments = _BAG_DEFAULTS | _bag_arguments(node)
    weight, values, offsets = (_node(arguments[k]) for k in ("weight", "indices", "offsets"))
    weights = None if arguments["per_sample_weights"] is None else _node(arguments["per_sample_weights"])
    table = captured.states[weight][1]
    pooling = _BAG_POOLING[int(arguments["mode"])]  # type: ignore[call-overload]
    padding = _padding(node, arguments["padding_idx"], table)
    output = _only_result(node)
    last = bool(arguments["include_last_offset"])
    if constant_in((offsets,), captured):
        bag_ids = _fixed_bag_ids(captured, node, offsets, last)
        source = find_columns(captured, values, bag_ids)
        if weights is not None:
            return Lookup(node, output, tables[weight], table, Pooling.NONE, source, weights, padding)
        return Lookup(node, output, tables[weight], table, pooling, source, padding_index=padding)
    jagged = _jagged(captured, node, values, offsets, weights, last)
    return Lookup(node, output, tables[weight], table, pooling, jagged, padding_index=padding)


def _bag_arguments(node: fx.Node) -> dict[str, object]:
    """Arguments of an embedding-bag operator by name, whichever overload it is."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    return dict(zip((a.name for a in schema), node.args, strict=False)) | dict(node.kwargs)


def _padding(node: fx.Node, found: object, table: Tensor) -> int | None:
    """The row whose ids an embedding bag passes over: counted from the end where negative, in the form that callers use."""
    if found is None or (packet(node) is not aten.embedding_bag and found == -1):  # inside torch, -1 stands for none
        return None
    row: int = int(found)  # type: ignore[call-overload]
    return row + int(table.shape[0]) if row < 0 else row


def _only_result(node: fx.Node) -> fx.Node:
    """The pooled vectors of an embedding-bag operator; its other results must be unused."""
    result: fx.Node | None = None
    for user in node.users:
        if user.args[1] == 0:
            result = user
        elif user.users:
            raise CutError(f"{_where(node)}: result {user.args[1]} is used; allowed: only the pooled vectors of an embedding bag")
    if result is None:
        raise CutError(f"{_where(node)}: its pooled vectors are not used\nremedy: take the operator out of the model")
    return result


def _fixed_bag_ids(captured: Captured, node: fx.Node, offsets: fx.Node, last: bool) -> int:
    """Ids per bag where offsets depend on sizes only, as for a matrix of ids."""
    steps = set()
    for batch in (2, 3):
        found = evaluate(offsets, probe_inputs(captured, batch)).tolist()
        found = found[:-1] if last else found
        step = found[1] if len(found) == batch else -1
        steps.add(step if found == [i * step for i in range(batch)] else -1)
    bag_ids = steps.pop()
    if steps or bag_ids < 1:
        raise CutError(f"{_where(node)}: found offsets that are neither an input nor evenly spaced; allowed: one of the two")
    return int(bag_ids)


def _jagged(captured: Captured, node: fx.Node, values: fx.Node, offsets: fx.Node, weights: fx.Node | None, last: bool) -> Jagged:
    plain = [behind_casts(n) for n in (values, offsets)] + ([behind_casts(weights)] if weights is not None else [])
    for what, origin in zip(("values", "offsets", "per-sample weights"), plain, strict=False):
        if origin not in captured.inputs:
            raise CutError(
                f"{_where(node)}: found {what} computed by {origin.name} ({source_line(origin)}); allowed: the {what} of a jagged "
                "feature as an input of the model\nremedy: apply the arithmetic before calling the model, or give the ids as a "
                "fixed-width matrix, for which index arithmetic is supported"
            )
        if origin.meta["val"].dim() != 1:
            raise CutError(f"{_where(node)}: found {what} of shape {list(origin.meta['val'].shape)}; allowed: one dimension")
    key = captured.keys.get(plain[0], (None,))[0]
    return Jagged(plain[0], plain[1], plain[2] if weights is not None else None, last, key)


def _check_dtypes(captured: Captured, lookups: Sequence[Lookup]) -> None:
    """Tables that leave are matrices of floats, all of one dtype, as `pooled` is one matrix."""
    dtype = lookups[0].weight.dtype
    moved = {lookup.weight.data_ptr() for lookup in lookups}
    for name, value in captured.states.values():
        if value.data_ptr() not in moved or value.dim() != 2:
            continue
        if value.dtype not in ROW_DTYPES or value.dtype is not dtype:
            allowed = "float32, float16 or bfloat16 rows" if value.dtype not in ROW_DTYPES else f"{dtype}, as the first table is"
            raise CutError(f"table {name}: found {value.dtype}; allowed: {allowed}\nremedy: partition model.float()")


def _source_name(lookup: Lookup) -> str:
    source = lookup.source
    if isinstance(source, Jagged):
        return _plain(source.key) if source.key else str(source.values.target)
    if source.root.op != "placeholder":
        return lookup.table
    name = str(source.root.target)
    if source.end - source.begin == math.prod(int(n) for n in source.root.meta["val"].shape[1:]):
        return name
    return f"{name}.{source.begin}" if source.end - source.begin == 1 else f"{name}.{source.begin}-{source.end - 1}"
