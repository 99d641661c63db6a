"""From a Triton request to a part of a lookup: tensors checked and viewed; budget, priority and trace context read.

Arrays are views into memory that Triton takes back when `execute` returns.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sidepool.client.arguments import MAX_DEADLINE_MS, MAX_PRIORITY, Ids, Part
from sidepool.client.index_program import FeatureRouter
from sidepool.wire.errors import DeadlineExceeded, LookupRejected
from sidepool.wire.model import FixedSource, JaggedSource, ModelSpec

# What the generated config.pbtxt calls the ids of jagged features.
LENGTHS, VALUES, WEIGHTS = "sparse.lengths", "sparse.values", "sparse.weights"


@dataclass(slots=True)
class Incoming:
    """One request that passed the checks."""

    position: int
    """Its place among the requests of the `execute`."""
    part: Part
    inputs: dict[str, NDArray[Any]]
    """What the dense program takes besides the pooled vectors, by name, each `[samples, …]` or part of a jagged feature."""
    ids: dict[str, int]
    """Per offsets among `inputs`: how many ids they are of."""
    samples: int
    budget_ns: int
    priority: int
    traceparent: str | None


@dataclass(slots=True)
class _Options:
    budget_ns: int
    priority: int = 0
    traceparent: str | None = None


class Reader:
    """Reads requests in one of two forms.

    Fixed: every input is `[samples, …]` and Triton batches samples. Jagged: Triton batches requests, so each input is
    `[1, …]`, and the ids of the jagged features, in plan order, come as `sparse.lengths [1, features, samples]`,
    `sparse.values [1, nnz]` (int64 or int32, feature-major) and, where a feature is weighted, `sparse.weights [1, nnz]`.
    """

    def __init__(self, model: ModelSpec, router: FeatureRouter, default_deadline_ms: float) -> None:
        """`default_deadline_ms`: the budget of requests that bring none."""
        self._router = router
        self._default_budget_ns = int(default_deadline_ms * 1e6)
        self._sources = [f.source for f in model.features if isinstance(f.source, JaggedSource)]
        self.jagged = bool(self._sources)
        self._whole = len(self._sources) == len(model.features) and model.index is None
        self._weighted = any(s.weights for s in self._sources)
        replaced = model.bag_inputs
        # Per input as Triton gives it: shape after the dimension that counts samples, and dtype.
        self._expected = {t.name: (t.shape[1:], np.dtype(t.dtype)) for t in model.inputs if t.name not in replaced}
        self._dense_inputs = {t.name: np.dtype(t.dtype) for t in model.inputs if t.name in model.dense.inputs}
        self._dense_reads_bags = model.dense_reads_bags
        self._offsets = {s.offsets: s for s in self._sources}
        self._id_matrix = _only_id_matrix(model)

    def read(self, position: int, request: Any) -> Incoming:
        """Check one request; raises `LookupRejected` naming the tensor, or `DeadlineExceeded` for a budget that is spent."""
        given = {tensor.name(): tensor for tensor in request.inputs()}
        arrays = {name: self._array(name, given) for name in self._expected}
        options = self._options(request)
        if self.jagged:
            lengths, values, weights = self._ids(given)
            samples = _samples({**arrays, LENGTHS: lengths.T})
            if self._dense_reads_bags or not self._whole:
                arrays |= self._split(lengths, values, weights)
            part: Part = (values, lengths.reshape(-1), weights) if self._whole else self._router.route(arrays)
        else:
            samples = _samples(arrays)
            part = (arrays[self._id_matrix], None, None) if self._id_matrix else self._router.route(arrays)
        inputs = {name: arrays[name].astype(dtype, copy=False) for name, dtype in self._dense_inputs.items()}
        ids = {name: arrays[source.values].size for name, source in self._offsets.items() if name in inputs}
        return Incoming(position, part, inputs, ids, samples, options.budget_ns, options.priority, options.traceparent)

    def merged(self, accepted: Sequence[Incoming]) -> dict[str, NDArray[Any]]:
        """The dense program's inputs over several requests, offsets counted on from one to the next."""
        return {name: self._merged(name, accepted) for name in self._dense_inputs}

    def _merged(self, name: str, accepted: Sequence[Incoming]) -> NDArray[Any]:
        parts, source = [incoming.inputs[name] for incoming in accepted], self._offsets.get(name)
        if source is not None:
            before = accumulate([incoming.ids[name] for incoming in accepted[:-1]], initial=0)
            parts = [part + ids for part, ids in zip(parts, before, strict=True)]
            if source.include_last_offset:
                parts[:-1] = [part[:-1] for part in parts[:-1]]
        return np.concatenate(parts)

    def _array(self, name: str, given: dict[str, Any]) -> NDArray[Any]:
        array = _numpy(name, given, self.jagged)
        shape, dtype = self._expected[name]
        if not shape and array.shape[1:] == (1,):
            array = array[:, 0]  # Triton wants a dimension besides the batch; the model has none
        if array.dtype != dtype or not _fits(array.shape[1:], shape) or array.ndim == 0:
            allowed = ", ".join(["samples", *(str(n) for n in shape)])
            raise LookupRejected(f"{name}: found {array.dtype} {list(array.shape)}; allowed: {dtype} [{allowed}]")
        return array

    def _ids(self, given: dict[str, Any]) -> tuple[NDArray[np.int32], Ids, NDArray[np.float32] | None]:
        """Shapes only: what lengths and ids say is checked by the native core, which reads them anyway."""
        features = len(self._sources)
        lengths, values = _numpy(LENGTHS, given, True), _numpy(VALUES, given, True)
        if lengths.dtype != np.int32 or not _fits(lengths.shape, (features, -1)):
            raise LookupRejected(f"{LENGTHS}: found {lengths.dtype} {list(lengths.shape)}; allowed: int32 [{features}, samples]")
        if values.dtype not in (np.int64, np.int32) or values.ndim != 1:
            raise LookupRejected(f"{VALUES}: found {values.dtype} {list(values.shape)}; allowed: int64 or int32 [nnz]")
        weights = _numpy(WEIGHTS, given, True) if self._weighted else None
        if weights is not None and (weights.dtype != np.float32 or weights.shape != values.shape):
            raise LookupRejected(f"{WEIGHTS}: found {weights.dtype} {list(weights.shape)}; allowed: float32 [{values.size}]")
        return lengths, values, weights

    def _split(self, lengths: NDArray[np.int32], values: Ids, weights: NDArray[np.float32] | None) -> dict[str, NDArray[Any]]:
        """The jagged features as the model's own (values, offsets) inputs, for models that read these elsewhere too."""
        totals = lengths.sum(axis=1, dtype=np.int64)
        if (lengths < 0).any() or totals.sum() != values.size:
            raise LookupRejected(
                f"{LENGTHS}: found a sum of {totals.sum()}; allowed: none negative, {values.size} in all ({VALUES})"
            )
        bounds = np.cumsum(totals)[:-1]
        arrays: dict[str, NDArray[Any]] = {}
        for source, ids, bags in zip(self._sources, np.split(values, bounds), lengths, strict=True):
            begins = np.concatenate([[0], np.cumsum(bags, dtype=np.int64)])
            found = {source.values: ids, source.offsets: begins if source.include_last_offset else begins[:-1]}
            if any(name in arrays and not np.array_equal(arrays[name], array) for name, array in found.items()):
                raise LookupRejected(f"{VALUES}: found different bags for features over the same ids; allowed: the same for each")
            arrays |= found
        for source, part in zip(self._sources, np.split(weights, bounds) if weights is not None else [], strict=False):
            if source.weights is not None:
                arrays[source.weights] = part
        return arrays

    def _options(self, request: Any) -> _Options:
        """Budget in nanoseconds from now, priority, and traceparent: the request's timeout and parameters, else Triton's own trace.

        Triton tells neither a Python model how long a request waited in its queue nor the `priority` that it ordered its queue by.
        """
        options = _Options(self._default_budget_ns)
        timeout_us = request.timeout()
        if timeout_us > 0:
            options.budget_ns = timeout_us * 1000
        text = request.parameters()
        if len(text) > 2:  # "{}": none, which is the rule
            _read_parameters(json.loads(text), options)
        if options.traceparent is None:
            context = request.trace().get_context()
            if context:
                options.traceparent = json.loads(context).get("traceparent")
        return options


def _read_parameters(parameters: dict[str, Any], options: _Options) -> None:
    if "deadline_ms" in parameters:
        options.budget_ns = _budget_ns(parameters["deadline_ms"])
    if "deadline_unix_us" in parameters:
        options.budget_ns = min(options.budget_ns, _remaining_ns(parameters["deadline_unix_us"]))
    priority = parameters.get("lookup_priority", 0)
    if not isinstance(priority, int) or not -MAX_PRIORITY <= priority <= MAX_PRIORITY:
        raise LookupRejected(f"parameter lookup_priority: found {priority!r}; allowed: whole numbers, at most {MAX_PRIORITY}")
    options.priority = priority
    found = parameters.get("traceparent")
    options.traceparent = found if isinstance(found, str) else None


def _budget_ns(deadline_ms: Any) -> int:
    try:
        budget_ms = float(deadline_ms)
    except (TypeError, ValueError):
        budget_ms = float("nan")
    if not budget_ms <= MAX_DEADLINE_MS:
        raise LookupRejected(f"parameter deadline_ms: found {deadline_ms!r}; allowed: milliseconds, at most {MAX_DEADLINE_MS:.0f}")
    if budget_ms <= 0:
        raise DeadlineExceeded(f"parameter deadline_ms: found {deadline_ms}; the budget was spent before the request began")
    return max(1, int(budget_ms * 1e6))


def _remaining_ns(deadline_unix_us: Any) -> int:
    if not isinstance(deadline_unix_us, int):
        raise LookupRejected(f"parameter deadline_unix_us: found {deadline_unix_us!r}; allowed: whole microseconds of Unix time")
    remaining_ns = deadline_unix_us * 1000 - time.time_ns()
    if remaining_ns <= 0:
        raise DeadlineExceeded(f"parameter deadline_unix_us: passed {-remaining_ns / 1e6:.1f} ms before the request began")
    return remaining_ns


def _only_id_matrix(model: ModelSpec) -> str | None:
    """The input that is the whole lookup as it stands, a matrix that all ids come from, or None."""
    names = {f.source.input if isinstance(f.source, FixedSource) else None for f in model.features}
    found = [t.name for t in model.inputs if names == {t.name} and t.dtype in ("int64", "int32") and len(t.shape) == 2]
    return found[0] if found and model.index is None else None


def _samples(arrays: dict[str, NDArray[Any]]) -> int:
    """How many samples all inputs hold."""
    sizes = {len(array) for array in arrays.values()}
    if len(sizes) > 1:
        found = {name: len(array) for name, array in arrays.items()}
        raise LookupRejected(f"samples: found {found}; allowed: the same number in every input")
    return sizes.pop()


def _fits(shape: tuple[int, ...], allowed: tuple[int, ...]) -> bool:
    return shape == allowed or (
        len(shape) == len(allowed) and all(want in (-1, size) for want, size in zip(allowed, shape, strict=True))
    )


def _numpy(name: str, given: dict[str, Any], jagged: bool) -> NDArray[Any]:
    """An input as a view; of a jagged request, the only entry of Triton's batch dimension."""
    tensor = given.get(name)
    if tensor is None:
        raise LookupRejected(f"{name}: missing; found the inputs {sorted(given)}")
    array: NDArray[Any] = tensor.as_numpy()
    if not jagged:
        return array
    if array.ndim == 0 or array.shape[0] != 1:
        raise LookupRejected(f"{name}: found {list(array.shape)}; allowed: 1 first (Triton's batch dimension counts requests here)")
    entry: NDArray[Any] = array[0]
    return entry
