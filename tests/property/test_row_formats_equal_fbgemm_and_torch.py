"""Whatever the shape, the row format, the output format and the SIMD level: pooling gives what torch and FBGEMM give."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from fbgemm import EmbeddingLocation, IntNBitTableBatchedEmbeddingBagsCodegen, PoolingMode, SparseType, needs_fbgemm
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from sidepool import _native
from sidepool.partition.rows import decode, encode
from sidepool.wire.plan import RowFormat

FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
EPSILON = float(np.finfo(np.float32).eps)


@pytest.fixture(autouse=True, params=_native.simd_levels())
def simd_level(request: pytest.FixtureRequest) -> Iterator[str]:
    best = _native.simd_level()
    _native.force_simd_level(request.param)
    yield request.param
    _native.force_simd_level(best)


@dataclass
class Case:
    rows: Tensor
    values: NDArray[np.int64]
    lengths: NDArray[np.int32]
    weights: NDArray[np.float32] | None
    pooling: str
    padding: int | None = None

    @property
    def offsets(self) -> Tensor:
        return torch.from_numpy(np.concatenate(([0], np.cumsum(self.lengths))).astype(np.int64))

    def torch(self, table: Tensor) -> Tensor:
        """torch's own answer; it allows weights with `sum` only, so a weighted mean is that sum over the number of ids."""
        values = torch.from_numpy(self.values)
        if self.pooling == "none":
            return functional.embedding(values, table)
        if self.weights is None:
            return functional.embedding_bag(
                values, table, self.offsets, mode=self.pooling, include_last_offset=True, padding_idx=self.padding
            )
        weights = torch.from_numpy(self.weights)
        pooled = functional.embedding_bag(
            values,
            table,
            self.offsets,
            mode="sum",
            per_sample_weights=weights,
            include_last_offset=True,
            padding_idx=self.padding,
        )
        return pooled / torch.from_numpy(np.maximum(self.counts, 1))[:, None] if self.pooling == "mean" else pooled

    @property
    def counts(self) -> NDArray[np.int64]:
        """Ids of each bag that are no padding."""
        read = torch.from_numpy(self.values != (-1 if self.padding is None else self.padding))
        return np.array([int(part.sum()) for part in read.split(self.lengths.tolist())], np.int64)

    def ours(self, stored: NDArray[np.generic], row_format: str, output: str = "fp32") -> Tensor:
        tables = _native.TableSet(1, 1, 1)
        tables.add_table_array(0, stored, "error", 0, row_format, self.rows.shape[1])
        tables.add_feature(0, 0, self.pooling, self.weights is not None, self.padding)
        tables.seal()
        count = len(self.values) if self.pooling == "none" else len(self.lengths)
        out = torch.full((count, self.rows.shape[1]), torch.nan, dtype=FLOATS[output])
        to = out.view(torch.uint16) if output == "bf16" else out
        assert _native.pool(tables, 0, self.values, self.lengths, self.weights, to.numpy()) == (0, 0, -1, 0)
        return out

    def check(self, found: Tensor, wanted: Tensor, table: Tensor) -> None:
        """Bags of one unweighted id: every bit. Others: 2 ulp · √n of what was added up."""
        if self.pooling in ("none", "max"):
            assert torch.equal(found, wanted.to(found.dtype))
            return
        # A sum of two neighbours in fp32 may fall to either side of where the output format's values meet.
        coarsest = 0.0 if found.dtype is torch.float32 else torch.finfo(found.dtype).eps
        least = 0.0 if found.dtype is torch.float32 else torch.finfo(found.dtype).smallest_normal
        found, wanted = found.float(), wanted.to(found.dtype).float()
        for bag, length in enumerate(self.lengths):
            at = int(self.lengths[:bag].sum())
            ids = torch.from_numpy(self.values[at : at + length])
            if self.counts[bag] <= 1 and self.weights is None:
                assert torch.equal(found[bag], wanted[bag])
                continue
            scale = 1.0 if self.weights is None else torch.from_numpy(self.weights[at : at + length]).abs()[:, None]
            magnitude = (table[ids].abs() * scale).sum(0) / (max(1, self.counts[bag]) if self.pooling == "mean" else 1)
            ulp = coarsest * wanted[bag].abs().clamp(min=least)
            assert ((found[bag] - wanted[bag]).abs() <= 2 * EPSILON * max(1, length) ** 0.5 * magnitude + ulp).all()


@st.composite
def cases(draw: st.DrawFn, dims: st.SearchStrategy[int]) -> Case:
    seed = draw(st.integers(0, 2**32 - 1))
    dim, count = draw(dims), draw(st.integers(1, 60))
    random = np.random.default_rng(seed)
    lengths = np.array(draw(st.lists(st.integers(0, 40), max_size=12)), np.int32)
    nnz = int(lengths.sum())
    pooling = draw(st.sampled_from(["sum", "mean", "max", "none"]))
    weighted = pooling in ("sum", "mean") and draw(st.booleans())
    # Few different ids: bags that hold padding twice, or nothing else, are common.
    drawn_from = draw(st.sampled_from([count, min(count, 3), 1]))
    return Case(
        rows=torch.from_numpy(random.standard_normal((count, dim)).astype(np.float32)),
        values=random.integers(0, drawn_from, nnz),
        lengths=lengths,
        weights=random.standard_normal(nnz).astype(np.float32) if weighted else None,
        pooling=pooling,
        padding=draw(st.none() | st.integers(0, count - 1)),
    )


DIMS = st.one_of(st.integers(1, 140), st.sampled_from([8, 16, 32, 64, 128, 256, 512, 1000, 4096]))


@settings(max_examples=120, deadline=None)
@given(case=cases(DIMS), row_format=st.sampled_from(sorted(FLOATS)))
def test_float_rows_pool_as_torch_pools_them(case: Case, row_format: str) -> None:
    stored, table = store(case.rows, row_format)
    case.check(case.ours(stored, row_format), case.torch(table), table)


@settings(max_examples=120, deadline=None)
@given(case=cases(DIMS), row_format=st.sampled_from([*FLOATS, "int8", "int4"]), output=st.sampled_from(["fp16", "bf16"]))
def test_a_16_bit_output_is_the_fp32_one_rounded_once(case: Case, row_format: str, output: str) -> None:
    stored, table = store(case.rows, row_format)
    found = case.ours(stored, row_format, output)
    assert torch.equal(found.view(torch.int16), case.ours(stored, row_format).to(FLOATS[output]).view(torch.int16))
    if row_format in FLOATS:  # a quantised value may differ in its last bit: we round scale · q + bias once
        case.check(found, case.torch(table), table)


@pytest.mark.parametrize("output", ["fp16", "bf16"])
@pytest.mark.parametrize("dim", [64, 61])
@pytest.mark.parametrize("pooling", ["sum", "none"])
def test_every_value_is_rounded_as_torch_rounds_it(output: str, dim: int, pooling: str) -> None:
    """Values of both formats, what lies halfway between neighbours, and the floats next to that: ties, subnormals, overflow."""
    bits = torch.arange(1 << 16, dtype=torch.int32)
    halves = bits.to(torch.int16).view(torch.float16).float()
    close = [halves.view(torch.int32) + step for step in (0, 0xFFF, 0x1000, 0x1001)]
    close += [(bits << 16) + step for step in (0, 0x7FFF, 0x8000, 0x8001)]
    smallest = torch.arange(0, 1 << 12, dtype=torch.float32) * 2.0**-26  # between subnormal halves, which lie 2**-24 apart
    values = torch.cat([*(c.view(torch.float32) for c in close), smallest, -smallest])
    values = values[: len(values) // dim * dim]
    ids = np.arange(len(values) // dim)
    case = Case(values.reshape(-1, dim), ids, np.ones(len(ids), np.int32), None, pooling)
    found, wanted = case.ours(case.rows.numpy(), "fp32", output).flatten(), values.to(FLOATS[output])
    numbers = ~wanted.isnan()
    assert found[~numbers].isnan().all()
    assert torch.equal(found[numbers].view(torch.int16), wanted[numbers].view(torch.int16))


def store(rows: Tensor, row_format: str) -> tuple[NDArray[np.generic], Tensor]:
    """Rows as they are stored, and the float32 rows that they stand for."""
    if row_format in FLOATS:
        stored = rows.to(FLOATS[row_format])
        return (stored.view(torch.int16) if row_format == "bf16" else stored).numpy(), stored.float()
    kept = encode(rows, RowFormat(row_format))
    return kept.numpy(), decode(kept, RowFormat(row_format), rows.shape[1])


@needs_fbgemm
@settings(max_examples=120, deadline=None)
@given(case=cases(DIMS))
def test_int8_rows_pool_as_what_fbgemm_makes_of_them(case: Case) -> None:
    stored = torch.ops.fbgemm.FloatToFused8BitRowwiseQuantized(case.rows)
    table = torch.ops.fbgemm.Fused8BitRowwiseQuantizedToFloat(stored)
    torch.testing.assert_close(case.ours(stored.numpy(), "int8"), case.torch(table), rtol=1e-5, atol=1e-4)


@needs_fbgemm
@settings(max_examples=120, deadline=None)
@given(case=cases(DIMS.map(lambda dim: dim + -dim % 4)))
def test_int4_rows_pool_as_what_fbgemm_makes_of_them(case: Case) -> None:
    stored = torch.ops.fbgemm.FloatToFusedNBitRowwiseQuantizedSBHalf(case.rows, 4)
    table = torch.ops.fbgemm.FusedNBitRowwiseQuantizedSBHalfToFloat(stored, 4)
    torch.testing.assert_close(case.ours(stored.numpy(), "int4"), case.torch(table), rtol=1e-5, atol=1e-4)


def fbgemm_table(codes: Tensor, scale_bias: Tensor, kind: SparseType, dim: int, pooling: PoolingMode) -> Any:
    """FBGEMM's table-batched operator over one quantised table; it keeps scale and bias as fp16."""
    operator = IntNBitTableBatchedEmbeddingBagsCodegen(
        [("table", codes.shape[0], dim, kind, EmbeddingLocation.HOST)],
        device="cpu",
        output_dtype=SparseType.FP32,
        pooling_mode=pooling,
    )
    operator.initialize_weights()
    [(weights, tails)] = operator.split_embedding_weights()
    weights.copy_(codes)
    tails.copy_(scale_bias.half().view(torch.uint8))
    return operator


@needs_fbgemm
@settings(max_examples=80, deadline=None)
@given(case=cases(st.sampled_from([4, 32, 64, 100, 128])), bits=st.sampled_from([8, 4]))
def test_quantised_tables_answer_as_fbgemms_table_batched_operator(case: Case, bits: int) -> None:
    if case.pooling not in ("sum", "mean") or not len(case.lengths):
        return
    case.padding = None  # FBGEMM has none
    dim, kind = case.rows.shape[1], SparseType.INT8 if bits == 8 else SparseType.INT4
    if bits == 8:
        fused = torch.ops.fbgemm.FloatToFused8BitRowwiseQuantized(case.rows)
        codes, scale_bias = fused[:, :dim], fused[:, dim:].contiguous().view(torch.float32).half()
        stored = torch.cat((codes, scale_bias.float().view(torch.uint8)), dim=1)
    else:
        stored = torch.ops.fbgemm.FloatToFusedNBitRowwiseQuantizedSBHalf(case.rows, 4)
        codes, scale_bias = stored[:, :-4], stored[:, -4:].contiguous().view(torch.float16)
    mode = PoolingMode.SUM if case.pooling == "sum" else PoolingMode.MEAN
    weights = None if case.weights is None else torch.from_numpy(case.weights)
    operator = fbgemm_table(codes, scale_bias, kind, dim, mode)
    wanted = operator(torch.from_numpy(case.values).int(), case.offsets.int(), weights)
    found = case.ours(stored.numpy(), f"int{bits}")
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)
