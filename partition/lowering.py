"""From operators on tensors to the steps of a program: where every value of one sample lies, and what writes it.

A value is a view, `offset` and strides in one of the program's spaces, the batch left out. Operators that only move elements become
other views of the same elements; torch itself says which, on tensors without memory whose strides say where each element is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from sidepool.partition.capture import Captured
from sidepool.partition.sources import evaluate, probe_inputs
from sidepool.wire.program import FIRST_LEAF, MAX_FLOATS, MAX_RANK, MAX_STEPS, RESULT, SCRATCH, WEIGHTS, Step

# Elements between two samples of a tensor without memory: more than any space has, so that views that mix samples show.
_APART = 1 << 40
# What values are in a program. Whole numbers stay on the ranker, where they keep every bit.
DTYPES = (torch.float32, torch.bool)


class Unsupported(Exception):
    """An operator, or a use of one, that programs do not have; says which."""


class Mixing(Unsupported):
    """An operator that computes one sample from others: no program has it, whoever runs it."""


@dataclass(frozen=True)
class View:
    """A value of one sample, `shape` without the batch."""

    space: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def permuted(self, order: Sequence[int]) -> View:
        """Dimensions in another order."""
        return replace(self, shape=tuple(self.shape[d] for d in order), strides=tuple(self.strides[d] for d in order))

    def broadcast(self, shape: Sequence[int]) -> View:
        """Repeated to `shape`, as torch broadcasts."""
        missing = len(shape) - len(self.shape)
        if missing < 0 or any(n not in (1, want) for n, want in zip(self.shape, shape[missing:], strict=True)):
            raise Unsupported(f"shapes {list(self.shape)} and {list(shape)} do not go together sample by sample")
        strides = [0 if n == 1 else s for n, s in zip(self.shape, self.strides, strict=True)]
        return replace(self, shape=tuple(shape), strides=(*[0] * missing, *strides))


Value = View | tuple[View, ...]


def contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a tensor whose rows lie one after another."""
    return tuple(math.prod(shape[d + 1 :]) for d in range(len(shape)))


def _broadcast(*shapes: tuple[int, ...]) -> tuple[int, ...]:
    try:
        return tuple(torch.broadcast_shapes(*shapes))  # type: ignore[no-untyped-call]
    except RuntimeError:
        raise Unsupported(f"shapes {', '.join(str(list(s)) for s in shapes)} that do not go together sample by sample") from None


class Steps:
    """Steps under construction, the constants that they read, and the scratch that they write."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.floats = 0
        self._weights: list[Tensor] = []
        self._weight_floats = 0

    def weights(self) -> Tensor:
        """All constants, float32 `[n]`."""
        return torch.cat(self._weights) if self._weights else torch.zeros(0)

    def constant(self, value: Tensor) -> View:
        """A constant `value`, one for all samples."""
        stored = value.detach().to(torch.float32)
        if not value.dtype.is_floating_point and not torch.equal(stored.to(value.dtype), value):
            raise Unsupported("whole numbers beyond 2^24")
        if not bool(torch.isfinite(stored).all()):
            raise Unsupported("a constant that is NaN or infinite")
        view = View(WEIGHTS, self._weight_floats, tuple(value.shape), contiguous(value.shape))
        self._weights.append(stored.reshape(-1).clone())
        self._weight_floats += stored.numel()
        return view

    def map(self, op: str, *operands: View) -> View:
        """An element-wise operator. Its result lies as the first operand that has every element does, so that loops are long."""
        shape = _broadcast(*(o.shape for o in operands))
        whole = [o for o in operands if o.space != WEIGHTS and o.shape == shape and 0 not in o.strides]
        leader = whole[0].strides if whole else contiguous(shape)
        order = sorted(range(len(shape)), key=lambda d: -leader[d])
        out = self._new([shape[d] for d in order])
        self._add(op, out.shape, out, *(o.broadcast(shape).permuted(order) for o in operands))
        return out.permuted([order.index(d) for d in range(len(shape))])

    def reduce(self, op: str, view: View, dim: int) -> View:
        """Over one dimension, which stays with size 1."""
        others = sorted((d for d in range(len(view.shape)) if d != dim), key=lambda d: -view.strides[d])
        out = self._new([view.shape[d] for d in others])
        self._add(op, [*out.shape, view.shape[dim]], self._last(out), view.permuted([*others, dim]))
        back = self._last(out).permuted([[*others, dim].index(d) for d in range(len(view.shape))])
        return replace(back, shape=tuple(1 if d == dim else n for d, n in enumerate(view.shape)))

    def softmax(self, view: View, dim: int) -> View:
        """Over one dimension."""
        order = [*(d for d in range(len(view.shape)) if d != dim), dim]
        given = view.permuted(order)
        out = self._new(given.shape)
        self._add("softmax", given.shape, out, given)
        return out.permuted([order.index(d) for d in range(len(order))])

    def matmul(self, a: View, b: View, added: View | None = None) -> View:
        """`[…, rows, depth]` times `[…, depth, columns]`, with something added that broadcasts to the result."""
        batch = _broadcast(a.shape[:-2], b.shape[:-2])
        if a.shape[-1] != b.shape[-2]:
            raise Unsupported(f"a product of {list(a.shape)} and {list(b.shape)}")
        if b.shape[-1] == 1:
            b = replace(b, strides=(*b.strides[:-1], 1))
        elif b.strides[-1] != 1:
            b = self.copied(b)
        shape = (*batch, a.shape[-2], b.shape[-1])
        out = self._new(shape)
        operands = [a.broadcast((*batch, *a.shape[-2:])), b.broadcast((*batch, *b.shape[-2:]))]
        # A size of 1 has no stride of its own, but the last of the second operand counts as side by side.
        operands[1] = replace(operands[1], strides=(*operands[1].strides[:-1], 1))
        if added is not None:
            operands.append(added.broadcast(shape))
        self._add("matmul", shape, out, *operands, depth=a.shape[-1])
        return out

    def copied(self, view: View, out: View | None = None) -> View:
        """A copy whose rows lie one after another, or in `out`."""
        out = out or self._new(view.shape)
        self._add("copy", view.shape, out, view)
        return out

    def joined(self, views: Sequence[View], dim: int) -> View:
        """Views side by side along `dim`."""
        shape = list(views[0].shape)
        shape[dim] = sum(v.shape[dim] for v in views)
        whole = self._new(shape)
        at = 0
        for view in views:
            self.copied(view, replace(whole, offset=whole.offset + at * whole.strides[dim], shape=view.shape))
            at += view.shape[dim]
        return whole

    def result(self, view: View, column: int) -> int:
        """Write `view` into the result, row by row, from `column` on; returns where it ends."""
        self.copied(view, View(RESULT, column, view.shape, contiguous(view.shape)))
        return column + math.prod(view.shape)

    def _new(self, shape: Sequence[int]) -> View:
        view = View(SCRATCH, self.floats, tuple(shape), contiguous(shape))
        self.floats += math.prod(shape)
        if self.floats > MAX_FLOATS:
            raise Unsupported(f"more than {MAX_FLOATS} values a sample")
        return view

    def _last(self, view: View) -> View:
        """With a last dimension that is not there."""
        return replace(view, shape=(*view.shape, 1), strides=(*view.strides, 0))

    def _add(self, op: str, sizes: Sequence[int], *operands: View, depth: int = 0) -> None:
        if len(sizes) > MAX_RANK or len(self.steps) >= MAX_STEPS:
            raise Unsupported(f"more than {MAX_RANK} dimensions, or {MAX_STEPS} steps")
        scalar = not sizes  # one number a sample
        given = tuple((o.space, o.offset, *((0,) if scalar else o.strides)) for o in operands)
        self.steps.append(Step(op=op, sizes=(1,) if scalar else tuple(sizes), depth=depth, operands=given))  # type: ignore[arg-type]


class Values:
    """Values of a captured graph's nodes: leaves that are given, constants, and what operators make of them."""

    def __init__(self, captured: Captured, varying: frozenset[fx.Node], leaves: Sequence[fx.Node]) -> None:
        """varying: nodes whose values depend on inputs. leaves: what the program is given, in the order of its spaces."""
        self.captured, self.varying = captured, varying
        self.steps = Steps()
        self._probe = probe_inputs(captured, 2)
        self._known: dict[fx.Node, Value] = {}
        for i, node in enumerate(leaves):
            shape = sample_shape(node)
            self._known[node] = View(FIRST_LEAF + i, 0, shape, contiguous(shape))

    def __contains__(self, node: fx.Node) -> bool:
        return node in self._known

    def set(self, node: fx.Node, value: Value) -> None:
        """What an operator gives."""
        self._known[node] = value

    def stand_in(self, node: fx.Node) -> None:
        """Take a value for known that no step gives: whether others could follow is all that is asked."""
        shape = sample_shape(node)
        self._known[node] = View(SCRATCH, 0, shape, contiguous(shape))

    def several(self, node: fx.Node) -> Sequence[View]:
        """Results of an operator with several."""
        if node not in self._known:
            raise Unsupported(f"{node.name}, which stays on the ranker")
        value = self._known[node]
        return value if isinstance(value, tuple) else (value,)

    def view(self, argument: object) -> View:
        """A tensor or a number among an operator's arguments."""
        if isinstance(argument, int | float):
            return self.steps.constant(torch.tensor(float(argument)))
        if not isinstance(argument, fx.Node):
            raise Unsupported(f"the argument {argument!r}")
        if argument not in self._known:
            if argument in self.varying:
                raise Unsupported(f"{argument.name}, which stays on the ranker")
            self._known[argument] = self.steps.constant(self.constant(argument))
        value = self._known[argument]
        if not isinstance(value, View):
            raise Unsupported(f"several results of {argument.name}")
        return value

    def operand(self, argument: object, result: fx.Node) -> View:
        """An argument of an element-wise operator that gives `result`, whose batch no other dimension may meet."""
        view, rank = self.view(argument), result.meta["val"].dim()
        if not isinstance(argument, fx.Node):
            return view
        if argument in self.varying:
            if argument.meta["val"].dim() != rank:
                raise Mixing("samples that are mixed")
        elif len(view.shape) == rank:  # one for all samples
            if view.shape[0] != 1:
                raise Unsupported(f"{argument.name}, which differs from sample to sample")
            view = replace(view, shape=view.shape[1:], strides=view.strides[1:])
        return view

    def constant(self, node: fx.Node) -> Tensor:
        """A value that is the same in every call; its batch, if it has one, left out."""
        value = evaluate(node, self._probe)
        if not isinstance(value, Tensor):
            value = torch.tensor(float(value))
        known = node.meta.get("val")
        if isinstance(known, Tensor) and known.dim() and isinstance(known.shape[0], torch.SymInt):
            if not torch.equal(value[0], value[1]):
                raise Unsupported(f"{node.name}, which differs from sample to sample")
            value = value[0]
        return value

    def moved(self, node: fx.Node) -> Value:
        """What an operator that only moves elements gives of its first argument."""
        source = self.view(node.args[0])
        found = self._moved(node, source)
        if found is None:
            found = self._moved(node, self.steps.copied(source))
        if found is None:
            raise Unsupported("samples that are mixed, or elements that are no view")
        return found

    def _moved(self, node: fx.Node, source: View) -> Value | None:
        space = torch.empty(3 * _APART, device="meta")
        given = space.as_strided((2, *source.shape), (_APART, *source.strides), source.offset)

        def argument(n: fx.Node) -> Any:
            return given if n is node.args[0] else evaluate(n, self._probe)

        args, kwargs = fx.node.map_arg((node.args, node.kwargs), argument)
        found = node.target(*args, **kwargs)  # type: ignore[operator]
        views = [self._as_view(t, space, source.space) for t in (found if isinstance(found, list | tuple) else (found,))]
        if any(v is None for v in views):
            return None
        return tuple(v for v in views if v is not None) if isinstance(found, list | tuple) else views[0]

    def _as_view(self, found: Tensor, space: Tensor, number: int) -> View | None:
        same = found.untyped_storage()._cdata == space.untyped_storage()._cdata
        if not same or found.dim() == 0 or found.shape[0] != 2 or found.stride(0) != _APART:
            return None
        return View(number, int(found.storage_offset()), tuple(found.shape[1:]), found.stride()[1:])


def sample_shape(node: fx.Node) -> tuple[int, ...]:
    """The shape of one sample of a value, which must be a tensor `[batch, …]` of a dtype that programs have."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.dim() == 0 or not isinstance(value.shape[0], torch.SymInt):
        raise Unsupported("a value without a batch")
    if value.dtype not in DTYPES:
        raise Unsupported(f"{str(value.dtype).removeprefix('torch.')} values")
    if not all(isinstance(n, int) for n in value.shape[1:]):
        raise Unsupported("sizes that vary beside the batch")
    return tuple(int(n) for n in value.shape[1:])
