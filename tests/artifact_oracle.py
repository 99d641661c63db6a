"""An independent way to run an artifact: plain torch over the written files, nothing of the product's runtime."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from sidepool import _native
from sidepool.sidecar.config import load_sidecar_config
from sidepool.sidecar.loader import load
from sidepool.wire.model import FixedSource, ModelSpec, load_model
from sidepool.wire.plan import Plan, Pooling, load_plan
from sidepool.wire.shards import load_manifest


class ArtifactOracle:
    """Runs the artifact in `out` on model inputs given by name."""

    def __init__(self, out: Path) -> None:
        self.plan: Plan = load_plan(out / "plan.yaml")
        self.version = out / "model_repository" / self.plan.model / "1"
        assert load_plan(self.version / "plan.yaml") == self.plan
        self.model: ModelSpec = load_model(self.version / "model.yaml", self.plan)
        self.tables: dict[str, Tensor] = {}
        for sidecar in self.plan.sidecars:
            shards = out / "sidecars" / sidecar.name / "shards"
            for shard in load_manifest(shards).shards:
                self.tables[shard.table] = dequantised(load_file(shards / shard.file)[shard.table], shard.row_format, shard.dim)

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """Outputs for the model's flattened inputs."""
        given = dict(zip((t.name for t in self.model.inputs), inputs, strict=True))
        with torch.no_grad():
            if self.model.index is not None:
                computed = self.program(self.model.index.file)(*(given[n] for n in self.model.index.inputs))
                given |= dict(zip(self.model.index.outputs, computed, strict=True))
            looked_up = {f.name: self.look_up(i, given) for i, f in enumerate(self.plan.features)}
            pooled = [looked_up[f.name] for f in self.plan.features if f.pooling is not Pooling.NONE]
            source = self.model.features[0].source
            fixed = isinstance(source, FixedSource)
            batch = len(given[source.input]) if fixed else len(given[source.offsets]) - source.include_last_offset
            arguments = [torch.cat(pooled, dim=1) if pooled else torch.zeros(batch, 0)]
            arguments += [looked_up[name] for name in self.model.dense.sequences]
            arguments += [given[name] for name in self.model.dense.inputs]
            assert arguments[0].shape == (batch, self.plan.out_dim)
            result = self.program(self.model.dense.file)(*arguments)
        return [result] if isinstance(result, Tensor) else list(result)

    def look_up(self, index: int, given: dict[str, Tensor]) -> Tensor:
        """One feature by torch's own operators."""
        feature, source = self.plan.features[index], self.model.features[index].source
        table = self.tables[feature.table].float()
        if isinstance(source, FixedSource):
            ids = given[source.input]
            ids = ids.reshape(ids.shape[0], -1)[:, source.begin : source.end].long()
            if feature.padding_index is not None:
                return functional.embedding_bag(ids, table, mode=feature.pooling, padding_idx=feature.padding_index)
            rows = functional.embedding(ids, table)
            return {Pooling.NONE: rows, Pooling.SUM: rows.sum(1), Pooling.MEAN: rows.mean(1), Pooling.MAX: rows.amax(1)}[
                feature.pooling
            ]
        weights = given[source.weights] if source.weights else None
        assert feature.weighted == (weights is not None)
        values, offsets = given[source.values].long(), given[source.offsets].long()
        if feature.pooling is Pooling.NONE:
            return functional.embedding(values, table)
        last = source.include_last_offset
        return functional.embedding_bag(
            values,
            table,
            offsets,
            mode=feature.pooling,
            per_sample_weights=weights,
            include_last_offset=last,
            padding_idx=feature.padding_index,
        )

    def program(self, file: str) -> Any:
        """A saved program as a callable."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.export warns about itself
            return torch.export.load(self.version / file).module(check_guards=False)


def dequantised(rows: Tensor, row_format: str, dim: int) -> Tensor:
    """The values of int8 and int4 rows, by the definition in docs/row-formats.md; other rows as they are."""
    if row_format not in ("int8", "int4"):
        return rows
    tail, number = (8, np.float32) if row_format == "int8" else (4, np.float16)
    scale, bias = rows.numpy()[:, -tail:].copy().view(number).astype(np.float64).T[:, :, None]
    codes = rows.numpy()[:, :-tail].astype(np.float64)
    if row_format == "int4":
        codes = np.stack((codes % 16, codes // 16), axis=2).reshape(len(codes), -1)[:, :dim]
    return torch.from_numpy((scale * codes + bias).astype(np.float32))


def served(out: Path) -> dict[str, NDArray[np.float32]]:
    """Every row of every table, as the sidecars of an artifact look them up."""
    found: dict[str, NDArray[np.float32]] = {}
    for path in sorted((out / "sidecars").glob("*/sidecar.yaml")):
        config = load_sidecar_config(path)
        (published,) = load(config)
        plan = published.plan
        for i, (feature, owner) in enumerate(zip(plan.features, [holders[0] for holders in plan.sidecars_of_table], strict=True)):
            if plan.sidecars[owner].name != config.name:
                continue
            table = plan.tables[i]
            rows = np.empty((table.rows, table.dim), np.float32)
            ids, lengths = np.arange(table.rows), np.ones(table.rows, np.int32)
            assert _native.pool(published.tables, i, ids, lengths, None, rows)[0] == 0
            found[feature.name] = rows
    return found
