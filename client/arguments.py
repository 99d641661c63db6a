"""Checks on what callers pass to a lookup. Every refusal names the argument, what was found and what is allowed.

Only what Python must know is checked here (types and shapes); ids, lengths and weights themselves are checked in the
native core, which reads them anyway.
"""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from sidepool.wire.errors import DeadlineExceeded, LookupRejected
from sidepool.wire.model import OutputDtype

Ids = NDArray[np.int64] | NDArray[np.int32]
"""Row ids. int32 ones are widened where they are written into a frame."""
Part = tuple[Ids, NDArray[np.int32] | None, NDArray[np.float32] | None]
"""One request: jagged `(values [nnz], lengths [features * batch] feature-major, weights [nnz] or None)`, or fixed-width
`(ids [batch, width], None, None)`."""

# NumPy has no bfloat16: its bits, which `tensor.view(torch.uint16)` and `.view(torch.bfloat16)` turn into one another.
OUTPUT_DTYPES: dict[OutputDtype, np.dtype[Any]] = {
    "fp32": np.dtype(np.float32),
    "fp16": np.dtype(np.float16),
    "bf16": np.dtype(np.uint16),
}

# An hour is far beyond any lookup and keeps the budget well within 64 bits of nanoseconds.
MAX_DEADLINE_MS = 3_600_000.0
# Frames carry the priority as a signed 32-bit number.
MAX_PRIORITY = (1 << 31) - 1


def deadline_ns(deadline_ms: float) -> int:
    """The budget in whole nanoseconds; `DeadlineExceeded` for one that is already spent."""
    try:
        finite = math.isfinite(deadline_ms)
    except TypeError:  # no number at all
        finite = False
    if not finite or deadline_ms > MAX_DEADLINE_MS:
        raise LookupRejected(f"deadline_ms: found {deadline_ms!r}; allowed: above 0, at most {MAX_DEADLINE_MS:.0f}")
    budget = int(deadline_ms * 1e6)
    if budget <= 0:
        raise DeadlineExceeded(f"deadline_ms: found {deadline_ms}; the budget was spent before the lookup began")
    return budget


def priority_level(priority: int) -> int:
    """`priority` if it fits a frame."""
    if not -MAX_PRIORITY <= priority <= MAX_PRIORITY:
        raise LookupRejected(f"priority: found {priority}; allowed: {-MAX_PRIORITY} to {MAX_PRIORITY}")
    return priority


def id_values(values: Any, name: str = "values") -> Ids:
    """Row ids `[nnz]`, contiguous; anything but int64 and int32 is refused."""
    return _ids(values, name, 1, "[nnz]")


def id_matrix(ids: Any, name: str = "ids") -> Ids:
    """A fixed-width id matrix `[batch, width]`, contiguous; anything but int64 and int32 is refused."""
    return _ids(ids, name, 2, "[batch, width]")


def bag_lengths(lengths: Any, features: int, name: str = "lengths") -> NDArray[np.int32]:
    """Bag lengths, `[features, batch]` or flat and feature-major, as flat contiguous int32."""
    array = _array(lengths, np.int32)
    flat = array.ndim == 1 and array.size % features == 0
    if not (flat or (array.ndim == 2 and array.shape[0] == features)):
        allowed = f"[{features}, batch] or flat [{features} * batch], feature-major"
        raise LookupRejected(f"{name}: found shape {list(array.shape)}; allowed: {allowed}")
    _require_integers(array, name)
    if array.dtype == np.int64 and array.size and max(abs(int(array.min())), int(array.max())) >= 1 << 31:
        raise LookupRejected(f"{name}: found {array.max()}; allowed: a length below 2**31")
    return np.ascontiguousarray(array.reshape(-1), dtype=np.int32)


def bag_weights(weights: Any, name: str = "weights") -> NDArray[np.float32] | None:
    """One float32 weight per id `[nnz]`, or None."""
    if weights is None:
        return None
    array = _array(weights, np.float32)
    if array.dtype != np.float32 or array.ndim != 1:
        raise LookupRejected(f"{name}: found {_found(array)}; allowed: float32 [nnz]")
    return np.ascontiguousarray(array)


def output(out: Any, batch: int, dim: int, dtype: OutputDtype | None = None) -> NDArray[Any]:
    """The caller's output `[batch, Σ dim]`, or a new one (fp32 where `dtype` does not say)."""
    if dtype is not None and dtype not in OUTPUT_DTYPES:
        raise LookupRejected(f"output_dtype: found {dtype!r}; allowed: {', '.join(OUTPUT_DTYPES)}")
    if out is None:
        return np.empty((batch, dim), OUTPUT_DTYPES[dtype or "fp32"])
    wanted = list(OUTPUT_DTYPES.values()) if dtype is None else [OUTPUT_DTYPES[dtype]]
    if not isinstance(out, np.ndarray) or out.dtype not in wanted or out.shape != (batch, dim):
        allowed = " or ".join(map(str, wanted)) + (f" (output_dtype {dtype})" if dtype else "")
        raise LookupRejected(f"out: found {_found(out)}; allowed: {allowed} [{batch}, {dim}]")
    if not out.flags.writeable or (dim and batch and out.strides[1] != out.itemsize):
        raise LookupRejected("out: found read-only memory or rows that are not contiguous; allowed: writeable, contiguous rows")
    return out


def explain_parts(parts: Any, features: int, fault: Exception) -> LookupRejected:
    """Why the native core refused the types or shapes of `parts`, in the caller's terms."""
    for i, part in enumerate(parts):
        if not isinstance(part, tuple) or len(part) != 3:
            return LookupRejected(f"parts[{i}]: found {_found(part)}; allowed: a tuple (values, lengths, weights)")
        values, lengths, weights = part
        allowed_dims = 2 if lengths is None else 1
        for name, array, dtypes, dims in (
            ("values", values, ("int64", "int32"), allowed_dims),
            ("lengths", lengths, ("int32",), 1),
            ("weights", weights, ("float32",), 1),
        ):
            if array is None and name != "values":
                continue
            if not isinstance(array, np.ndarray) or array.dtype not in dtypes or array.ndim != dims or not array.flags.c_contiguous:
                allowed = f"contiguous {' or '.join(dtypes)} with {dims} dimension{'s' if dims > 1 else ''}"
                return LookupRejected(f"parts[{i}].{name}: found {_found(array)}; allowed: {allowed}")
    return LookupRejected(f"parts: {fault} ({features} features)")


def _ids(values: Any, name: str, dims: int, shape: str) -> Ids:
    array = _array(values, np.int64)
    if array.ndim != dims:
        raise LookupRejected(f"{name}: found {_found(array)}; allowed: int64 or int32 {shape}")
    _require_integers(array, name)
    return cast(Ids, np.ascontiguousarray(array))


def _require_integers(array: NDArray[Any], name: str) -> None:
    if array.dtype not in (np.int64, np.int32):
        raise LookupRejected(f"{name}: found {_found(array)}; allowed: int64 or int32")


def _array(value: Any, dtype_if_empty: type) -> NDArray[Any]:
    """`value` as an array. Lists are taken as their numbers say, so that `[1.5]` is not silently truncated to an id."""
    if isinstance(value, np.ndarray):
        return value
    array = np.asarray(value)
    if array.size == 0 or (dtype_if_empty is np.float32 and array.dtype == np.float64):
        return array.astype(dtype_if_empty)
    return array


def _found(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype.name} {list(value.shape)}{'' if value.flags.c_contiguous else ', not contiguous'}"
    return type(value).__name__
