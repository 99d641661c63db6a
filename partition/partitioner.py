"""Partition a model: capture, find the lookups, cut the programs, place the tables, check, write."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from sidepool.partition.arguments import check_flags, check_name, check_placing, output_path
from sidepool.partition.artifact import check_out_dir, write_artifact
from sidepool.partition.capture import Captured, capture
from sidepool.partition.check import Trial
from sidepool.partition.cut_model import CutOptions, Objective
from sidepool.partition.cut_report import CutReport
from sidepool.partition.exporting import check_operators
from sidepool.partition.lookups import ROW_DTYPES, Jagged, Lookup, feature_names, find_lookups
from sidepool.partition.movable import NOTHING, movable_operators
from sidepool.partition.planning import check_memory, make_plan
from sidepool.partition.profiles import DEFAULT_CPU, DEFAULT_GPU, DEFAULT_LINK
from sidepool.partition.programs import Cut, cut_programs, program_bytes
from sidepool.partition.report import PartitionReport
from sidepool.partition.sidecar_programs import decide_programs
from sidepool.partition.trials import trials
from sidepool.partition.triton_config import TritonOptions, check_triton
from sidepool.partition.verify import verify_cut
from sidepool.wire.checksum import crc32c
from sidepool.wire.config import decode
from sidepool.wire.errors import PlanError
from sidepool.wire.model import DenseProgram, FeatureSource, FixedSource, IndexProgram, JaggedSource, ModelSpec, OutputDtype
from sidepool.wire.plan import Feature, OnMissingShard, Plan, Pooling, RowFormat, Table

DENSE_FILE, INDEX_FILE = "dense.pt2", "index.pt2"
# What a bag costs beside reading its rows, in rows: its vector is written by the sidecar, then read and written by the merge.
BAG_LOAD = 3.0


def partition_model(
    model: nn.Module,
    example_inputs: Any,
    out_dir: str | os.PathLike[str],
    *,
    name: str,
    sidecars: int = 2,
    addresses: Sequence[str] | None = None,
    row_format: RowFormat | str | None = None,
    epoch: int = 1,
    on_missing_shard: OnMissingShard | str = OnMissingShard.FAIL,
    triton: TritonOptions | None = None,
    link: str = DEFAULT_LINK,
    objective: Objective = "latency",
    cpu: str = DEFAULT_CPU,
    gpu: str = DEFAULT_GPU,
    gpu_table_bytes: int = 0,
    sidecar_bytes: int | None = None,
    programs: bool = True,
    sidecar_torch: bool = False,
) -> PartitionReport:
    """Cut `model` into lookups and a dense program and write the artifact into `out_dir` (new or empty).

    example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments, batch at least 2. The model is taken in
    eval mode and left as it was; its tables are written straight from its own memory.
    row_format: how rows are stored; default: as the model has them (float32, float16 or bfloat16).
    addresses: `host:port` of every sidecar's control plane; default: 127.0.0.1, ports from 50151.
    epoch: of the plan; give a higher one when an artifact replaces another that is being served.
    on_missing_shard: whether a lookup whose sidecar is lost fails, or goes on without its rows and names the features.
    link, cpu, gpu: hardware profiles that the cut is costed for (docs/partition.md); cpu and gpu may be calibrated files.
    objective: what the cut makes least: a request's latency, work per request (throughput), or the GPU's share of it (gpu_cost).
    gpu_table_bytes: tables of up to so many bytes in all may stay with the dense program where that is cheaper.
    sidecar_bytes: memory that each sidecar has for rows; default: not checked.
    programs: whether sidecars may run operators behind lookups where that is cheaper (docs/programs.md).
    sidecar_torch: also operators for which sidecars need torch, installed beside them.
    Raises `CutError` (model, inputs, output directory) and `PlanError` (names, sidecars, addresses, memory).
    """
    out = output_path(out_dir)
    check_name(name)
    check_placing(sidecars, addresses, sidecar_bytes, epoch, row_format, on_missing_shard)
    check_flags(programs=programs, sidecar_torch=sidecar_torch)
    options = CutOptions(str(link), objective, str(cpu), str(gpu), gpu_table_bytes, sidecars)
    options.check()
    triton = TritonOptions() if triton is None else triton
    check_triton(triton)
    check_out_dir(out)
    captured = capture(model, example_inputs)
    found = find_lookups(captured)
    check_operators(captured.graph)
    ids_per_bag = {x: _ids_per_bag(captured, x) for x in found.lookups}
    movable = movable_operators(captured, found.lookups, torch=sidecar_torch) if programs else NOTHING
    placed = decide_programs(captured, found.lookups, ids_per_bag, options, movable, sidecar_bytes)
    cut = cut_programs(captured, placed.lookups)
    own_dtype = ROW_DTYPES[cut.lookups[0].weight.dtype]
    tried = trials(captured, found.lookups)
    verified = [verify_cut(trial, cut) for trial in tried]
    error = max(difference for difference, _ in verified)
    names = feature_names(cut.lookups)
    ids = {feature: _ids_per_bag(captured, lookup) for feature, lookup in zip(names, cut.lookups, strict=True)}
    stored_as = RowFormat(row_format or own_dtype)
    plan = _plan(name, cut, names, ids, sidecars, addresses, stored_as, epoch, OnMissingShard(on_missing_shard), placed.together)
    check_memory(plan, sidecar_bytes)
    saved = {DENSE_FILE: program_bytes(cut.dense)}
    if cut.index is not None:
        saved[INDEX_FILE] = program_bytes(cut.index)
    spec = _spec(name, captured, cut, names, own_dtype, {file: crc32c(content) for file, content in saved.items()})
    chosen = CutReport(placed.decision, placed.lines)
    unread = [f"table {name}: nothing looks it up, it is left out" for name in captured.unread]
    kept = [*chosen.kept, *found.kept, *placed.refused, *unread]
    report = PartitionReport(plan, spec, out, ids, len(saved[DENSE_FILE]), error, kept, chosen)
    recorded = [_recorded(trial, cut, names, results) for trial, (_, results) in zip(tried, verified, strict=True)]
    torch_files = {x.program.torch.file: x.torch_file for x in cut.lookups if x.program is not None and x.program.torch is not None}
    return write_artifact(out, report, _weights(cut), saved, triton, recorded, torch_files)


def _recorded(trial: Captured, cut: Cut, names: Sequence[str], looked_up: Mapping[Lookup, Tensor]) -> Trial:
    """What the artifact must compute for one trial's inputs."""
    inputs = {str(n.target): value for n, value in zip(trial.inputs, trial.examples, strict=True)}
    outputs = dict(zip(trial.output_names, trial.expected, strict=True))
    return inputs, {name: looked_up[x] for name, x in zip(names, cut.lookups, strict=True)}, outputs


def _plan(
    name: str,
    cut: Cut,
    names: Sequence[str],
    ids: Mapping[str, float],
    sidecars: int,
    addresses: Sequence[str] | None,
    row_format: RowFormat,
    epoch: int,
    on_missing_shard: OnMissingShard,
    together: Sequence[frozenset[str]],
) -> Plan:
    weights = _weights(cut)
    loads = dict.fromkeys(weights, 0.0)
    for feature, lookup in zip(names, cut.lookups, strict=True):
        loads[lookup.table] += ids[feature] + BAG_LOAD
    computed = {x.table: x.program for x in cut.lookups if x.program is not None}
    tables: list[dict[str, Any]] = [{"name": n, "rows": w.shape[0], "dim": w.shape[1]} for n, w in weights.items()]
    for table in tables:
        program = computed.get(table["name"])
        # A program's weights are kept as they are.
        table["row_format"] = str(row_format if program is None else RowFormat.FP32)
        table |= {} if program is None else {"program": program.model_dump(mode="json")}
    sized = [decode(t, Table, where=f"table {t['name']}", error=PlanError) for t in tables]
    features = [
        {
            "name": f,
            "table": x.table,
            "pooling": str(x.pooling),
            "weighted": isinstance(x.source, Jagged) and x.source.weights is not None,
            "padding_index": x.padding_index if x.weights is None else None,
        }
        for f, x in zip(names, cut.lookups, strict=True)
    ]
    looked_up = [decode(f, Feature, where=f"feature {f['name']}", error=PlanError) for f in features]
    return make_plan(
        name,
        sized,
        looked_up,
        loads,
        sidecars=sidecars,
        addresses=addresses,
        epoch=epoch,
        on_missing_shard=on_missing_shard,
        together=together,
    )


def _weights(cut: Cut) -> dict[str, Tensor]:
    """The tables of the plan, those that only programs read included."""
    weights: dict[str, Tensor] = {}
    for lookup in cut.lookups:
        for table, rows in (*lookup.reads.items(), (lookup.table, lookup.weight)):
            weights.setdefault(table, rows)
    return weights


def _spec(
    name: str, captured: Captured, cut: Cut, names: Sequence[str], pooled_dtype: OutputDtype, checksums: Mapping[str, int]
) -> ModelSpec:
    inputs = captured.input_specs()
    index_names = {root: f"ids.{root.name}" for root in cut.index_roots}
    features = []
    for feature, lookup in zip(names, cut.lookups, strict=True):
        source: FixedSource | JaggedSource
        if isinstance(lookup.source, Jagged):
            jagged = lookup.source
            source = JaggedSource(
                values=str(jagged.values.target),
                offsets=str(jagged.offsets.target),
                include_last_offset=jagged.include_last_offset,
                weights=None if jagged.weights is None else str(jagged.weights.target),
            )
        else:
            root = lookup.source.root
            source = FixedSource(input=index_names.get(root, str(root.target)), begin=lookup.source.begin, end=lookup.source.end)
        features.append(FeatureSource(feature=feature, source=source))
    index = None
    if cut.index is not None:
        index = IndexProgram(
            file=INDEX_FILE,
            inputs=tuple(str(n.target) for n in cut.index_inputs),
            outputs=tuple(index_names[r] for r in cut.index_roots),
            crc32c=checksums[INDEX_FILE],
        )
    sequences = tuple(f for f, x in zip(names, cut.lookups, strict=True) if x.pooling is Pooling.NONE)
    inputs_of_dense = tuple(str(n.target) for n in cut.dense_inputs)
    dense = DenseProgram(
        file=DENSE_FILE, sequences=sequences, inputs=inputs_of_dense, pooled_dtype=pooled_dtype, crc32c=checksums[DENSE_FILE]
    )
    return ModelSpec(
        name=name,
        inputs=inputs,
        features=tuple(features),
        index=index,
        dense=dense,
        outputs=captured.output_specs(),
        parameters=captured.call.parameters,
        returns=captured.call.returns,
    )


def _ids_per_bag(captured: Captured, lookup: Lookup) -> float:
    if not isinstance(lookup.source, Jagged):
        return float(lookup.source.end - lookup.source.begin)
    values = captured.examples[captured.inputs.index(lookup.source.values)]
    return values.numel() / captured.expected[0].shape[0]
