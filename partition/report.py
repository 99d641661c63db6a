"""What partitioning did, for people (`report.txt`) and for programs (`report.json`)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from sidepool.partition.cut_report import CutReport
from sidepool.partition.rows import RowError
from sidepool.partition.triton_config import describe_inputs
from sidepool.wire.model import FixedSource, ModelSpec
from sidepool.wire.plan import Plan, Pooling
from sidepool.wire.sharding import sharding_of

# The two batch sizes of a latency question: one sample, and a typical ranking request.
REPORTED_BATCHES = (1, 128)
ID_BYTES, LENGTH_BYTES, WEIGHT_BYTES = 8, 4, 4
VALUE_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


@dataclass(frozen=True)
class PartitionReport:
    """The result of `partition_model`."""

    plan: Plan
    model: ModelSpec
    out_dir: Path
    ids_per_bag: Mapping[str, float]
    """Mean ids per bag of every feature in the example inputs."""
    dense_bytes: int
    """Size of `dense.pt2`."""
    max_abs_error: float
    """Largest difference between the partitioned and the original model on the example inputs."""
    kept: Sequence[str]
    """Embedding operators that stay in the dense program, and why."""
    cut: CutReport
    """Why what runs where, and what else would have cost."""
    row_errors: Mapping[str, RowError] = field(default_factory=dict)
    """What storing its rows cost each table; known once they are written."""

    @cached_property
    def json(self) -> dict[str, Any]:
        """Everything as plain data; sizes in bytes."""
        return {
            "model": self.model.name,
            "plan_epoch": self.plan.epoch,
            "plan_fingerprint": self.plan.fingerprint,
            "max_abs_error": self.max_abs_error,
            "dense_bytes": self.dense_bytes,
            "tables": [self._table(i) for i in range(len(self.plan.tables))],
            "sidecars": [self._sidecar(i) for i in range(len(self.plan.sidecars))],
            "features": [self._feature(i) for i in range(len(self.plan.features))],
            "inputs": describe_inputs(self.model),
            "outputs": [f"{t.name}: {t.dtype} {list(t.shape)}" for t in self.model.outputs],
            "kept_in_dense": list(self.kept),
            "cut": self.cut.json,
        }

    @cached_property
    def text(self) -> str:
        """The report a person reads."""
        data = self.json
        lines = [
            f"{self.model.name}: {len(self.plan.tables)} tables, {len(self.plan.features)} features, "
            f"{len(self.plan.sidecars)} sidecars",
            f"checked on the example inputs: largest difference from the original model {self.max_abs_error:.2e}",
            "",
            "what runs where",
            f"  sidecars      lookups and pooling over {_size(sum(t.bytes for t in self.plan.tables))} of rows",
            f"  ranker, CPU   {_index_line(self.model)}",
            f"  ranker, dense dense.pt2 ({_size(self.dense_bytes)}) over pooled [batch, {self.plan.out_dim}] "
            + self.model.dense.pooled_dtype
            + "".join(f", {name}" for name in (*self.model.dense.sequences, *self.model.dense.inputs)),
            *(f"  kept in dense {line}" for line in self.kept),
            *(f"  cut           {line}" for line in self.cut.verdict),
            "",
            *_columns(["sidecar", "address", "tables", "rows held", *(f"wire, batch {b}" for b in REPORTED_BATCHES)], [
                [s["name"], s["address"], str(s["tables"]), _size(s["bytes"]), *map(_wire, s["wire_bytes"].values())]
                for s in data["sidecars"]
            ]),
            "  (wire: request + response payload of one lookup; frame headers add about a hundred bytes per sidecar)",
            "",
            *_columns(["table", "rows", "dim", "stored as", "bytes", "largest error", "rms error", "sidecar"], [
                [t["name"], str(t["rows"]), str(t["dim"]), t["row_format"], _size(t["bytes"]), f"{t['max_abs_error']:.2e}",
                 f"{t['rms_error']:.2e}", t["sidecar"]] for t in data["tables"]
            ]),
            "  (errors: of the values as they are stored, against the model's)",
            "",
            *_columns(["feature", "table", "pooling", "ids per bag", "ids from"], [
                [f["name"], f["table"], f["pooling"], f"{f['ids_per_bag']:.4g}", f["source"]] for f in data["features"]
            ]),
            "",
            "Triton inputs",
            *(f"  {line}" for line in data["inputs"]),
            "Triton outputs",
            *(f"  {line}" for line in data["outputs"]),
        ]  # fmt: skip
        return "\n".join(lines) + "\n"

    def explain(self) -> str:
        """Why the cut is where it is: costs of every operator and of the alternatives."""
        return self.cut.text

    def write(self, directory: Path) -> None:
        """Write `report.txt`, `report.json`, `cut.txt` and `cut.html`."""
        (directory / "cut.txt").write_text(self.cut.text, encoding="utf-8")
        (directory / "cut.html").write_text(self.cut.html, encoding="utf-8")
        (directory / "report.txt").write_text(self.text, encoding="utf-8")
        (directory / "report.json").write_text(json.dumps(self.json, indent=1) + "\n", encoding="utf-8")

    def wire_bytes(self, sidecar: int, batch: int) -> tuple[int, int]:
        """Payload bytes (request, response) between the ranker and one sidecar for one lookup of `batch` samples."""
        request = response = 0.0
        for feature, source, table in zip(self.plan.features, self.model.features, self.plan.feature_tables, strict=True):
            index = self.plan.table_index[table.name]
            fixed = isinstance(source.source, FixedSource)
            for shard in self.plan.placed_shards[index]:
                if sidecar not in shard.sidecars:
                    continue
                # Ids as if they were uniform over rows and replicas; bags without ids in a shard of a cut table do not travel.
                asked = batch / len(shard.sidecars)
                per_bag = self.ids_per_bag[feature.name] * shard.row_count / table.rows
                ids = asked * per_bag
                bags = min(asked, ids) if self.plan.rows_cut(index) else asked
                partial = self.plan.rows_cut(index) and feature.pooling is not Pooling.NONE
                value = 4 if partial else VALUE_BYTES[self.model.dense.pooled_dtype]
                request += ids * (ID_BYTES + (WEIGHT_BYTES if feature.weighted else 0)) + (0 if fixed else bags * LENGTH_BYTES)
                response += (ids if feature.pooling is Pooling.NONE else bags) * shard.column_count * value
        return round(request), round(response)

    def _table(self, index: int) -> dict[str, Any]:
        table = self.plan.tables[index]
        sidecars = [self.plan.sidecars[s].name for s in self.plan.sidecars_of_table[index]]
        error = self.row_errors.get(table.name, RowError())
        return {
            "name": table.name,
            "rows": table.rows,
            "dim": table.dim,
            "row_format": str(table.row_format),
            "bytes": table.bytes,
            "max_abs_error": error.max_abs,
            "rms_error": error.rms,
            "sharding": str(sharding_of(self.plan, index)),
            "sidecar": ", ".join(sidecars),
        }

    def _sidecar(self, index: int) -> dict[str, Any]:
        held = self.plan.held_by(index)
        return {
            "name": self.plan.sidecars[index].name,
            "address": self.plan.sidecars[index].address,
            "tables": len({t for t, _ in held}),
            "bytes": sum(s.bytes(self.plan.tables[t]) for t, s in held),
            "wire_bytes": {
                str(b): dict(zip(("request", "response"), self.wire_bytes(index, b), strict=True)) for b in REPORTED_BATCHES
            },
        }

    def _feature(self, index: int) -> dict[str, Any]:
        feature, source = self.plan.features[index], self.model.features[index].source
        if isinstance(source, FixedSource):
            where = f"{source.input}[:, {source.begin}:{source.end}]"
        else:
            where = f"{source.values} by {source.offsets}" + (f" weighted by {source.weights}" if source.weights else "")
        return {
            "name": feature.name,
            "table": feature.table,
            "pooling": str(feature.pooling),
            "ids_per_bag": self.ids_per_bag[feature.name],
            "source": where,
        }


def _index_line(model: ModelSpec) -> str:
    return "no index arithmetic" if model.index is None else f"index program over {', '.join(model.index.inputs)}"


def _columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    return ["  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)]


def _size(count: int) -> str:
    value, unit = float(count), "B"
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.3g} {unit}"


def _wire(wire: Mapping[str, int]) -> str:
    return f"{_size(wire['request'])} + {_size(wire['response'])}"
