"""From a model's inputs to what a lookup takes: run the index arithmetic, then bring the ids into one array."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from sidepool.client.arguments import Ids, Part
from sidepool.wire.errors import LookupRejected
from sidepool.wire.model import FeatureSource, FixedSource, IndexProgram, JaggedSource, ModelSpec
from sidepool.wire.plan import OutOfRange, Plan
from sidepool.wire.program import Program as SidecarProgram
from sidepool.wire.torch_program import Program, load_program


class FeatureRouter:
    """Turns one request's model inputs into a part of a lookup. Immutable: any thread may use it.

    Where every feature has a fixed number of ids, the parts are id matrices `[batch, width]`; `fixed_columns` then says
    where each feature lies (give it to `EmbeddingClient.connect`). Otherwise the parts are jagged.
    """

    def __init__(self, model: ModelSpec, plan: Plan, directory: Path) -> None:
        """`directory` holds the index program, if the model has one. Raises `ShardCorrupt` if it cannot be loaded."""
        self.model = model
        self._weighted = [f.weighted for f in plan.features]
        self._records = [
            (source.source.input, feature.name, _looked_up(plan, table.program))
            for feature, source, table in zip(plan.features, model.features, plan.feature_tables, strict=True)
            if table.program is not None and isinstance(source.source, FixedSource)
        ]
        index = model.index
        self._program = None if index is None else load_program(directory / index.file, crc32c=index.crc32c)
        self.fixed_columns: tuple[tuple[int, int], ...] | None = None
        self._id_inputs: tuple[str, ...] = ()
        if not model.jagged:
            self._id_inputs = tuple(dict.fromkeys(_fixed(f).input for f in model.features))
            self._widths = {name: max(_fixed(f).end for f in model.features if _fixed(f).input == name) for name in self._id_inputs}
            first = dict(zip(self._id_inputs, np.cumsum([0, *self._widths.values()]).tolist(), strict=False))
            self.fixed_columns = tuple(
                (first[s.input] + s.begin, first[s.input] + s.end) for s in (_fixed(f) for f in model.features)
            )

    def route(self, inputs: Mapping[str, NDArray[Any]]) -> Part:
        """One part for the lookup, from the model's inputs by name.

        An id matrix that is the only source is passed on as it is, without a copy: it must outlive the lookup.
        Raises `LookupRejected` naming an input that is missing, of a wrong dtype or shape, or disagrees with another.
        """
        sources: Mapping[str, NDArray[Any]] = inputs
        if self.model.index is not None and self._program is not None:
            sources = self._run_index(self.model.index, self._program, inputs)
            self._check_records(sources)
        if self.model.jagged:
            return self._jagged(sources)
        matrices = [_id_matrix(sources, name, self._widths[name]) for name in self._id_inputs]
        if len(matrices) == 1:
            return matrices[0], None, None
        _same_batch({name: m.shape[0] for name, m in zip(self._id_inputs, matrices, strict=True)})
        cut = [m[:, : self._widths[name]] for name, m in zip(self._id_inputs, matrices, strict=True)]
        return np.concatenate(cut, axis=1), None, None

    def _run_index(self, index: IndexProgram, program: Program, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        import torch

        given = [torch.from_numpy(np.ascontiguousarray(_input(inputs, name))) for name in index.inputs]
        try:
            with torch.inference_mode():
                outputs = program(*given)
        except (RuntimeError, TypeError, IndexError) as e:
            found = ", ".join(f"{name} {list(t.shape)}" for name, t in zip(index.inputs, given, strict=True))
            raise LookupRejected(f"inputs: found {found}; they do not fit the model's index arithmetic: {e}") from e
        return {**inputs, **{name: out.numpy() for name, out in zip(index.outputs, outputs, strict=True)}}

    def _check_records(self, sources: Mapping[str, NDArray[Any]]) -> None:
        """Refuse ids within records here, where they are one caller's: the core sees only words."""
        for name, feature, lookups in self._records:
            record = sources[name]
            for begin, end, rows in lookups:
                ids = record[:, begin:end]
                bad = (ids < 0) | (ids >= rows)
                if bad.any():
                    bag = int(bad.any(axis=1).argmax())
                    found = ids[bag][bad[bag]][0]
                    raise LookupRejected(f"feature {feature}, bag {bag}: id {found} is outside its table; allowed: 0 to {rows - 1}")

    def _jagged(self, sources: Mapping[str, NDArray[Any]]) -> Part:
        bags = [
            _fixed_bags(sources, f.source) if isinstance(f.source, FixedSource) else _jagged_bags(sources, f.source)
            for f in self.model.features
        ]
        _same_batch({f.feature: lengths.size for f, (_, lengths) in zip(self.model.features, bags, strict=True)})
        values = np.concatenate([v for v, _ in bags])
        lengths = np.concatenate([n for _, n in bags])
        return values, lengths, self._weights(sources, [v.size for v, _ in bags]) if any(self._weighted) else None

    def _weights(self, sources: Mapping[str, NDArray[Any]], counts: Sequence[int]) -> NDArray[np.float32]:
        """Weights of all values; features that take none get ones, which the core does not read."""
        weights = []
        for feature, weighted, count in zip(self.model.features, self._weighted, counts, strict=True):
            source = feature.source
            if not weighted or not isinstance(source, JaggedSource) or source.weights is None:
                weights.append(np.ones(count, np.float32))
                continue
            given = _input(sources, source.weights)
            if given.dtype not in (np.float32, np.float16) or given.shape != (count,):  # torch wants the table's own dtype
                raise LookupRejected(f"{source.weights}: found {given.dtype} {list(given.shape)}; allowed: float32 [{count}]")
            weights.append(given.astype(np.float32, copy=False))
        return np.concatenate(weights)


def _looked_up(plan: Plan, program: SidecarProgram) -> list[tuple[int, int, int]]:
    """Ids in a record that must be rows: first and last word, and the first id that is too large."""
    tables = [(x, plan.tables[plan.table_index[x.table]]) for x in program.lookups]
    checked = [(x, t) for x, t in tables if t.out_of_range is OutOfRange.ERROR]
    # An id that is nothing but padding lies behind the last row.
    return [(x.begin, x.begin + x.ids, t.rows + (x.padding_index == t.rows)) for x, t in checked]


def _fixed(feature: FeatureSource) -> FixedSource:
    assert isinstance(feature.source, FixedSource)
    return feature.source


def _input(inputs: Mapping[str, NDArray[Any]], name: str) -> NDArray[Any]:
    if name not in inputs:
        raise LookupRejected(f"{name}: missing; found the inputs {sorted(inputs)}")
    return inputs[name]


def _integers(inputs: Mapping[str, NDArray[Any]], name: str) -> Ids:
    found = _input(inputs, name)
    if found.dtype not in (np.int64, np.int32):
        raise LookupRejected(f"{name}: found {found.dtype} {list(found.shape)}; allowed: int64 or int32")
    return cast(Ids, np.ascontiguousarray(found))


def _id_matrix(inputs: Mapping[str, NDArray[Any]], name: str, width: int) -> Ids:
    """`[batch, at least width]`; further dimensions are laid out row by row, `[batch]` is one column."""
    ids = _integers(inputs, name)
    columns = int(np.prod(ids.shape[1:], dtype=np.int64))
    if columns < width:
        raise LookupRejected(f"{name}: found {columns} columns (shape {list(ids.shape)}); allowed: at least {width}")
    return ids.reshape(ids.shape[0], columns)


def _fixed_bags(inputs: Mapping[str, NDArray[Any]], source: FixedSource) -> tuple[Ids, NDArray[np.int32]]:
    ids = _id_matrix(inputs, source.input, source.end)[:, source.begin : source.end]
    return ids.reshape(-1), np.full(ids.shape[0], source.end - source.begin, np.int32)


def _jagged_bags(inputs: Mapping[str, NDArray[Any]], source: JaggedSource) -> tuple[Ids, NDArray[np.int32]]:
    values, offsets = _integers(inputs, source.values), _integers(inputs, source.offsets)
    for name, array in ((source.values, values), (source.offsets, offsets)):
        if array.ndim != 1:
            raise LookupRejected(f"{name}: found shape {list(array.shape)}; allowed: one dimension")
    if source.include_last_offset and offsets.size == 0:
        raise LookupRejected(f"{source.offsets}: found no offsets; allowed: [batch + 1]")
    bounds = offsets if source.include_last_offset else np.append(offsets, values.size)
    # Compared, not subtracted: wild offsets would overflow into lengths that look right.
    if bounds[0] != 0 or bounds[-1] != values.size or (bounds[1:] < bounds[:-1]).any():
        raise LookupRejected(
            f"{source.offsets}: found {bounds[:4].tolist()}… up to {bounds[-1]}; "
            f"allowed: from 0, never falling, up to the {values.size} ids of {source.values}"
        )
    return values, np.diff(bounds).astype(np.int32)


def _same_batch(sizes: Mapping[str, int]) -> None:
    if len(set(sizes.values())) > 1:
        raise LookupRejected(f"batch: found {dict(sizes)}; allowed: the same number of samples everywhere")
