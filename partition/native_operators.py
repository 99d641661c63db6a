"""The operators that programs have: what of ATen becomes which steps. docs/programs.md lists them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from sidepool.partition.lowering import DTYPES, Mixing, Unsupported, Value, Values, View, contiguous, sample_shape
from sidepool.partition.sources import MOVES, packet

aten = torch.ops.aten

_SAME = {aten.clone, aten.contiguous, aten.detach, aten.alias, aten.lift_fresh_copy, aten.dropout}
_UNARY = {
    aten.neg: "negate", aten.abs: "absolute", aten.exp: "exp", aten.log: "log", aten.sqrt: "sqrt", aten.reciprocal: "reciprocal",
    aten.sigmoid: "sigmoid", aten.tanh: "tanh", aten.relu: "relu", aten.logical_not: "logical_not",
}  # fmt: skip
_BINARY = {
    aten.mul: "multiply", aten.div: "divide", aten.maximum: "maximum", aten.minimum: "minimum", aten.lt: "less",
    aten.le: "less_equal", aten.eq: "equal", aten.ne: "not_equal", aten.logical_and: "logical_and", aten.logical_or: "logical_or",
}  # fmt: skip
_TRUTH = {
    aten.bitwise_and: "logical_and", aten.__and__: "logical_and", aten.bitwise_or: "logical_or", aten.__or__: "logical_or",
    aten.bitwise_not: "logical_not",
}  # fmt: skip
_SWAPPED = {aten.gt: "less", aten.ge: "less_equal"}
_FILLED = {aten.ones_like: 1.0, aten.zeros_like: 0.0}


def lower(values: Values, node: fx.Node) -> None:
    """Add the steps of one operator whose inputs are known; raises `Unsupported` where programs do not have it."""
    values.set(node, _lowered(values, node))


def _lowered(values: Values, node: fx.Node) -> Value:
    operation = packet(node)
    if node.target is operator.getitem:
        results = values.several(node.args[0])  # type: ignore[arg-type]
        index: Any = node.args[1]
        if index >= len(results):
            raise Unsupported(f"result {index} of {node.args[0]}")
        result: View = results[index]
        return result
    if isinstance(node.meta.get("val"), Tensor):
        sample_shape(node)
    if operation in _SAME:
        return values.view(node.args[0])
    if operation in MOVES:
        return values.moved(node)
    return _computed(values, node, operation)


def _computed(values: Values, node: fx.Node, operation: Any) -> Value:
    steps, args = values.steps, node.args
    if set(node.kwargs) - {"alpha", "pin_memory", "device", "layout", "memory_format", "dtype"}:
        raise Unsupported(f"{operation} with {', '.join(node.kwargs)}")
    if node.kwargs.get("dtype") not in (None, *DTYPES):
        raise Unsupported(f"{operation} to {node.kwargs['dtype']}")
    if operation in _UNARY:
        return steps.map(_UNARY[operation], values.view(args[0]))
    if operation in _BINARY:
        return steps.map(_BINARY[operation], *(values.operand(a, node) for a in args[:2]))
    if operation in _SWAPPED:
        return steps.map(_SWAPPED[operation], *(values.operand(a, node) for a in args[1::-1]))
    if operation in _TRUTH and node.meta["val"].dtype is torch.bool:
        return steps.map(_TRUTH[operation], *(values.operand(a, node) for a in args))
    if operation in _FILLED or operation is aten.full_like:
        number: Any = _FILLED.get(operation, args[1] if len(args) > 1 else None)
        return values.view(number).broadcast(sample_shape(node))
    found = _OTHERS.get(operation)
    if found is None:
        raise Unsupported(f"{node.target}, which is none of a program's operators")
    return found(values, node)


def _sum_of_two(values: Values, node: fx.Node) -> View:
    """`add`, `sub` and `rsub`, with their factor."""
    first, second = values.operand(node.args[0], node), values.operand(node.args[1], node)
    alpha: Any = node.kwargs.get("alpha", node.args[2] if len(node.args) > 2 else 1)
    if node.meta["val"].dtype is torch.bool:
        raise Unsupported("sums of truth values")
    reverse = packet(node) is aten.rsub
    if alpha != 1:
        scaled = values.steps.map("multiply", first if reverse else second, values.view(alpha))
        first, second = (scaled, second) if reverse else (first, scaled)
    if packet(node) is aten.add:
        return values.steps.map("add", first, second)
    return values.steps.map("subtract", *((second, first) if reverse else (first, second)))


def _power(values: Values, node: fx.Node) -> View:
    base, exponent = values.view(node.args[0]), node.args[1]
    if exponent == 2:
        return values.steps.map("multiply", base, base)
    if exponent == 0.5:
        return values.steps.map("sqrt", base)
    raise Unsupported(f"powers of {exponent}")


def _rsqrt(values: Values, node: fx.Node) -> View:
    return values.steps.map("reciprocal", values.steps.map("sqrt", values.view(node.args[0])))


def _silu(values: Values, node: fx.Node) -> View:
    given = values.view(node.args[0])
    return values.steps.map("multiply", given, values.steps.map("sigmoid", given))


def _leaky(values: Values, node: fx.Node) -> View:
    """`leaky_relu` and `prelu`: a slope below zero."""
    given, zero = values.view(node.args[0]), values.view(0.0)
    slope = values.view(node.args[1] if len(node.args) > 1 else 0.01)
    if packet(node) in (aten.prelu, aten._prelu_kernel) and len(slope.shape) == 1 and len(given.shape) > 1:
        slope = replace(
            slope, shape=(*slope.shape, *[1] * (len(given.shape) - 1)), strides=(*slope.strides, *[0] * (len(given.shape) - 1))
        )
    below = values.steps.map("multiply", given, slope)
    return values.steps.map("where", values.steps.map("less", given, zero), below, given)


def _clamp(values: Values, node: fx.Node) -> View:
    found = values.view(node.args[0])
    for op, limit in zip(("maximum", "minimum"), node.args[1:], strict=False):
        if limit is not None:
            found = values.steps.map(op, found, values.view(limit))
    return found


def _cast(values: Values, node: fx.Node) -> View:
    given = values.view(node.args[0])
    if node.meta["val"].dtype is torch.bool and node.args[0].meta["val"].dtype is not torch.bool:  # type: ignore[union-attr]
        return values.steps.map("not_equal", given, values.view(0.0))
    return given


def _where(values: Values, node: fx.Node) -> View:
    return values.steps.map("where", *(values.operand(a, node) for a in node.args))


def _masked_fill(values: Values, node: fx.Node) -> View:
    given, mask, filling = (values.operand(a, node) for a in node.args)
    return values.steps.map("where", mask, filling, given)


def _dims(node: fx.Node, dims: Any) -> list[int]:
    """Dimensions of a sample, for `dims` of a batch."""
    rank = node.args[0].meta["val"].dim()  # type: ignore[union-attr]
    given = [dims] if isinstance(dims, int) else list(dims or range(rank))
    found = [d % rank - 1 for d in given]
    if -1 in found:
        raise Mixing("something taken over the batch")
    return found


def _reduced(values: Values, node: fx.Node) -> Value:
    operation, view = packet(node), values.view(node.args[0])
    dims = _dims(node, node.args[1] if len(node.args) > 1 else None)
    keep = bool(node.args[2]) if len(node.args) > 2 else False
    step = {
        aten.sum: "sum",
        aten.mean: "sum",
        aten.amax: "largest",
        aten.max: "largest",
        aten.amin: "smallest",
        aten.min: "smallest",
    }
    count = 1
    for dim in dims:
        count *= view.shape[dim]
        view = values.steps.reduce(step[operation], view, dim)
    if operation is aten.mean:
        view = values.steps.map("divide", view, values.view(float(count)))
    kept = [d for d in range(len(view.shape)) if keep or d not in dims]
    found = view.permuted(kept)
    return (found,) if operation in (aten.max, aten.min) else found  # its places are not there


def _softmax(values: Values, node: fx.Node) -> View:
    (dim,) = _dims(node, node.args[1])
    return values.steps.softmax(values.view(node.args[0]), dim)


def _joined(values: Values, node: fx.Node) -> View:
    items: Any = node.args[0]
    dim: Any = node.args[1] if len(node.args) > 1 else 0
    dim = dim % node.meta["val"].dim() - 1
    if dim < 0:
        raise Mixing("samples that are mixed")
    views = [values.view(item) for item in items]
    # Constants lack the batch: they are the same for every sample.
    if packet(node) is aten.stack:
        views = [
            replace(v, shape=(*v.shape[:dim], 1, *v.shape[dim:]), strides=(*v.strides[:dim], 0, *v.strides[dim:])) for v in views
        ]
    return views[0] if len(views) == 1 else values.steps.joined(views, dim)


def _product(values: Values, node: fx.Node) -> View:
    a, b = values.view(node.args[0]), values.view(node.args[1])
    dims = [n.meta["val"].dim() for n in node.args[:2]]  # type: ignore[union-attr]
    varies = [n in values.varying for n in node.args[:2]]
    if any(n != 2 and not v for n, v in zip(dims, varies, strict=True)) or (all(varies) and dims[0] != dims[1]):
        raise Unsupported("a product with a constant of other than two dimensions, or of samples that are mixed")
    if dims[1] - varies[1] < 2 or (dims[0] - varies[0] == 1 and varies[1]):
        raise Unsupported("a product with vectors")
    if dims[0] - varies[0] == 1:
        found = values.steps.matmul(_row(a), b)
        return replace(found, shape=(*found.shape[:-2], found.shape[-1]), strides=(*found.strides[:-2], found.strides[-1]))
    return values.steps.matmul(a, b)


def _einsum(values: Values, node: fx.Node) -> View:
    """Of two values: letters of both that stay are dimensions to go through, one that vanishes is summed over."""
    equation: Any = node.args[0]
    items: Any = node.args[1]
    sides = equation.replace(" ", "").split("->")
    if (
        len(sides) != 2
        or sides[0].count(",") != 1
        or "." in equation
        or len(items) != 2
        or not all(n in values.varying for n in items)
    ):
        raise Unsupported(f"einsum of {equation!r}")
    (first, second), out = sides[0].split(","), sides[1]
    batch = out[:1]
    if first[:1] != batch or second[:1] != batch or any(len(set(side)) < len(side) for side in (first, second, out)):
        raise Unsupported(f"einsum of {equation!r}")
    first, second, out = first[1:], second[1:], out[1:]
    both = [c for c in out if c in first and c in second]
    groups = ([c for c in first if c not in second and c in out], [c for c in second if c not in first and c in out],
              [c for c in first if c in second and c not in out])  # fmt: skip
    if any(len(g) > 1 for g in groups) or len(both) + sum(map(len, groups)) != len(set(first + second)):
        raise Unsupported(f"einsum of {equation!r}")
    rows, columns, summed = (g[0] if g else "" for g in groups)

    def ordered(item: fx.Node, letters: str, last: Sequence[str]) -> View:
        view, shape, strides = values.view(item), [], []
        for letter in (*both, *last):
            at = letters.find(letter) if letter else -1
            shape.append(1 if at < 0 else view.shape[at])
            strides.append(0 if at < 0 else view.strides[at])
        return replace(view, shape=tuple(shape), strides=tuple(strides))

    found = values.steps.matmul(ordered(items[0], first, (rows, summed)), ordered(items[1], second, (summed, columns)))
    letters = [*both, rows, columns]
    return found.permuted([letters.index(c) for c in out])


def _row(view: View) -> View:
    """A vector as a matrix of one row."""
    return replace(view, shape=(*view.shape[:-1], 1, view.shape[-1]), strides=(*view.strides[:-1], 0, view.strides[-1]))


def _linear(values: Values, node: fx.Node) -> View:
    operation, args = packet(node), node.args
    given, weight = (args[0], args[1]) if operation is aten.linear else (args[1], args[2])
    bias: Any = (args[2] if len(args) > 2 else None) if operation is aten.linear else args[0]
    if weight in values.varying or not isinstance(weight, fx.Node) or set(node.kwargs) - {"dtype"}:
        raise Unsupported("a layer whose weights are computed")
    matrix = values.constant(weight)
    # Stored as the product reads it: the columns of a row side by side.
    b = values.steps.constant(matrix.t().contiguous() if operation is aten.linear else matrix)
    added = None if bias is None else values.view(bias)
    a = values.view(given)
    if len(a.shape) > 1:
        return values.steps.matmul(a, b, added)
    found = values.steps.matmul(_row(a), b, added)
    return replace(found, shape=found.shape[-1:], strides=found.strides[-1:])


def _batch_norm(values: Values, node: fx.Node) -> Value:
    """In eval mode: a factor and an offset per channel, dimension 1 of the batch."""
    _, weight, bias, mean, variance, *rest = node.args
    legit = packet(node) is aten._native_batch_norm_legit_no_training
    if not legit and rest[0]:
        raise Unsupported("batch normalisation in training")
    eps: Any = rest[1] if legit else rest[2]
    known = [None if n is None else values.constant(n).double() for n in (weight, bias, mean, variance)]  # type: ignore[arg-type]
    if known[2] is None or known[3] is None:
        raise Unsupported("batch normalisation without running statistics")
    factor = (known[3] + eps).rsqrt() * (1 if known[0] is None else known[0])
    offset = (0 if known[1] is None else known[1]) - known[2] * factor
    given = values.view(node.args[0])
    shape = [factor.shape[0], *[1] * (len(given.shape) - 1)]
    scaled = values.steps.map("multiply", given, values.steps.constant(factor.float().reshape(shape)))
    found = values.steps.map("add", scaled, values.steps.constant(offset.float().reshape(shape)))
    return (found,) if legit else found


def _layer_norm(values: Values, node: fx.Node) -> View:
    steps, given = values.steps, values.view(node.args[0])
    normalised: Any = node.args[1]
    defaults: tuple[Any, ...] = (None, None, 1e-5)  # weight, bias, eps, where they are not given
    given_to: list[Any] = [*node.args[2:5], *defaults[len(node.args[2:5]) :]]
    weight, bias, eps = given_to
    dims = range(len(given.shape) - len(normalised), len(given.shape))

    def mean(view: View) -> View:
        count = 1
        for dim in dims:
            count *= view.shape[dim]
            view = steps.reduce("sum", view, dim)
        return steps.map("divide", view, values.view(float(count)))

    centred = steps.map("subtract", given, mean(given))
    variance = steps.map("add", mean(steps.map("multiply", centred, centred)), values.view(eps))
    found = steps.map("divide", centred, steps.map("sqrt", variance))
    if weight is not None:
        found = steps.map("multiply", found, values.view(weight))
    return found if bias is None else steps.map("add", found, values.view(bias))


def _repeated(values: Values, node: fx.Node) -> View:
    """`repeat` and `repeat_interleave` by a number: a dimension more that has no stride, laid out anew."""
    view = values.view(node.args[0])
    if packet(node) is aten.repeat_interleave:
        times, dim = node.args[1], node.args[2] if len(node.args) > 2 else None
        if not isinstance(times, int) or dim is None:
            raise Unsupported("repetitions that vary")
        (at,) = _dims(node, dim)
        counts = [(1, times if d == at else 1) for d in range(len(view.shape))]
    else:
        repeats: Any = node.args[1]
        if len(repeats) != len(view.shape) + 1 or repeats[0] != 1 or not all(isinstance(n, int) for n in repeats):
            raise Unsupported("repetitions of samples, or that vary")
        counts = [(n, 1) for n in repeats[1:]]
    shape: list[int] = []
    strides: list[int] = []
    for (before, after), size, stride in zip(counts, view.shape, view.strides, strict=True):
        for n, s in ((before, 0), (size, stride), (after, 0)):
            if n != 1 or s:
                shape.append(n)
                strides.append(s)
    out = values.steps.copied(replace(view, shape=tuple(shape), strides=tuple(strides)))
    final = sample_shape(node)
    return replace(out, shape=final, strides=contiguous(final))


def _expand_as(values: Values, node: fx.Node) -> View:
    return values.view(node.args[0]).broadcast(sample_shape(node))


_OTHERS: dict[Any, Callable[[Values, fx.Node], Value]] = {
    aten.add: _sum_of_two, aten.sub: _sum_of_two, aten.rsub: _sum_of_two, aten.pow: _power, aten.rsqrt: _rsqrt, aten.silu: _silu,
    aten.leaky_relu: _leaky, aten.prelu: _leaky, aten._prelu_kernel: _leaky, aten.clamp: _clamp, aten.clamp_min: _clamp,
    aten._to_copy: _cast, aten.to: _cast, aten.where: _where, aten.masked_fill: _masked_fill, aten.sum: _reduced,
    aten.mean: _reduced, aten.amax: _reduced, aten.amin: _reduced, aten.max: _reduced, aten.min: _reduced,
    aten.softmax: _softmax, aten._softmax: _softmax, aten.cat: _joined, aten.stack: _joined, aten.mm: _product, aten.bmm: _product,
    aten.matmul: _product, aten.einsum: _einsum, aten.linear: _linear, aten.addmm: _linear,
    aten._native_batch_norm_legit_no_training: _batch_norm, aten.batch_norm: _batch_norm, aten.layer_norm: _layer_norm,
    aten.repeat: _repeated, aten.repeat_interleave: _repeated, aten.expand_as: _expand_as,
}  # fmt: skip
