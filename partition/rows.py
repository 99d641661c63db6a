"""Rows as they are stored: encode float32 rows in a row format, decode them again, measure what got lost.

The quantised layouts and their rounding are FBGEMM's (`FloatToFused8BitRowwiseQuantized`,
`FloatToFusedNBitRowwiseQuantizedSBHalf`): docs/row-formats.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sidepool.wire.plan import RowFormat

_FLOATS = {RowFormat.FP32: torch.float32, RowFormat.FP16: torch.float16, RowFormat.BF16: torch.bfloat16}
# FBGEMM's: keeps the reciprocal of the range of a constant row finite.
_INT8_EPSILON = 1e-8


def encode(rows: Tensor, row_format: RowFormat) -> Tensor:
    """Float rows `[n, dim]` as stored: floats `[n, dim]`, or uint8 `[n, row bytes]`. What a format cannot hold overflows."""
    if row_format is RowFormat.INT8:
        return _encode_int8(rows.float())
    if row_format is RowFormat.INT4:
        return _encode_int4(rows.float())
    return rows.to(_FLOATS[row_format]).contiguous()


def decode(stored: Tensor, row_format: RowFormat, dim: int) -> Tensor:
    """Stored rows as float32 `[n, dim]`."""
    if row_format is RowFormat.INT8:
        codes, tail = stored[:, :dim], _aligned(stored[:, dim:]).view(torch.float32)
    elif row_format is RowFormat.INT4:
        pairs, tail = stored[:, :-4], _aligned(stored[:, -4:]).view(torch.float16).float()
        codes = torch.stack((pairs & 15, pairs >> 4), dim=2).flatten(1)[:, :dim]
    else:
        return stored.float()
    return codes.float() * tail[:, :1] + tail[:, 1:]


def _aligned(columns: Tensor) -> Tensor:
    """A copy at the start of memory of its own: a single row counts as contiguous wherever it lies."""
    return columns.clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class RowError:
    """How far stored rows are from the float32 ones."""

    max_abs: float = 0.0
    square_sum: float = 0.0
    values: int = 0

    @property
    def rms(self) -> float:
        """Root of the mean square over all values."""
        return math.sqrt(self.square_sum / self.values) if self.values else 0.0

    def plus(self, rows: Tensor, stored: Tensor, row_format: RowFormat) -> RowError:
        """This, and the error of one more block of rows."""
        error = decode(stored, row_format, rows.shape[1]).double() - rows.double()
        return RowError(
            max(self.max_abs, float(error.abs().max())), self.square_sum + float(error.square().sum()), self.values + error.numel()
        )


def _encode_int8(rows: Tensor) -> Tensor:
    low, high = rows.aminmax(dim=1, keepdim=True)
    span = high - low
    codes = torch.round((rows - low) * (255.0 / (span + _INT8_EPSILON))).to(torch.uint8)
    return torch.cat((codes, torch.cat((span / 255.0, low), dim=1).view(torch.uint8)), dim=1)


def _encode_int4(rows: Tensor) -> Tensor:
    low, high = rows.aminmax(dim=1, keepdim=True)
    low = low.half().float()
    scale = ((high - low) / 15.0).half().float()
    # A row whose span half precision cannot tell from nothing: every value is the bias.
    scale = torch.where((scale == 0) | torch.isinf(1.0 / scale), torch.ones_like(scale), scale)
    codes = torch.round((rows - low) * (1.0 / scale)).clamp_(0, 15).to(torch.uint8)
    if codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    pairs = codes[:, 0::2] | (codes[:, 1::2] << 4)
    return torch.cat((pairs, torch.cat((scale, low), dim=1).half().view(torch.uint8)), dim=1)
