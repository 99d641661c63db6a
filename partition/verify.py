"""Check a cut against the model itself, on the example inputs and on random ones, before anything is written."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, fx

from sidepool.partition.capture import Captured
from sidepool.partition.exporting import quiet_torch, source_line
from sidepool.partition.lookups import Lookup
from sidepool.partition.program_reference import run_program
from sidepool.partition.programs import Cut, cut_programs, example_arguments, last_sample
from sidepool.partition.reference import pool_rows
from sidepool.partition.sources import Columns, evaluate
from sidepool.wire.errors import CutError
from sidepool.wire.program import Program

# Sums in another order differ by a few units in the last place per layer; a wrong cut differs by far more. In 16 bits these
# units are coarse: as many as ROUNDINGS of them.
RELATIVE, ABSOLUTE = 1e-4, 1e-5
ROUNDINGS = 4


def verify_cut(captured: Captured, cut: Cut) -> tuple[float, dict[Lookup, Tensor]]:
    """Largest absolute difference of the cut's outputs from the model's own, and the results of the lookups.

    Raises `CutError` where the difference is not rounding.

    Also checks that a batch of one gives the last sample's outputs: Triton merges requests, so samples must not mix.
    """
    with torch.no_grad(), quiet_torch():
        unit = torch.finfo(cut.lookups[0].weight.dtype).eps
        looked_up = look_up_examples(captured, cut)
        arguments = example_arguments(cut, captured, looked_up)
        dense = cut.dense.module(check_guards=False)
        found = dense(*arguments)
        try:
            worst = _compare(captured, found, captured.expected, unit, "the partitioned model differs from the original")
        except CutError as e:
            raise CutError(f"{e}\n{first_difference(captured, cut, unit)}") from e
        try:
            last = dense(*last_sample(cut, captured, arguments))
        except Exception as e:
            raise CutError(f"dense program: fails for a batch of 1: {type(e).__name__}: {str(e)[:300]}") from e
        expected = tuple(value[-1:] for value in captured.expected)
        what = "the last sample alone scores differently: the model mixes the samples of a batch"
        _compare(captured, last, expected, unit, what)
    return worst, looked_up


def first_difference(captured: Captured, cut: Cut, unit: float) -> str:
    """The first operator, in the model's order, whose result in the cut is not the model's: for messages."""
    known: dict[fx.Node, object] = {node: value for node, (_, value) in captured.states.items()}
    known |= dict(zip(captured.inputs, captured.examples, strict=True))
    looked_up = look_up_examples(captured, cut)
    for lookup in cut.lookups:
        theirs = torch.cat([evaluate(n, known).reshape(-1, dim) for n, dim in lookup.parts], 1) if lookup.program else None
        theirs = evaluate(lookup.output, known) if theirs is None else theirs
        ours = looked_up[lookup]
        if lookup.weights is None and not same_within_rounding(ours.reshape(theirs.shape), theirs, unit):
            return _blame(lookup.output)
    batches = {str(n.meta["val"].shape[0]) for n in captured.outputs}
    # What has a batch, since a program's outputs must; nothing before the lookups, which the dense program does not have.
    ends = {n for x in cut.lookups for n, _ in x.parts}
    dense_nodes: set[fx.Node] = set()
    waiting = list(captured.outputs)
    while waiting:
        node = waiting.pop()
        if node not in dense_nodes and node not in ends:
            dense_nodes.add(node)
            waiting.extend(node.all_input_nodes)
    probes = [n for n in captured.graph.nodes if n in dense_nodes and n.op == "call_function" and _has_batch(n, batches)]
    probing = replace(captured, outputs=tuple(probes))
    dense = cut_programs(probing, cut.lookups).dense.module(check_guards=False)
    results = dense(*example_arguments(cut, captured, looked_up))
    for node, ours in zip(probes, results, strict=True):
        if not same_within_rounding(ours, evaluate(node, known), unit):
            return _blame(node)
    return "no single operator differs: small differences add up"


def _has_batch(node: fx.Node, batches: set[str]) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dim() > 0 and str(value.shape[0]) in batches


def _blame(node: fx.Node) -> str:
    return f"first operator that differs: {node.name} ({source_line(node)})"


def look_up_examples(captured: Captured, cut: Cut) -> dict[Lookup, Tensor]:
    """What every lookup gives for the captured examples, by torch's own operators."""
    inputs: dict[fx.Node, Tensor] = dict(zip(captured.inputs, captured.examples, strict=True))
    if cut.index is not None:
        computed = cut.index.module(check_guards=False)(*(inputs[n] for n in cut.index_inputs))
        inputs |= dict(zip(cut.index_roots, computed, strict=True))
    return {lookup: _look_up(lookup, inputs) for lookup in cut.lookups}


def _look_up(lookup: Lookup, inputs: Mapping[fx.Node, Tensor]) -> Tensor:
    source, padding = lookup.source, lookup.padding_index
    if isinstance(source, Columns):
        matrix = inputs[source.root]
        ids = matrix.reshape(matrix.shape[0], -1)[:, source.begin : source.end]
        if lookup.program is not None:
            return _run(lookup, lookup.program, ids)
        return pool_rows(lookup.weight.__getitem__, ids, lookup.pooling, padding_index=padding)
    return pool_rows(
        lookup.weight.__getitem__,
        inputs[source.values],
        lookup.pooling,
        padding_index=padding,
        offsets=inputs[source.offsets],
        weights=None if source.weights is None else inputs[source.weights],
        include_last_offset=source.include_last_offset,
    )


def _run(lookup: Lookup, program: Program, record: Tensor) -> Tensor:
    exported = torch.export.load(io.BytesIO(lookup.torch_file)).module(check_guards=False) if lookup.torch_file else None

    def run(given: Tensor) -> Tensor:
        return run_program(program, given, lambda table, ids: lookup.reads[table][ids], lookup.weight, lookup.dim, exported)

    found = run(record)
    # Steps cannot mix samples; torch can, and a sidecar runs as many of them at a time as it likes.
    if exported is not None and not same_within_rounding(run(record[-1:]), found[-1:], torch.finfo(found.dtype).eps):
        raise CutError(f"program {lookup.table}: the last sample alone gives something else\nremedy: sidecar_torch=False")
    return found


def _compare(captured: Captured, found: object, expected: tuple[Tensor, ...], unit: float, what: str) -> float:
    """Largest difference; `unit`: the last place of 1.0 in the dtype that the model computes in."""
    worst = 0.0
    outputs = (found,) if isinstance(found, Tensor) else found
    for name, ours, theirs in zip(captured.output_names, outputs, expected, strict=True):  # type: ignore[call-overload]
        if not same_within_rounding(ours, theirs, unit):
            raise CutError(f"output {name}: {what}\nremedy: make samples independent of each other, and forward deterministic")
        if theirs.numel():
            worst = max(worst, float((ours.double() - theirs.double()).abs().nan_to_num().max()))
    return worst


def same_within_rounding(ours: Tensor, theirs: Tensor, unit: float) -> bool:
    """Whether two results differ by rounding only; `unit`: the last place of 1.0."""
    relative, absolute = max(RELATIVE, ROUNDINGS * unit), max(ABSOLUTE, ROUNDINGS * unit)
    return ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=relative, atol=absolute, equal_nan=True)
