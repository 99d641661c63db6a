"""Quantised tables of torch checkpoints, laid out as our int8 and int4 rows; no value is quantised again.

- TorchRec: `TABLE.weight` with `TABLE.weight_qscale` and `TABLE.weight_qbias` (fp16), codes alone.
- FBGEMM's IntNBitTableBatchedEmbeddingBagsCodegen: `embedding_specs` and `split_embedding_weights`; scale and bias (fp16) in
  front of the codes or split off, rows padded to an alignment. Its state dict has no weights: EXPORT says how to save them.
- torch.ao: `PREFIX._packed_params._packed_weight`, quint8 or quint4x2 with a scale and a zero point per row.
- Packed rows of `embedding_bag_byte_prepack` and `embedding_bag_4bit_prepack`: codes, then scale and bias. Ours as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from sidepool.partition.source_table import SourceTable, refuse_tensor
from sidepool.wire.errors import CutError
from sidepool.wire.plan import MAX_DIM, RowFormat

SPECS, WEIGHTS = "embedding_specs", "split_embedding_weights"
EXPORT = (
    "specs = [(name, rows, dim, kind.value) for name, rows, dim, kind, _ in module.embedding_specs]; "
    f'torch.save({{"{SPECS}": specs, "{WEIGHTS}": module.split_embedding_weights()}}, FILE)'
)
PACKED_WEIGHT = "._packed_params._packed_weight"
_TAILS = {RowFormat.INT8: torch.float32, RowFormat.INT4: torch.float16}
_FLOATS = {"fp32": torch.float32, "fp16": torch.float16}
_HALVES_BYTES = 4  # FBGEMM's scale and bias


class Nibbles(torch.Tensor):
    """Stands for TorchRec's `UInt4Tensor` while a checkpoint is read: `elem` is uint8 `[rows, dim / 2]`. Does nothing itself."""

    elem: Tensor

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:  # type: ignore[override]
        raise TypeError(f"{func}: not for a table that is only read")


SAFE_GLOBALS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [(Nibbles, "torchrec.tensor_types.UInt4Tensor")]


def fused(codes: Tensor, scale: Tensor, bias: Tensor, row_format: RowFormat) -> Tensor:
    """Our rows of `codes` (uint8 `[n, code bytes]`) and the `scale` and `bias` of each row."""
    tail = torch.stack((scale.flatten(), bias.flatten()), dim=1).to(_TAILS[row_format])
    return torch.cat((codes, tail.view(torch.uint8)), dim=1)


def split_table(path: Path, name: str, key: str, state: Mapping[str, Any]) -> SourceTable:
    """TorchRec's table of codes at `key`, its scales and biases beside it."""
    weight, row_format, dim = state[key], RowFormat.INT8, int(state[key].shape[1])
    if isinstance(weight, Nibbles):
        weight, row_format = weight.elem, RowFormat.INT4
    tails = []
    for part in (f"{key}_qscale", f"{key}_qbias"):
        tail = state.get(part)
        if not isinstance(tail, Tensor) or tail.numel() != len(weight) or not tail.is_floating_point():
            refuse_tensor(
                path,
                part,
                f"missing or not a number per row of {key}; allowed: as quant_prep_enable_quant_state_dict_split_scale_bias "
                "makes TorchRec write it\nremedy: call it before quantising; or, if rows end in scale and bias, give --packed-rows",
            )
        tails.append(tail)

    def read(begin: int, end: int) -> Tensor:
        return fused(weight[begin:end], tails[0][begin:end], tails[1][begin:end], row_format)

    return SourceTable(name, len(weight), dim, read, row_format)


def packed_params_table(path: Path, key: str, weight: Any) -> SourceTable:
    """The table of a torch.ao quantised `Embedding` or `EmbeddingBag`, with the scale and bias that torch itself computes with."""
    formats = {torch.quint8: RowFormat.INT8, torch.quint4x2: RowFormat.INT4}
    row_format = formats.get(weight.dtype) if isinstance(weight, Tensor) and weight.ndim == 2 else None
    odd = row_format is RowFormat.INT4 and weight.shape[1] % 2  # a byte would hold codes of two rows
    if not isinstance(weight, Tensor) or row_format is None or odd:
        found = f"{weight.dtype} {list(weight.shape)}" if isinstance(weight, Tensor) else type(weight).__name__
        refuse_tensor(path, key, f"found {found}; allowed: [rows, dim] of quint8, or of quint4x2 with an even dim")
    rows, dim = map(int, weight.shape)
    code_bytes = dim if row_format is RowFormat.INT8 else dim // 2
    # The codes themselves, where they lie: int_repr() would copy the table.
    codes = torch.empty(0, dtype=torch.uint8).set_(weight.untyped_storage(), 0, (rows, code_bytes), (code_bytes, 1))
    scale = weight.q_per_channel_scales().float()
    bias = -(weight.q_per_channel_zero_points().float() * scale)
    kind = row_format

    def read(begin: int, end: int) -> Tensor:
        return fused(codes[begin:end], scale[begin:end], bias[begin:end], kind)

    return SourceTable(key.removesuffix(PACKED_WEIGHT), rows, dim, read, row_format)


def packed_rows_table(path: Path, name: str, rows: Tensor, row_format: RowFormat) -> SourceTable:
    """A uint8 matrix whose rows are codes, then scale and bias: fp32 for int8, fp16 for int4, whose dim is even."""
    dim = rows.shape[1] - 8 if row_format is RowFormat.INT8 else 2 * (rows.shape[1] - 4)
    if dim < 1 or not len(rows):
        refuse_tensor(path, name, f"found {list(rows.shape)}; allowed: rows of at least a code, then scale and bias")
    return SourceTable(name, len(rows), dim, lambda begin, end: rows[begin:end], row_format)


def fbgemm_tables(path: Path, state: Mapping[str, Any]) -> Iterator[SourceTable]:
    """The tables that EXPORT has saved, or the same with `split_scale_shifts=False`."""
    specs, weights = state[SPECS], state.get(WEIGHTS)
    if not isinstance(weights, list) or len(weights) != len(specs):
        refuse_tensor(path, WEIGHTS, f"missing, or not a list of {len(specs)} tables; allowed: what this saves: {EXPORT}")
    for (name, rows, dim, kind), (content, tail) in zip(specs, weights, strict=True):
        if kind not in ("fp32", "fp16", "int8", "int4"):
            raise CutError(
                f"{path}: table {name!r}: found rows of {kind}; allowed: fp32, fp16, int8, int4\nremedy: quantise to one of these"
            )
        quantised = kind in ("int8", "int4")
        row_format = RowFormat(kind) if quantised else RowFormat.FP32
        value_bytes = RowFormat(kind).row_bytes(dim) - {"int8": 8, "int4": 4}.get(kind, 0)
        if quantised and tail is None:  # in front of the codes
            content, tail = content[:, _HALVES_BYTES:], content[:, :_HALVES_BYTES]
        if not 1 <= dim <= MAX_DIM or len(content) != rows or content.shape[1] < value_bytes or content.dtype is not torch.uint8:
            refuse_tensor(
                path, f"{WEIGHTS}: {name}", f"found {content.dtype} {list(content.shape)}; allowed: uint8 [{rows}, {value_bytes}]"
            )
        # Behind the values there may be padding.
        yield SourceTable(name, rows, dim, _fbgemm_reader(content[:, :value_bytes], tail, kind), row_format)


def _fbgemm_reader(content: Tensor, tail: Tensor | None, kind: str) -> Callable[[int, int], Tensor]:
    def read(begin: int, end: int) -> Tensor:
        values = content[begin:end].contiguous()
        if tail is None:
            return values.view(_FLOATS[kind]).float()
        halves = tail[begin:end].contiguous().view(torch.float16)
        return fused(values, halves[:, 0], halves[:, 1], RowFormat(kind))

    return read
