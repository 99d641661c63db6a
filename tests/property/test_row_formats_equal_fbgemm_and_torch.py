"""Whatever the shape, the row format and the SIMD level: pooling gives what torch and FBGEMM give."""

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

    def ours(self, stored: NDArray[np.generic], row_format: str) -> Tensor:
        tables = _native.TableSet(1, 1, 1)
        tables.add_table_array(0, stored, "error", 0, row_format, self.rows.shape[1])
        tables.add_feature(0, 0, self.pooling, self.weights is not None, self.padding)
        tables.seal()
        count = len(self.values) if self.pooling == "none" else len(self.lengths)
        out = np.full((count, self.rows.shape[1]), np.nan, np.float32)
        assert _native.pool(tables, 0, self.values, self.lengths, self.weights, out) == (0, 0, -1, 0)
        return torch.from_numpy(out)

    def check(self, found: Tensor, wanted: Tensor, table: Tensor) -> None:
        """Bags of one unweighted id: every bit. Others: 2 ulp · √n of what was added up."""
        if self.pooling in ("none", "max"):
            assert torch.equal(found, wanted)
            return
        for bag, length in enumerate(self.lengths):
            at = int(self.lengths[:bag].sum())
            ids = torch.from_numpy(self.values[at : at + length])
            if self.counts[bag] <= 1 and self.weights is None:
                assert torch.equal(found[bag], wanted[bag])
                continue
            scale = 1.0 if self.weights is None else torch.from_numpy(self.weights[at : at + length]).abs()[:, None]
            magnitude = (table[ids].abs() * scale).sum(0) / (max(1, self.counts[bag]) if self.pooling == "mean" else 1)
            assert ((found[bag] - wanted[bag]).abs() <= 2 * EPSILON * max(1, length) ** 0.5 * magnitude).all()


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
    stored = case.rows.to(FLOATS[row_format])
    found = case.ours(stored.view(torch.int16).numpy() if row_format == "bf16" else stored.numpy(), row_format)
    case.check(found, case.torch(stored.float()), stored.float())


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
