"""Stored rows: FBGEMM's bytes, errors within half a step, and a report that says so."""

from __future__ import annotations

import pytest
import torch
from fbgemm import needs_fbgemm
from torch import Tensor

from sidepool.partition.rows import RowError, decode, encode
from sidepool.wire.plan import RowFormat


def rows_of_every_kind(dim: int) -> Tensor:
    random = torch.Generator().manual_seed(dim)
    return torch.cat(
        (
            torch.randn(200, dim, generator=random),
            torch.randn(20, dim, generator=random) * 1e-4,
            torch.rand(20, dim, generator=random) * 1000 - 300,
            torch.zeros(1, dim),
            torch.full((1, dim), -7.25),
            torch.full((1, dim), 3e-9),
        )
    )


@pytest.mark.parametrize("row_format", [RowFormat.INT8, RowFormat.INT4])
@pytest.mark.parametrize("dim", [1, 2, 3, 5, 64])
def test_a_single_row_is_decoded_wherever_its_scale_lies(row_format: RowFormat, dim: int) -> None:
    rows = rows_of_every_kind(dim)[:2]
    both, one = (decode(encode(r, row_format), row_format, dim) for r in (rows, rows[:1]))
    assert torch.equal(both[:1], one)


@needs_fbgemm
@pytest.mark.parametrize("dim", [1, 2, 7, 64, 129])
def test_int8_rows_are_fbgemms_byte_for_byte(dim: int) -> None:
    rows = rows_of_every_kind(dim)
    stored = encode(rows, RowFormat.INT8)
    assert stored.shape[1] == RowFormat.INT8.row_bytes(dim)
    assert torch.equal(stored, torch.ops.fbgemm.FloatToFused8BitRowwiseQuantized(rows))
    torch.testing.assert_close(
        decode(stored, RowFormat.INT8, dim), torch.ops.fbgemm.Fused8BitRowwiseQuantizedToFloat(stored), rtol=1e-6, atol=1e-4
    )


@needs_fbgemm
@pytest.mark.parametrize("dim", [4, 8, 64, 132])
def test_int4_rows_are_fbgemms_byte_for_byte(dim: int) -> None:
    rows = rows_of_every_kind(dim)
    stored = encode(rows, RowFormat.INT4)
    assert stored.shape[1] == RowFormat.INT4.row_bytes(dim)
    assert torch.equal(stored, torch.ops.fbgemm.FloatToFusedNBitRowwiseQuantizedSBHalf(rows, 4))
    torch.testing.assert_close(
        decode(stored, RowFormat.INT4, dim),
        torch.ops.fbgemm.FusedNBitRowwiseQuantizedSBHalfToFloat(stored, 4),
        rtol=1e-6,
        atol=1e-4,
    )


def test_an_odd_dim_leaves_half_a_byte_of_an_int4_row_empty() -> None:
    rows = rows_of_every_kind(5)
    stored = encode(rows, RowFormat.INT4)
    assert stored.shape[1] == RowFormat.INT4.row_bytes(5) == 7
    assert not (stored[:, 2] >> 4).any()
    even = decode(encode(torch.cat((rows, rows[:, :1]), dim=1), RowFormat.INT4), RowFormat.INT4, 6)
    assert torch.equal(decode(stored, RowFormat.INT4, 5), even[:, :5])


@pytest.mark.parametrize(("row_format", "steps"), [(RowFormat.INT8, 255), (RowFormat.INT4, 15)])
def test_errors_are_about_half_a_step_at_most(row_format: RowFormat, steps: int) -> None:
    rows = torch.rand(500, 32) - 0.5
    error = RowError().plus(rows[:200], encode(rows[:200], row_format), row_format)
    error = error.plus(rows[200:], encode(rows[200:], row_format), row_format)
    assert error.values == rows.numel()
    assert 0.4 / steps < error.max_abs < 0.6 / steps
    assert 0.2 / steps < error.rms < 0.35 / steps  # evenly spread over a step: 1/√12 of it, of a span just below 1


@pytest.mark.parametrize("row_format", list(RowFormat))
def test_values_that_a_format_can_hold_have_no_error(row_format: RowFormat) -> None:
    rows = torch.arange(16).repeat(3, 1).float()
    stored = encode(rows, row_format)
    if row_format is RowFormat.INT8:  # 15/255 is no fp32 number
        torch.testing.assert_close(decode(stored, row_format, 16), rows, rtol=0, atol=1e-6)
    else:
        assert RowError().plus(rows, stored, row_format).max_abs == 0
