"""Who is measured by `sidepool bench pool`: everyone looks the same batches up in tables of the same content.

No Python runs between two lookups: ours loops in the core, the peers in TorchScript, all without the GIL.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen
from numpy.typing import NDArray

from sidepool import _native
from sidepool.bench.pool_cases import Batch, Shape, encode
from sidepool.bench.pool_loops import EmbeddingBagLoop, FbgemmLoop, Inputs, NullLoop
from sidepool.wire.plan import RowFormat

# The ceiling is the best of these distances between fetching a row and reading it, tried anew for every case.
CEILING = "ceiling_"
CEILING_BYTES_AHEAD = (2 << 10, 4 << 10, 8 << 10, 16 << 10)
# A quarter of a level-2 cache of 1 MiB: ids and pooled vectors pass through it as well.
CACHED_BYTES = 256 << 10
NULL_BATCHES = 1000
# `(first, count)`: looks `count` successive batches up.
Run = Callable[[int, int], object]

SPARSE_TYPES = {RowFormat.FP32: SparseType.FP32, RowFormat.FP16: SparseType.FP16, RowFormat.INT8: SparseType.INT8}
TORCH_TYPES = {RowFormat.FP32: torch.float32, RowFormat.FP16: torch.float16}


@dataclass(frozen=True)
class Contender:
    """`whole` looks up all tables of a batch, `halves` half of them each: by ids per bag, so that both have as much to do."""

    name: str
    whole: Run
    halves: tuple[Run, Run] | None = None


@dataclass(frozen=True)
class Tables:
    """The same rows twice, as long as both engines own their memory: ours in huge pages, FBGEMM's as its module allocates it."""

    shape: Shape
    row_format: RowFormat
    ours: _native.TableSet
    fbgemm: IntNBitTableBatchedEmbeddingBagsCodegen


def make_tables(shape: Shape, row_format: RowFormat, seed: int) -> Tables:
    """Tables of `shape`, all with the same random rows in [-0.5, 0.5)."""
    our_rows, their_rows = _random_rows(shape, row_format, seed)
    ours = _native.TableSet(1, shape.tables, shape.tables)
    specs = [(f"t{t}", shape.rows, shape.dim, SPARSE_TYPES[row_format], EmbeddingLocation.HOST) for t in range(shape.tables)]
    fbgemm = IntNBitTableBatchedEmbeddingBagsCodegen(specs, device="cpu", output_dtype=SparseType.FP32)
    fbgemm.initialize_weights()
    flat = torch.from_numpy(their_rows.view(np.uint8).reshape(-1))
    for t, begin in enumerate(fbgemm.weights_offsets.tolist()):
        ours.add_table_array(t, our_rows, "error", 0, str(row_format), shape.dim)
        ours.add_feature(t, t, "sum", False)
        fbgemm.weights_host[begin : begin + len(flat)] = flat
    ours.seal()
    ours.choose_lookahead(0)  # measured, as a sidecar does when it starts
    return Tables(shape, row_format, ours, fbgemm)


def _random_rows(shape: Shape, row_format: RowFormat, seed: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """The same rows as we and as FBGEMM's module lay them out (docs/row-formats.md)."""
    random = np.random.default_rng(seed)
    if row_format is not RowFormat.INT8:
        rows = random.random((shape.rows, shape.dim), np.float32) - np.float32(0.5)
        rows = rows.astype(np.float16) if row_format is RowFormat.FP16 else rows
        return rows, rows
    codes = random.integers(0, 256, (shape.rows, shape.dim), np.uint8)
    # Scale and bias of each row: exact in both precisions, or the two would pool different rows.
    scale = (random.random((shape.rows, 1)) / 510 + 1 / 510).astype(np.float16)
    tail = np.concatenate([scale, (-127.5 * scale).astype(np.float16)], axis=1)
    ours = np.concatenate([codes, tail.astype(np.float32).view(np.uint8)], axis=1)
    return ours, np.concatenate([tail.view(np.uint8), codes], axis=1)


def make_contenders(tables: Tables, batches: Sequence[Batch]) -> list[Contender]:
    """Ours, the ceiling and the peers over `batches`; raises `RuntimeError` where ours and FBGEMM do not pool the same."""
    shape = tables.shape
    parts = _halve(shape)
    frames = [_native.PreparedFrames(tables.ours, encode(shape, batches, [0] * shape.tables)[0])]
    frames += [_native.PreparedFrames(tables.ours, f) for f in encode(shape, batches, parts)]
    inputs = [Inputs(shape, batches, [t for t in range(shape.tables) if part in (None, parts[t])]) for part in (None, 0, 1)]
    fbgemm = [_fbgemm(tables, i) for i in inputs]
    _compare(tables, frames[0], inputs[0])
    contenders = [
        _contender("ours", [_served(f) for f in frames]),
        *(_contender(f"{CEILING}{ahead}", [partial(_read, f, ahead) for f in frames]) for ahead in CEILING_BYTES_AHEAD),
        _contender("fbgemm", fbgemm),
        Contender(
            "ours_cached",
            _served(_native.PreparedFrames(tables.ours, encode(shape, _cached(shape, batches), [0] * shape.tables)[0])),
        ),
        Contender("fbgemm_module", _fbgemm_module(tables, inputs[0])),
    ]
    if tables.row_format in TORCH_TYPES:
        contenders.append(_contender("torch", [_embedding_bags(tables, i) for i in inputs]))
    return contenders


def null_contenders() -> list[Contender]:
    """Lookups of nothing, in the two loops that the contenders use."""
    shape = Shape("null", 1, 1, 1, (1,))
    batches = [Batch(np.zeros(1, np.int64), np.ones(1, np.int32))] * NULL_BATCHES
    tables = _native.TableSet(1, 1, 1)
    tables.add_table_array(0, np.zeros((1, 1), np.float32), "error", 0)
    tables.add_feature(0, 0, "sum", False)
    tables.seal()
    frames = _native.PreparedFrames(tables, encode(shape, batches, [0])[0])
    loop = NullLoop(Inputs(shape, batches, [0]))
    return [Contender("null_core", _served(frames)), Contender("null_torchscript", _scripted(loop))]


def _contender(name: str, runs: Sequence[Run]) -> Contender:
    return Contender(name, runs[0], (runs[1], runs[2]))


def _served(frames: _native.PreparedFrames) -> Run:
    def run(first: int, count: int) -> None:
        status = frames.serve(first, count)
        if status:
            raise RuntimeError(f"a lookup failed with status {status}")

    return run


def _cached(shape: Shape, batches: Sequence[Batch]) -> list[Batch]:
    """The same batches over so few rows that a core's own cache holds them: what remains is the price of the instructions."""
    rows = max(1, CACHED_BYTES // (shape.tables * shape.dim * 4))
    return [Batch(batch.values % rows, batch.lengths) for batch in batches]


def _read(frames: _native.PreparedFrames, bytes_ahead: int, first: int, count: int) -> None:
    frames.read_rows(first, count, bytes_ahead)


def _halve(shape: Shape) -> list[int]:
    """The worker (0 or 1) of every table: the largest first, each to the worker that has less."""
    load, worker = [0, 0], [0] * shape.tables
    for t in sorted(range(shape.tables), key=lambda t: -shape.ids[t]):
        worker[t] = int(load[1] < load[0])
        load[worker[t]] += shape.ids[t]
    return worker


def _fbgemm(tables: Tables, inputs: Inputs) -> Run:
    """FBGEMM's operator itself, without the Python of its module."""
    return _scripted(FbgemmLoop(tables.fbgemm, tables.shape.dim, inputs))


def _fbgemm_module(tables: Tables, inputs: Inputs) -> Run:
    """The module as its users call it."""

    def run(first: int, count: int) -> None:
        with torch.inference_mode():
            for i in range(first, first + count):
                tables.fbgemm(inputs.indices[i], inputs.offsets[i])

    return run


def _embedding_bags(tables: Tables, inputs: Inputs) -> Run:
    """One `embedding_bag` per table, over FBGEMM's copy of the rows."""
    shape = tables.shape
    host, dtype = tables.fbgemm.weights_host, TORCH_TYPES[tables.row_format]
    begins, table_bytes = tables.fbgemm.weights_offsets.tolist(), shape.rows * shape.dim * dtype.itemsize
    weights = [host[begins[t] : begins[t] + table_bytes].view(dtype).view(shape.rows, shape.dim) for t in inputs.tables]
    return _scripted(EmbeddingBagLoop(shape, weights, inputs))


def _scripted(loop: torch.nn.Module) -> Run:
    # A module, because TorchScript would convert lists that are passed as arguments at every call.
    with warnings.catch_warnings():
        # Deprecated in favour of compilers that unroll a loop or leave it to Python; nothing else runs it without the GIL.
        warnings.simplefilter("ignore", DeprecationWarning)
        script = torch.jit.script(loop)

    def run(first: int, count: int) -> None:
        with torch.inference_mode():
            script(first, count)

    return run


def _compare(tables: Tables, frames: _native.PreparedFrames, inputs: Inputs) -> None:
    """A benchmark of something else than the peer computes would mean nothing."""
    shape = tables.shape
    frames.serve(0, 1)
    block = -(-shape.batch * shape.dim * 4 // 64) * 16
    blocks = np.frombuffer(frames.payload(), np.float32).reshape(shape.tables, block)[:, : shape.batch * shape.dim]
    ours = blocks.reshape(shape.tables, shape.batch, shape.dim).transpose(1, 0, 2).reshape(shape.batch, -1)
    theirs = tables.fbgemm(inputs.indices[0], inputs.offsets[0]).numpy()
    # Rows lie within 0.5 of zero; sums of up to 120 of them, added in another order, differ by a few units in the last place.
    if not np.allclose(ours, theirs, rtol=1e-5, atol=1e-4):
        raise RuntimeError(f"{shape.name}, {tables.row_format}: ours and FBGEMM pooled different vectors")
