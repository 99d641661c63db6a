"""Requests for a model that was partitioned: made from its artifact, so that ids fit its tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sidepool.bench.criteo import CATEGORIES, DENSE, CriteoRows, multi_hot_ids
from sidepool.bench.ids import GENERATORS
from sidepool.bench.load.sizes import Sizes
from sidepool.bench.traffic import Arrays
from sidepool.client.arguments import Part
from sidepool.client.index_program import FeatureRouter
from sidepool.client.pipeline import model_directory
from sidepool.wire.errors import ConfigError
from sidepool.wire.model import MODEL_FILE, PLAN_FILE, FixedSource, JaggedSource, ModelSpec, TensorSpec, load_model
from sidepool.wire.plan import Plan, load_plan

Inputs = dict[str, NDArray[Any]]
"""A model's own inputs by name, as its artifact's model.yaml declares them."""


class PartitionedModel:
    """What an artifact says of the model's inputs, and those inputs as each target takes them."""

    def __init__(self, artifact: Path) -> None:
        """Raises `ConfigError` for a model whose ids go through arithmetic or computed tables: nothing says what fits those."""
        self.directory = model_directory(artifact)
        self.plan: Plan = load_plan(self.directory / PLAN_FILE)
        self.model: ModelSpec = load_model(self.directory / MODEL_FILE, self.plan)
        if self.model.index is not None or any(table.program is not None for table in self.plan.feature_tables):
            raise ConfigError(f"{artifact}: its ids go through programs; allowed: ids of rows, or requests given from Python")
        self.sources = [feature.source for feature in self.model.features]
        self.router = FeatureRouter(self.model, self.plan, self.directory)

    def part(self, inputs: Inputs) -> Part:
        """What a lookup takes."""
        return self.router.route(inputs)

    def tensors(self, inputs: Inputs) -> dict[str, Any]:
        """What `Pipeline.run` takes."""
        import torch

        return {spec.name: torch.from_numpy(inputs[spec.name]) for spec in self.model.inputs}

    def triton(self, inputs: Inputs) -> Arrays:
        """What Triton takes (docs/partition.md)."""
        jagged = [source for source in self.sources if isinstance(source, JaggedSource)]
        if not jagged:
            return {name: array[:, None] if array.ndim == 1 else array for name, array in inputs.items()}
        pooled = {name for source in jagged for name in (source.values, source.offsets, source.weights)}
        arrays = {name: array[None] for name, array in inputs.items() if name not in pooled}
        values = [inputs[source.values] for source in jagged]
        lengths = [_lengths(inputs, source) for source in jagged]
        arrays |= {"sparse.lengths": np.stack(lengths)[None], "sparse.values": np.concatenate(values)[None]}
        if any(source.weights for source in jagged):
            weights = [inputs[s.weights] if s.weights else np.ones(len(v), np.float32) for s, v in zip(jagged, values, strict=True)]
            arrays["sparse.weights"] = np.concatenate(weights)[None]
        return arrays


def _lengths(inputs: Inputs, source: JaggedSource) -> NDArray[np.int32]:
    offsets, end = inputs[source.offsets], len(inputs[source.values])
    bounds = offsets if source.include_last_offset else np.append(offsets, end)
    return np.diff(bounds).astype(np.int32)


def generated_requests(
    model: PartitionedModel, sizes: Sizes, *, ids: str = "calibrated", ids_per_bag: int = 1, seed: int = 0
) -> list[Inputs]:
    """One request per size. Ids come from `bench.ids.GENERATORS[ids]`, folded into each table's rows; other inputs are normal.

    ids_per_bag: of jagged features; those of fixed width have theirs. Raises `ConfigError`.
    """
    if ids not in GENERATORS:
        raise ConfigError(f"ids: found {ids!r}; allowed: {', '.join(GENERATORS)}, criteo")
    samples, widths, rows = int(sizes.sum()), _widths(model, ids_per_bag), _rows(model)
    try:
        traces = GENERATORS[ids](len(rows), max(rows), samples * max(widths), seed)
    except ValueError as e:
        raise ConfigError(f"ids: {e}; fewer or smaller requests need fewer") from e
    # Traces differ in length; a shorter one begins again.
    bags = [np.resize(trace, (samples, width)) % n for trace, width, n in zip(traces, widths, rows, strict=True)]
    random = np.random.default_rng(seed)
    dense = {spec.name: random.standard_normal((samples, *spec.shape[1:])) for spec in _dense(model)}
    return _requests(model, sizes, bags, dense)


def criteo_requests(model: PartitionedModel, sizes: Sizes, rows: CriteoRows, *, ids_per_bag: int = 1) -> list[Inputs]:
    """One request per size, of the rows in their order and over again; of several ids per bag the first is the row's own.

    Raises `ConfigError` where the model has not Criteo's 13 integers and 26 categories.
    """
    tables, dense = _rows(model), _dense(model)
    if len(tables) != CATEGORIES or [spec.shape[1:] for spec in dense] != [(DENSE,)]:
        found = f"{len(tables)} features, dense inputs {[list(spec.shape) for spec in dense]}"
        allowed = f"{CATEGORIES} features, one input [-1, {DENSE}]"
        raise ConfigError(f"ids: found a model with {found}; allowed for Criteo rows: {allowed}")
    chosen = np.arange(int(sizes.sum())) % len(rows)
    bags = multi_hot_ids(rows.ids(tables), tables, _widths(model, ids_per_bag))
    return _requests(model, sizes, [ids[chosen] for ids in bags], {dense[0].name: rows.dense()[chosen]})


def _rows(model: PartitionedModel) -> list[int]:
    """Of each feature's table."""
    return [table.rows for table in model.plan.feature_tables]


def _widths(model: PartitionedModel, ids_per_bag: int) -> list[int]:
    """Ids per bag of each feature."""
    return [s.end - s.begin if isinstance(s, FixedSource) else ids_per_bag for s in model.sources]


def _dense(model: PartitionedModel) -> list[TensorSpec]:
    """Inputs that hold no ids."""
    taken: set[str | None] = set()
    for source in model.sources:
        taken |= {source.input} if isinstance(source, FixedSource) else {source.values, source.offsets, source.weights}
    dense = [spec for spec in model.model.inputs if spec.name not in taken]
    for spec in dense:
        if not spec.dtype.startswith("float") or -1 in spec.shape[1:]:
            found = f"{spec.name}: {spec.dtype} {list(spec.shape)}"
            raise ConfigError(f"{found}: an input that holds no rows; allowed: floats of fixed sizes; give requests from Python")
    return dense


def _requests(
    model: PartitionedModel, sizes: Sizes, bags: Sequence[NDArray[np.int64]], dense: Mapping[str, NDArray[Any]]
) -> list[Inputs]:
    """Cut samples into requests. bags: per feature the ids of all samples `[samples, ids per bag]`; dense: `[samples, ...]`."""
    specs = {spec.name: spec for spec in model.model.inputs}
    requests = []
    for end, size in zip(np.cumsum(sizes).tolist(), sizes.tolist(), strict=True):
        of_request = slice(end - size, end)
        inputs: Inputs = {name: array[of_request].astype(specs[name].dtype) for name, array in dense.items()}
        for source, ids in zip(model.sources, bags, strict=True):
            if isinstance(source, FixedSource):
                _put_fixed(inputs, source, ids[of_request], specs[source.input])
            else:
                _put_jagged(inputs, source, ids[of_request], specs)
        requests.append({n: v.reshape(size, *specs[n].shape[1:]) if v.ndim == 2 else v for n, v in inputs.items()})
    return requests


def _put_fixed(inputs: Inputs, source: FixedSource, ids: NDArray[np.int64], spec: TensorSpec) -> None:
    """Columns of an id matrix, its further dimensions laid out row by row; an input of shape `[batch]` is one column."""
    if len(spec.shape) == 1:
        inputs[source.input] = ids[:, 0].astype(spec.dtype)
        return
    if source.input not in inputs:
        inputs[source.input] = np.zeros((len(ids), max(int(np.prod(spec.shape[1:])), source.end)), spec.dtype)
    inputs[source.input][:, source.begin : source.end] = ids


def _put_jagged(inputs: Inputs, source: JaggedSource, ids: NDArray[np.int64], specs: Mapping[str, TensorSpec]) -> None:
    begins = np.arange(len(ids) + source.include_last_offset) * ids.shape[1]
    inputs[source.values] = ids.reshape(-1).astype(specs[source.values].dtype)
    inputs[source.offsets] = begins.astype(specs[source.offsets].dtype)
    if source.weights:
        inputs[source.weights] = np.ones(ids.size, specs[source.weights].dtype)
