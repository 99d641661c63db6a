"""`sidepool partition --check DIR`: does an artifact still compute what it was written to compute?

`check.safetensors` in the artifact holds inputs and, for each, what every lookup and every output gave. The check runs what lies in
the files, with torch alone: rows out of the shards, `index.pt2`, `dense.pt2`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sidepool.partition.exporting import first_lines, quiet_torch
from sidepool.partition.lookups import ROW_DTYPES
from sidepool.partition.program_reference import run_program
from sidepool.partition.reference import pool_rows
from sidepool.partition.rows import decode
from sidepool.partition.verify import same_within_rounding
from sidepool.wire.errors import CutError, PlanError, SidepoolError
from sidepool.wire.model import MODEL_FILE, PLAN_FILE, FixedSource, JaggedSource, ModelSpec, load_model
from sidepool.wire.plan import Feature, Plan, Pooling, RowFormat, load_plan
from sidepool.wire.shard_reader import locate, shards_of, verify_checksum
from sidepool.wire.shards import ShardFile
from sidepool.wire.torch_program import load_exported

CHECK_FILE = "check.safetensors"
_STORED = {RowFormat.FP32: torch.float32, RowFormat.FP16: torch.float16, RowFormat.BF16: torch.bfloat16}

Trial = tuple[Mapping[str, Tensor], Mapping[str, Tensor], Mapping[str, Tensor]]
"""Inputs, results of the lookups by feature, outputs; all by name."""


def write_check(directory: Path, trials: Sequence[Trial]) -> None:
    """Write `check.safetensors`. Where rows are stored with loss, the artifact's own results take the place of the model's."""
    artifact = _Artifact(directory)
    exact = all(_STORED.get(t.row_format) == artifact.dtype for t in artifact.plan.tables)
    tensors: dict[str, Tensor] = {}
    for i, (inputs, looked_up, outputs) in enumerate(trials):
        if not exact:
            looked_up, outputs = artifact.run(inputs)
        for kind, found in (("input", inputs), ("lookup", looked_up), ("output", outputs)):
            tensors |= {f"{i}/{kind}/{name}": value.detach().contiguous().clone() for name, value in found.items()}
    save_file(tensors, directory / CHECK_FILE)


def check_artifact(directory: Path) -> str:
    """Compare checksums of shards and programs and run every recorded input; returns a line that says what was checked.

    Raises `ShardCorrupt`, `PlanError` or `CutError`, naming the file, the first feature or the output that differs.
    """
    artifact = _Artifact(directory)
    artifact.verify_shards()
    recorded = list(_recorded(directory))
    for inputs, looked_up, outputs in recorded:
        try:
            ours, results = artifact.run(inputs)
        except SidepoolError:
            raise
        except Exception as e:  # whatever torch raises for a program that is not the one that was written
            raise CutError(f"{directory}: does not run on what was recorded: {type(e).__name__}: {first_lines(e)}") from e
        for name, expected in looked_up.items():
            _compare(directory, f"feature {name}: its lookup", ours.get(name), expected, artifact.unit)
        for name, expected in outputs.items():
            what = f"output {name}: every lookup agrees; the dense program"
            _compare(directory, what, results.get(name), expected, artifact.unit)
    samples = sum(next(iter(outputs.values())).shape[0] for _, _, outputs in recorded)
    return f"{directory}: {len(artifact.shards)} shards and {len(recorded)} recorded lookups ({samples} samples) agree"


def _compare(directory: Path, what: str, found: Tensor | None, expected: Tensor, unit: float) -> None:
    if found is None or not same_within_rounding(found, expected, unit):
        raise CutError(f"{directory}: {what} differs from what was recorded\nremedy: partition the model again")


def _recorded(directory: Path) -> Iterator[Trial]:
    path = directory / CHECK_FILE
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as e:
        raise CutError(f"{path}: cannot be read: {e}") from e
    by_trial: dict[str, dict[str, dict[str, Tensor]]] = {}
    for key, value in tensors.items():
        trial, _, rest = key.partition("/")
        kind, _, name = rest.partition("/")
        if kind not in ("input", "lookup", "output"):
            raise CutError(f"{path}: found tensor {key!r}; allowed: N/input/NAME, N/lookup/NAME, N/output/NAME")
        by_trial.setdefault(trial, {"input": {}, "lookup": {}, "output": {}})[kind][name] = value
    if not by_trial or not all(kinds["input"] and kinds["lookup"] and kinds["output"] for kinds in by_trial.values()):
        raise CutError(f"{path}: found nothing recorded; allowed: inputs, lookups and outputs\nremedy: partition the model again")
    for trial in sorted(by_trial):
        yield by_trial[trial]["input"], by_trial[trial]["lookup"], by_trial[trial]["output"]


class _Artifact:
    """What the files of an artifact compute. Rows are mapped, and only those looked up are read."""

    def __init__(self, directory: Path) -> None:
        if not (directory / PLAN_FILE).is_file():
            raise PlanError(f"{directory}: holds no {PLAN_FILE}; allowed: a directory that `sidepool partition` wrote")
        self.plan: Plan = load_plan(directory / PLAN_FILE)
        self.version = directory / "model_repository" / self.plan.model / "1"
        found, allowed = load_plan(self.version / PLAN_FILE).fingerprint, self.plan.fingerprint
        if found != allowed:
            raise PlanError(f"{self.version / PLAN_FILE}: found another plan ({found}); allowed: a copy of {directory / PLAN_FILE}")
        self.model: ModelSpec = load_model(self.version / MODEL_FILE, self.plan)
        self.dtype = next(torch_dtype for torch_dtype, name in ROW_DTYPES.items() if name == self.model.dense.pooled_dtype)
        self.unit = torch.finfo(self.dtype).eps
        self.shards: dict[str, tuple[ShardFile, Path, int]] = {}
        for sidecar in self.plan.sidecars:
            shards = directory / "sidecars" / sidecar.name / "shards"
            self.shards |= {s.table: (s, *locate(shards, s)) for s in shards_of(self.plan, shards)}
        self._programs: dict[Path, Any] = {}

    def verify_shards(self) -> None:
        """Compare every checksum."""
        for shard, path, offset in self.shards.values():
            verify_checksum(path, offset, shard)

    def run(self, inputs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Results of the lookups by feature, and the outputs."""
        given = dict(inputs)
        with torch.no_grad(), quiet_torch():
            if (index := self.model.index) is not None:
                found = self._program(self.version / index.file, index.crc32c)(*(given[n] for n in index.inputs))
                given |= dict(zip(index.outputs, found, strict=True))
            pairs = zip(self.plan.features, self.model.features, strict=True)
            looked_up = {f.name: self._look_up(f, s.source, given).to(self.dtype) for f, s in pairs}
            pooled = [looked_up[f.name] for f in self.plan.features if f.pooling is not Pooling.NONE]
            arguments = [torch.cat(pooled, dim=1) if pooled else torch.zeros(self._samples(given), 0, dtype=self.dtype)]
            arguments += [looked_up[name] for name in self.model.dense.sequences]
            arguments += [given[name] for name in self.model.dense.inputs]
            outputs = self._program(self.version / self.model.dense.file, self.model.dense.crc32c)(*arguments)
        return looked_up, dict(zip((t.name for t in self.model.outputs), outputs, strict=True))

    def _look_up(self, feature: Feature, source: FixedSource | JaggedSource, given: Mapping[str, Tensor]) -> Tensor:
        read = partial(self._rows, feature.table)
        if isinstance(source, FixedSource):
            ids = given[source.input]
            ids = ids.reshape(ids.shape[0], -1)[:, source.begin : source.end]
            table = self.plan.tables[self.plan.table_index[feature.table]]
            if table.program is not None:
                weights = self._rows(table.name, torch.arange(table.rows))
                file = table.program.torch
                exported = None if file is None else self._program(self.shards[table.name][1].parent / file.file, file.crc32c)
                return run_program(table.program, ids, self._rows, weights, table.dim, exported)
            return pool_rows(read, ids, feature.pooling, padding_index=feature.padding_index)
        return pool_rows(
            read,
            given[source.values],
            feature.pooling,
            padding_index=feature.padding_index,
            offsets=given[source.offsets],
            weights=None if source.weights is None else given[source.weights].float(),
            include_last_offset=source.include_last_offset,
        )

    def _samples(self, given: Mapping[str, Tensor]) -> int:
        source = self.model.features[0].source
        if isinstance(source, FixedSource):
            return len(given[source.input])
        return len(given[source.offsets]) - source.include_last_offset

    def _rows(self, table: str, ids: Tensor) -> Tensor:
        """The rows of `ids`, as float32."""
        shard, path, offset = self.shards[table]
        row_bytes = shard.row_format.row_bytes(shard.dim)
        content = torch.from_file(str(path), size=offset + shard.bytes, dtype=torch.uint8)[offset:]
        stored = content.view(shard.rows, row_bytes)[ids].clone(memory_format=torch.contiguous_format)
        if not shard.row_format.quantised:
            stored = stored.view(_STORED[shard.row_format])
        return decode(stored, shard.row_format, shard.dim)

    def _program(self, path: Path, crc32c: int | None) -> Any:
        if path not in self._programs:
            self._programs[path] = load_exported(path, crc32c).module(check_guards=False)
        return self._programs[path]
