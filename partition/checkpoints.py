"""Tables of existing checkpoints, read a stretch of rows at a time: HugeCTR HPS directories and torch state dicts.

- HPS: partition/hps.py.
- TorchRec: `….embedding_bags.TABLE.weight` and `….embeddings.TABLE.weight` of a file that `torch.save` wrote.
- FBGEMM: `weights_host` (or `_dev`, `_uvm`) of a `SplitTableBatchedEmbeddingBagsCodegen`, all tables in one flat tensor.
- Quantised tables of these and of torch.ao: partition/quantised.py.
"""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sidepool.partition import quantised
from sidepool.partition.hps import KEY_FILE, ROWS_FILE, is_hps, open_hps
from sidepool.partition.source_table import SourceTable, refuse_tensor
from sidepool.wire.errors import CutError, ShardCorrupt
from sidepool.wire.plan import RowFormat

_TORCHREC = re.compile(r"(?:^|\.)(?:embedding_bags|embeddings)\.(.+)\.weight$")
_FBGEMM_OFFSETS = "weights_offsets"
_FBGEMM_WEIGHTS = ("weights_host", "weights_dev", "weights_uvm")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def open_checkpoint(path: Path, packed_rows: RowFormat | None = None) -> list[SourceTable]:
    """The tables of an HPS directory, of a directory of such directories, or of a torch file.

    packed_rows: take every uint8 matrix of a torch file as rows of this format, int8 or int4.
    Raises `CutError` where there is nothing that can be taken, and `ShardCorrupt`, naming file and tensor, where
    something is truncated or inconsistent.
    """
    if path.is_dir():
        directories = [path] if is_hps(path) else sorted(d for d in path.iterdir() if is_hps(d))
        if not directories:
            raise CutError(f"{path}: no directory with the files {KEY_FILE!r} and {ROWS_FILE!r}; allowed: HPS directories")
        return [open_hps(d) for d in directories]
    state = _load(path)
    found = list(_tables(path, state, packed_rows))
    if not found:
        raise CutError(_nothing(path, state))
    return found


def _tables(path: Path, state: Mapping[str, Any], packed_rows: RowFormat | None) -> Iterator[SourceTable]:
    if packed_rows is not None:
        for key, value in state.items():
            if type(value) is Tensor and value.dtype is torch.uint8 and value.ndim == 2 and value.numel():
                match = _TORCHREC.search(key)
                name = match[1] if match else key.removesuffix(".weight")
                yield quantised.packed_rows_table(path, name, value, packed_rows)
    yield from _torchrec_tables(path, state, packed_rows)
    if quantised.SPECS in state:
        yield from quantised.fbgemm_tables(path, state)
    for key, value in state.items():
        if key.endswith(_FBGEMM_OFFSETS):
            yield from _fbgemm_tables(path, state, key.removesuffix(_FBGEMM_OFFSETS))
        elif key.endswith(quantised.PACKED_WEIGHT):
            yield quantised.packed_params_table(path, key, value)


def _nothing(path: Path, state: Mapping[str, Any]) -> str:
    if any(key.endswith("weights_tys") for key in state):
        return f"{path}: the state dict of an FBGEMM inference module, which has no weights\nremedy: save them: {quantised.EXPORT}"
    return (
        f"{path}: none of its {len(state)} entries is a table; allowed: TorchRec's embedding_bags.TABLE.weight and "
        "embeddings.TABLE.weight, FBGEMM's weights_host with weights_offsets, torch.ao's _packed_params (docs/convert.md)"
    )


def _load(path: Path) -> Mapping[str, Any]:
    try:
        # Mapped, not read: a checkpoint may be larger than memory. `weights_only`: a checkpoint must not run code.
        with warnings.catch_warnings(), torch.serialization.safe_globals(quantised.SAFE_GLOBALS):
            warnings.simplefilter("ignore")  # torch warns of the quantised tensors and storages that it makes itself
            state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as e:
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise ShardCorrupt(f"{path}: tensor (none could be read): not a whole file of torch.save: {reason}") from e
    for wrapper in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping):
        raise CutError(f"{path}: found a {type(state).__name__}; allowed: a state dict")
    return {str(key): value for key, value in state.items()}


def _torchrec_tables(path: Path, state: Mapping[str, Any], packed_rows: RowFormat | None) -> Iterator[SourceTable]:
    seen: dict[str, str] = {}
    for key, value in state.items():
        match = _TORCHREC.search(key)
        if match is None:
            continue
        name = match[1]
        if name in seen:
            raise CutError(f"{path}: table {name!r} appears as {seen[name]!r} and as {key!r}; allowed: once")
        seen[name] = key
        if isinstance(value, Tensor) and value.dtype is torch.uint8 and value.ndim == 2 and 0 not in value.shape:
            if packed_rows is None or isinstance(value, quantised.Nibbles):
                yield quantised.split_table(path, name, key, state)
            continue
        if not isinstance(value, Tensor) or value.ndim != 2 or value.dtype not in _DTYPES or 0 in value.shape:
            found = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            refuse_tensor(path, key, f"found {found}; allowed: [rows, dim] of float32, float16 or bfloat16")
        yield SourceTable(name, int(value.shape[0]), int(value.shape[1]), _reader(value))


def _fbgemm_tables(path: Path, state: Mapping[str, Any], prefix: str) -> Iterator[SourceTable]:
    """One table per distinct offset; its name is the state dict's prefix and the position of its first feature."""
    entries = {}
    for key in (_FBGEMM_OFFSETS, "rows_per_table", "D_offsets"):
        value = state.get(prefix + key)
        if not isinstance(value, Tensor) or value.ndim != 1:
            refuse_tensor(path, prefix + key, "missing or not one-dimensional; allowed: as FBGEMM writes it")
        entries[key] = value.tolist()
    filled = [key for key in _FBGEMM_WEIGHTS if isinstance(w := state.get(prefix + key), Tensor) and w.numel()]
    if len(filled) != 1:
        raise CutError(f"{path}: {prefix}: found the weights {filled}; allowed: all tables in one of {list(_FBGEMM_WEIGHTS)}")
    flat, columns = state[prefix + filled[0]], entries["D_offsets"]
    # Rows of uint8 are codes, then scale and bias as fp32.
    row_format = RowFormat.INT8 if flat.dtype is torch.uint8 else RowFormat.FP32
    if flat.ndim != 1 or flat.dtype not in (*_DTYPES, torch.uint8) or len(columns) != len(entries["rows_per_table"]) + 1:
        refuse_tensor(
            path, prefix + filled[0], f"found {flat.dtype} {list(flat.shape)}; allowed: flat float32, float16, bfloat16 or uint8"
        )
    seen = set()
    for i, (begin, rows) in enumerate(zip(entries[_FBGEMM_OFFSETS], entries["rows_per_table"], strict=True)):
        dim = columns[i + 1] - columns[i]
        if begin in seen:
            continue
        seen.add(begin)
        width = row_format.row_bytes(dim) if row_format.quantised else dim
        if begin < 0 or rows < 1 or dim < 1 or begin + rows * width > len(flat):
            refuse_tensor(path, prefix + filled[0], f"table {i}: [{rows}, {dim}] at {begin} of {len(flat)} values (truncated?)")
        held = flat[begin : begin + rows * width].view(rows, width)
        yield SourceTable(f"{prefix}table_{i}", rows, dim, _reader(held), row_format)


def _reader(rows: Tensor) -> Callable[[int, int], Tensor]:
    """Rows as float32; uint8 as it is."""
    kept = torch.uint8 if rows.dtype is torch.uint8 else torch.float32
    return lambda begin, end: rows[begin:end].detach().to(kept).contiguous()
