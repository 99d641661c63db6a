"""Tables of existing checkpoints, read a stretch of rows at a time: HugeCTR HPS directories and torch state dicts.

- HPS (https://github.com/NVIDIA-Merlin/HugeCTR, "sparse model files"): a directory per table with `key` (int64) and `emb_vector`
  (float32, one row per key, in the order of the keys). Ids are row numbers here, so the keys must be 0 to n-1, in any order.
- TorchRec: `….embedding_bags.TABLE.weight` and `….embeddings.TABLE.weight` of a file that `torch.save` wrote.
- FBGEMM: `weights_host` (or `_dev`, `_uvm`) of a `SplitTableBatchedEmbeddingBagsCodegen`, all tables in one flat tensor.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sidepool.wire.errors import CutError, ShardCorrupt
from sidepool.wire.plan import MAX_DIM

KEY_FILE, ROWS_FILE = "key", "emb_vector"
# Keys that are looked at in one go: 8 MB, so that checking them needs little beside their inverse.
CHUNK_KEYS = 1 << 20
_TORCHREC = re.compile(r"(?:^|\.)(?:embedding_bags|embeddings)\.(.+)\.weight$")
_FBGEMM_OFFSETS = "weights_offsets"
_FBGEMM_WEIGHTS = ("weights_host", "weights_dev", "weights_uvm")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class SourceTable:
    """A table of a checkpoint; `read(begin, end)` gives rows `[end - begin, dim]` as float32."""

    name: str
    rows: int
    dim: int
    read: Callable[[int, int], NDArray[np.float32]]


def open_checkpoint(path: Path) -> list[SourceTable]:
    """The tables of an HPS directory, of a directory of such directories, or of a torch file.

    Raises `CutError` where there is nothing that can be taken, and `ShardCorrupt`, naming file and tensor, where
    something is truncated or inconsistent.
    """
    if path.is_dir():
        directories = [path] if _is_hps(path) else sorted(d for d in path.iterdir() if _is_hps(d))
        if not directories:
            raise CutError(f"{path}: no directory with the files {KEY_FILE!r} and {ROWS_FILE!r}; allowed: HPS directories")
        return [_open_hps(d) for d in directories]
    return _open_torch(path)


def _is_hps(directory: Path) -> bool:
    return (directory / KEY_FILE).is_file() or (directory / ROWS_FILE).is_file()


def _open_hps(directory: Path) -> SourceTable:
    keys = _map(directory / KEY_FILE, KEY_FILE, "<i8")
    values = _map(directory / ROWS_FILE, ROWS_FILE, "<f4")
    rows = len(keys)
    if len(values) % rows or not rows <= len(values) <= rows * MAX_DIM:
        _refuse(
            directory / ROWS_FILE,
            ROWS_FILE,
            f"found {values.nbytes} bytes; allowed: rows of 1 to {MAX_DIM} float32 for {rows} keys (truncated?)",
        )
    matrix = values.reshape(rows, -1)
    places = _places(directory / KEY_FILE, keys)

    def read(begin: int, end: int) -> NDArray[np.float32]:
        return matrix[begin:end] if places is None else matrix[places[begin:end]]

    return SourceTable(directory.name, rows, matrix.shape[1], read)


def _map(path: Path, tensor: str, dtype: str) -> NDArray[Any]:
    try:
        size = path.stat().st_size
        if size == 0 or size % np.dtype(dtype).itemsize:
            _refuse(path, tensor, f"found {size} bytes; allowed: a multiple of {np.dtype(dtype).itemsize}, not 0 (truncated?)")
        return np.memmap(path, dtype, mode="r")
    except OSError as e:
        raise ShardCorrupt(f"{path}: tensor {tensor!r}: cannot be read: {e}") from e


def _places(path: Path, keys: NDArray[np.int64]) -> NDArray[np.int64] | None:
    """Where in the file each row lies; None where the rows lie in order. Takes 8 bytes per row."""
    places = np.full(len(keys), -1, np.int64)
    in_order = True
    for begin in range(0, len(keys), CHUNK_KEYS):
        chunk = np.asarray(keys[begin : begin + CHUNK_KEYS])
        positions = np.arange(begin, begin + len(chunk))
        odd = np.flatnonzero((chunk < 0) | (chunk >= len(keys)))
        if len(odd):
            raise CutError(
                f"{path}: key {int(chunk[odd[0]])} at position {begin + int(odd[0])}; allowed: 0 to {len(keys) - 1}, each "
                "once: ids are row numbers here\nremedy: number the keys densely, in the model's inputs too"
            )
        in_order = in_order and bool((chunk == positions).all())
        places[chunk] = positions
    missing = np.flatnonzero(places < 0)
    if len(missing):
        raise CutError(f"{path}: key {int(missing[0])} is missing, another appears twice; allowed: 0 to {len(keys) - 1}, each once")
    return None if in_order else places


def _open_torch(path: Path) -> list[SourceTable]:
    state = _load(path)
    found = dict(_torchrec_tables(path, state))
    for key in state:
        if key.endswith(_FBGEMM_OFFSETS):
            found.update(_fbgemm_tables(path, state, key.removesuffix(_FBGEMM_OFFSETS)))
    if not found:
        raise CutError(
            f"{path}: none of its {len(state)} entries is a table; allowed: TorchRec's embedding_bags.TABLE.weight and "
            "embeddings.TABLE.weight, FBGEMM's weights_host with weights_offsets"
        )
    return [SourceTable(name, rows.shape[0], rows.shape[1], _reader(rows)) for name, rows in found.items()]


def _load(path: Path) -> Mapping[str, Any]:
    try:
        # Mapped, not read: a checkpoint may be larger than memory. `weights_only`: a checkpoint must not run code.
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


def _torchrec_tables(path: Path, state: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    seen: dict[str, str] = {}
    for key, value in state.items():
        match = _TORCHREC.search(key)
        if match is None:
            continue
        name = match[1]
        if name in seen:
            raise CutError(f"{path}: table {name!r} appears as {seen[name]!r} and as {key!r}; allowed: once")
        seen[name] = key
        if not isinstance(value, Tensor) or value.ndim != 2 or value.dtype not in _DTYPES or 0 in value.shape:
            found = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            _refuse(path, key, f"found {found}; allowed: [rows, dim] of float32, float16 or bfloat16")
        yield name, value


def _fbgemm_tables(path: Path, state: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Tensor]]:
    """One table per distinct offset; its name is the state dict's prefix and the position of its first feature."""
    entries = {}
    for key in (_FBGEMM_OFFSETS, "rows_per_table", "D_offsets"):
        value = state.get(prefix + key)
        if not isinstance(value, Tensor) or value.ndim != 1:
            _refuse(path, prefix + key, "missing or not one-dimensional; allowed: as FBGEMM writes it")
        entries[key] = value.tolist()
    filled = [key for key in _FBGEMM_WEIGHTS if isinstance(w := state.get(prefix + key), Tensor) and w.numel()]
    if len(filled) != 1:
        raise CutError(f"{path}: {prefix}: found the weights {filled}; allowed: all tables in one of {list(_FBGEMM_WEIGHTS)}")
    flat, columns = state[prefix + filled[0]], entries["D_offsets"]
    if flat.ndim != 1 or flat.dtype not in _DTYPES or len(columns) != len(entries["rows_per_table"]) + 1:
        _refuse(path, prefix + filled[0], f"found {flat.dtype} {list(flat.shape)}; allowed: flat float32, float16 or bfloat16")
    seen = set()
    for i, (begin, rows) in enumerate(zip(entries[_FBGEMM_OFFSETS], entries["rows_per_table"], strict=True)):
        dim = columns[i + 1] - columns[i]
        if begin in seen:
            continue
        seen.add(begin)
        if begin < 0 or rows < 1 or dim < 1 or begin + rows * dim > len(flat):
            _refuse(path, prefix + filled[0], f"table {i}: [{rows}, {dim}] at {begin} of {len(flat)} values (truncated?)")
        yield f"{prefix}table_{i}", flat[begin : begin + rows * dim].view(rows, dim)


def _reader(rows: Tensor) -> Callable[[int, int], NDArray[np.float32]]:
    def read(begin: int, end: int) -> NDArray[np.float32]:
        chunk: NDArray[np.float32] = rows[begin:end].detach().float().contiguous().numpy()
        return chunk

    return read


def _refuse(path: Path, tensor: str, what: str) -> NoReturn:
    raise ShardCorrupt(f"{path}: tensor {tensor!r}: {what}")
