"""Programs of sidecars give what torch gives: every operator that models use, any sizes, every instruction set."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from sidepool import _native
from sidepool.partition.capture import Captured, capture
from sidepool.partition.lookups import Lookup, find_lookups
from sidepool.partition.lowering import Steps, View, contiguous
from sidepool.partition.movable import movable_operators
from sidepool.partition.program_reference import run_program
from sidepool.partition.sidecar_programs import Sketch, make_computed
from sidepool.partition.sources import Columns, evaluate
from sidepool.wire.plan import Plan, Shard, SidecarAddress, Table, validate_plan
from sidepool.wire.program import FIRST_LEAF, Program, ProgramInput, ProgramLookup
from sidepool.wire.shard_reader import add_programs

LENGTH, DIM = 6, 5


@pytest.fixture(autouse=True)
def best_level() -> Iterator[None]:
    """Whatever level a test forced, the next one starts with the best."""
    best = _native.simd_level()
    yield
    _native.force_simd_level(best)


class EveryOperator(nn.Module):
    """What programs have, over rows of a history, a candidate's row, a mask and numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.items = nn.Embedding(40, DIM)
        self.layer, self.bare = nn.Linear(DIM, 19), nn.Linear(DIM, 3, bias=False)
        self.norm, self.batch_norm = nn.LayerNorm(DIM), nn.BatchNorm1d(LENGTH)
        self.slope = nn.PReLU(LENGTH)
        self.matrix = nn.Parameter(torch.randn(DIM, 7))
        nn.init.normal_(self.batch_norm.weight), nn.init.normal_(self.batch_norm.bias)
        nn.init.uniform_(self.batch_norm.running_var, 0.5, 2), nn.init.normal_(self.batch_norm.running_mean)

    def forward(self, history: Tensor, item: Tensor, length: Tensor, numbers: Tensor) -> tuple[Tensor, ...]:
        x, one = self.items(history), self.items(item).unsqueeze(1)
        mask = torch.arange(LENGTH).unsqueeze(0) < length
        scores = (x * one).sum(2)
        shares = torch.softmax(scores.masked_fill(~mask, -1e9), 1)
        wide = torch.cat([x, one.expand(-1, LENGTH, -1), x - one, one.repeat(1, LENGTH, 1)], dim=2)
        ways = x.unflatten(2, (DIM, 1)).transpose(1, 2).reshape(-1, DIM, LENGTH)
        return (
            torch.einsum("bkd,bd->bk", x, one.squeeze(1)), torch.einsum("bk, bkd -> bd", shares, x),
            torch.einsum("bkd,bld->blk", x, x), torch.einsum("bkd,bkd->bdk", x, x), self.layer(x), self.bare(x),
            self.norm(x), self.batch_norm(x), self.slope(x), x @ self.matrix,
            torch.bmm(x, x.transpose(1, 2)), torch.matmul(shares.unsqueeze(1), x), wide, torch.stack([x, -x], dim=1), ways,
            torch.relu(x), torch.sigmoid(x), torch.tanh(3 * x), functional.silu(x), functional.leaky_relu(x, 0.2), torch.exp(x),
            torch.log(x.abs() + 0.1), torch.sqrt(x.abs()), torch.rsqrt(x.abs() + 1), torch.reciprocal(x.abs() + 1), x**2,
            x.clamp(-0.5, 0.5), torch.maximum(x, one), torch.minimum(x, one), x / (one.abs() + 1), 1 - x,
            torch.add(x, one, alpha=0.5),
            torch.where((x > one) & (x < 1.0), x, 0.25), torch.where((x >= one) | (x <= -1.0), x, one), x * mask.unsqueeze(2),
            (x * mask.unsqueeze(2).repeat_interleave(DIM, dim=2)).sum(1), x.mean(1), x.mean((1, 2)), x.amax(1), x.amin(2),
            x.max(1)[0],
            x.sum(2, keepdim=True), torch.softmax(x, 1), shares, x[:, 1:4, 2], x.chunk(2, dim=1)[0], x.permute(0, 2, 1),
            x * numbers.unsqueeze(1), torch.ones_like(x) * x, (x == one).float(), (x != one).float() + x.logical_not().float(),
        )  # fmt: skip


def inputs(batch: int) -> tuple[Tensor, ...]:
    item = torch.randint(0, 40, (batch,))
    return torch.randint(0, 40, (batch, LENGTH)), item, torch.randint(0, LENGTH + 1, (batch, 1)), torch.randn(batch, DIM)


def tables_of(computed: Program, rows: dict[str, Tensor], weights: Tensor) -> _native.TableSet:
    """A table set of `rows` by name, and behind them the computed table, which is feature 0."""
    names = [*rows, "program"]
    values = [*rows.values(), weights]
    tables = tuple(
        Table(name=n, rows=v.shape[0], dim=v.shape[1], program=computed if n == "program" else None)
        for n, v in zip(names, values, strict=True)
    )
    plan = Plan(
        epoch=1, model="m", tables=tables, features=({"name": "f", "table": "program"},),  # type: ignore[arg-type]
        sidecars=(SidecarAddress(name="s", address="127.0.0.1:1"),),
        shards=tuple(Shard(table=t.name, sidecar="s", rows=(0, t.rows), columns=(0, t.dim)) for t in tables),
    )  # fmt: skip
    validate_plan(plan)
    found = _native.TableSet(1, len(names), 1)
    for i, value in enumerate(values):
        found.add_table_array(i, value.detach().numpy(), "error", 0)
    add_programs(found, plan, dict.fromkeys(range(len(names)), Path()))
    found.add_feature(0, len(rows), "sum", False)
    found.seal()
    return found


def run_natively(tables: _native.TableSet, record: Tensor, dim: int, dtype: type = np.float32) -> NDArray[np.float32]:
    batch, words = record.shape
    out = np.full((batch, dim), np.nan, dtype)
    lengths = np.full(batch, words, np.int32)
    status = _native.pool(tables, 0, record.contiguous().view(-1).numpy(), lengths, None, out)
    assert status == (0, 0, -1, 0)
    return out


def everything_as_a_program() -> tuple[EveryOperator, Lookup, Captured]:
    torch.manual_seed(2)
    model = EveryOperator().eval()
    captured = capture(model, inputs(4))
    lookups = find_lookups(captured).lookups
    movable = movable_operators(captured, lookups)
    assert movable.reasons == {}
    operators = tuple(n for n in captured.graph.nodes if n in movable.operators and n not in movable.free)
    sketch = Sketch(operators, captured.outputs, lookups)
    return model, make_computed(captured, sketch, "program"), captured


def test_every_operator_that_programs_have_gives_what_the_model_gives() -> None:
    model, computed, captured = everything_as_a_program()
    assert computed.program is not None
    assert isinstance(computed.source, Columns)
    # The mask is computed from the length, and travels as a byte each; the numbers as they are.
    assert [(x.kind, x.count) for x in computed.program.inputs] == [("bytes", LENGTH), ("float32", DIM)]
    tables = tables_of(computed.program, dict(computed.reads), computed.weight)
    states = {node: value for node, (_, value) in captured.states.items()}
    for batch in (1, 3, 150):
        arguments = inputs(batch)
        record = evaluate(computed.source.root, states | dict(zip(captured.inputs, arguments, strict=True)))
        with torch.no_grad():
            expected = torch.cat([t.reshape(batch, -1) for t in model(*arguments)], dim=1)
        for level in _native.simd_levels():
            _native.force_simd_level(level)
            found = run_natively(tables, record, computed.dim)
            torch.testing.assert_close(
                torch.from_numpy(found), expected, rtol=1e-5, atol=1e-6, msg=lambda m, at=level: f"{at}: {m}"
            )
        halves = run_natively(tables, record, computed.dim, np.float16)
        np.testing.assert_array_equal(halves, found.astype(np.float16))


@st.composite
def products(draw: st.DrawFn) -> tuple[Program, Tensor, Tensor, int]:
    """Attention of any size: a layer over rows, a softmax over a permuted view, a weighted sum; and weights, and rows."""
    rows, dim, hidden = draw(st.integers(1, 70)), draw(st.integers(1, 40)), draw(st.integers(1, 70))
    steps = Steps()
    history = View(FIRST_LEAF, 0, (rows, dim), contiguous((rows, dim)))
    numbers = View(FIRST_LEAF + 1, 0, (hidden,), (1,))
    layer = steps.constant(torch.randn(dim, hidden) / dim)
    bias = steps.constant(torch.randn(hidden)) if draw(st.booleans()) else None
    scores = steps.map(draw(st.sampled_from(["tanh", "sigmoid", "relu"])), steps.matmul(history, layer, bias))
    turned = steps.map("multiply", scores, numbers).permuted((1, 0))
    turned = steps.copied(turned) if draw(st.booleans()) else turned
    shares = steps.softmax(turned, draw(st.integers(0, 1)))
    summed = steps.matmul(shares, history)  # [hidden, dim]
    found = steps.reduce(draw(st.sampled_from(["sum", "largest", "smallest"])), summed, draw(st.integers(0, 1)))
    columns = steps.result(found, 0)
    weights = steps.weights()
    filled = torch.zeros(-(-weights.numel() // columns) * columns)
    filled[: weights.numel()] = weights
    given = ProgramInput(kind="float32", begin=rows, count=hidden)
    lookup = ProgramLookup(table="t", pooling="none", begin=0, ids=rows)
    program = Program(words=rows + given.words, floats=steps.floats, lookups=(lookup,), inputs=(given,), steps=tuple(steps.steps))
    return program, filled.view(-1, columns), torch.randn(50, dim), columns


@given(products(), st.integers(1, 70))
@settings(max_examples=60, deadline=None)
def test_attention_of_any_size_gives_what_torch_gives(case: tuple[Program, Tensor, Tensor, int], batch: int) -> None:
    program, weights, rows, columns = case
    (given_numbers,) = program.inputs
    ids = torch.randint(0, 50, (batch, given_numbers.begin))
    packed = torch.zeros(batch, 2 * given_numbers.words)
    packed[:, : given_numbers.count] = torch.randn(batch, given_numbers.count)
    record = torch.cat([ids, packed.view(torch.int64)], dim=1)
    expected = run_program(program, record, lambda _, found: rows[found], weights, columns)
    tables = tables_of(program, {"t": rows}, weights)
    for level in _native.simd_levels():
        _native.force_simd_level(level)
        found = torch.from_numpy(run_natively(tables, record, columns))
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5, msg=lambda m, at=level: f"{at}: {m}")


def test_functions_are_right_to_the_last_places_over_their_whole_range() -> None:
    count = 20_001
    values = torch.cat([torch.linspace(-110, 110, count), torch.linspace(-1, 1, count), torch.tensor([0.0, -0.0, 1e-30])])
    width = 87  # of a sample: neither a power of two nor a multiple of one
    values = values[: values.numel() // width * width].view(-1, width)
    operators: dict[str, object] = {"exp": torch.exp, "sigmoid": torch.sigmoid, "tanh": torch.tanh}
    for name, reference in operators.items():
        steps = Steps()
        steps.result(steps.map(name, View(FIRST_LEAF + 1, 0, (width,), (1,))), 0)
        given = ProgramInput(kind="float32", begin=1, count=width)
        lookup = ProgramLookup(table="t", begin=0, ids=1)
        program = Program(words=1 + given.words, floats=steps.floats, lookups=(lookup,), inputs=(given,), steps=tuple(steps.steps))
        tables = tables_of(program, {"t": torch.zeros(2, 1)}, torch.zeros(1, width))
        packed = torch.nn.functional.pad(values, (0, 1)).contiguous().view(torch.int64)
        record = torch.cat([torch.zeros(values.shape[0], 1, dtype=torch.int64), packed], dim=1)
        expected = reference(values.double()).float()  # type: ignore[operator]
        for level in _native.simd_levels():
            _native.force_simd_level(level)
            found = torch.from_numpy(run_natively(tables, record, width))
            # Below the smallest normal number zero is near enough.
            torch.testing.assert_close(
                found, expected, rtol=1e-6, atol=1.25e-38, msg=lambda m, at=level, of=name: f"{at} {of}: {m}"
            )
