"""What a program gives, by torch's own operators: what a cut and an artifact are compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sidepool.partition.reference import pool_rows
from sidepool.wire.plan import Pooling
from sidepool.wire.program import FIRST_LEAF, RESULT, WEIGHTS, Program, Step

_ELEMENTWISE: dict[str, Callable[..., Tensor]] = {
    "copy": lambda a: a,
    "negate": torch.neg,
    "absolute": torch.abs,
    "exp": torch.exp,
    "log": torch.log,
    "sqrt": torch.sqrt,
    "reciprocal": torch.reciprocal,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "logical_not": torch.logical_not,
    "add": torch.add,
    "subtract": torch.sub,
    "multiply": torch.mul,
    "divide": torch.div,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "less": torch.lt,
    "less_equal": torch.le,
    "equal": torch.eq,
    "not_equal": torch.ne,
    "logical_and": torch.logical_and,
    "logical_or": torch.logical_or,
    "where": lambda a, b, c: torch.where(a != 0, b, c),
    "softmax": lambda a: torch.softmax(a, -1),
}
_REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda a: a.sum(-1),
    "largest": lambda a: a.amax(-1),
    "smallest": lambda a: a.amin(-1),
}


def run_program(
    program: Program,
    record: Tensor,
    read: Callable[[str, Tensor], Tensor],
    weights: Tensor,
    dim: int,
    torch_program: Callable[..., Sequence[Tensor]] | None = None,
) -> Tensor:
    """Results `[batch, dim]`, float32, of records `[batch, words]`, int64.

    read: rows `[n, dim]` of a table's ids `[n]`, as float32. weights: `[rows, dim]`, the rows of the computed table.
    torch_program: what torch runs in place of steps.
    """
    batch = record.shape[0]
    spaces = [torch.zeros(batch, max(1, program.floats)), weights.reshape(1, -1).expand(batch, -1), torch.zeros(batch, dim)]
    for x in program.lookups:
        ids = record[:, x.begin : x.begin + x.ids]
        rows = pool_rows(lambda found, t=x.table: read(t, found), ids, Pooling(x.pooling), padding_index=x.padding_index)  # type: ignore[misc]
        spaces.append(rows.reshape(batch, -1))
    for given in program.inputs:
        words = record[:, given.begin : given.begin + given.words].contiguous()
        values = words.view(torch.float32) if given.kind == "float32" else words.view(torch.uint8).float()
        spaces.append(values[:, : given.count].contiguous())
    if torch_program is not None:
        return torch_program(*spaces[FIRST_LEAF:])[0]
    for step in program.steps:
        _run_step(step, spaces)
    return spaces[RESULT]


def _run_step(step: Step, spaces: Sequence[Tensor]) -> None:
    sizes = list(step.sizes)
    out, *operands = step.operands
    if step.op == "matmul":
        shapes = [[*sizes[:-1], step.depth], [*sizes[:-2], step.depth, sizes[-1]], sizes]
        a, b, *c = (_view(spaces, o, shape) for o, shape in zip(operands, shapes, strict=False))
        found = torch.matmul(a, b) + c[0] if c else torch.matmul(a, b)
    elif step.op in _REDUCTIONS:
        found = _REDUCTIONS[step.op](_view(spaces, operands[0], sizes))
        sizes, out = sizes[:-1], out[:-1]
    else:
        found = _ELEMENTWISE[step.op](*(_view(spaces, o, sizes) for o in operands))
    _view(spaces, out, sizes).copy_(found)


def _view(spaces: Sequence[Tensor], operand: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """An operand of every sample, `[batch, …]`."""
    space, offset, *strides = operand
    whole = spaces[space]
    first = whole.storage_offset() + offset
    per_sample = 0 if space == WEIGHTS else whole.stride(0)
    return whole.as_strided([whole.shape[0], *sizes], [per_sample, *strides], first)
