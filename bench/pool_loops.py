"""The loops in which peers look batches up, in TorchScript: no Python and no GIL between two lookups."""

# Without `from __future__ import annotations`: TorchScript reads the annotations of attributes as they are.

from collections.abc import Sequence

import fbgemm_gpu  # noqa: F401  (registers torch.ops.fbgemm)
import numpy as np
import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen
from torch import Tensor

from sidepool.bench.pool_cases import Batch, Shape


class Inputs:
    """The batches as FBGEMM takes them, restricted to some tables: `indices [nnz]`, `offsets [tables * batch + 1]`, int64."""

    def __init__(self, shape: Shape, batches: Sequence[Batch], tables: Sequence[int]) -> None:
        ends = np.cumsum([shape.batch * ids for ids in shape.ids])
        begins = ends - np.array(shape.ids) * shape.batch
        lengths = np.repeat(np.array(shape.ids)[list(tables)], shape.batch)
        self.tables = list(tables)
        self.indices = [torch.from_numpy(np.concatenate([b.values[begins[t] : ends[t]] for t in tables])) for b in batches]
        self.offsets = [torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]))] * len(batches)


class FbgemmLoop(torch.nn.Module):
    indices: list[Tensor]
    offsets: list[Tensor]
    w: list[Tensor]
    most: list[int]
    how: list[int]

    def __init__(self, module: IntNBitTableBatchedEmbeddingBagsCodegen, dim: int, inputs: Inputs) -> None:
        super().__init__()
        held = torch.tensor(inputs.tables)
        self.indices, self.offsets = inputs.indices, inputs.offsets
        self.w = [module.weights_host, module.weights_uvm, module.weights_placements[held], module.weights_offsets[held]]
        self.w += [module.weights_tys[held], torch.arange(0, (len(held) + 1) * dim, dim, dtype=torch.int32)]
        self.most = [len(held) * dim, module.max_int2_D, module.max_int4_D, module.max_int8_D]
        self.most += [module.max_float16_D, module.max_float32_D]
        self.how = [int(module.pooling_mode), module.output_dtype, module.row_alignment]

    def forward(self, first: int, count: int) -> int:
        w, most, how = self.w, self.most, self.how
        seen = 0
        for i in range(first, first + count):
            out = torch.ops.fbgemm.int_nbit_split_embedding_codegen_lookup_function(
                w[0], w[1], w[2], w[3], w[4], w[5], most[0], most[1], most[2], most[3], most[4], most[5],
                self.indices[i], self.offsets[i], how[0], None, how[1], None, None, how[2],
            )  # fmt: skip
            seen += int(out.size(0))  # TorchScript leaves out what nothing depends on
        return seen


class EmbeddingBagLoop(torch.nn.Module):
    weights: list[Tensor]
    indices: list[list[Tensor]]
    offsets: list[Tensor]

    def __init__(self, shape: Shape, weights: list[Tensor], inputs: Inputs) -> None:
        super().__init__()
        self.weights = weights
        sizes = [shape.ids[t] * shape.batch for t in inputs.tables]
        self.indices = [list(torch.split(i, sizes)) for i in inputs.indices]
        self.offsets = [torch.arange(0, shape.batch) * shape.ids[t] for t in inputs.tables]

    def forward(self, first: int, count: int) -> int:
        weights, offsets = self.weights, self.offsets
        seen = 0
        for i in range(first, first + count):
            ids = self.indices[i]
            for t in range(len(weights)):
                # torch.nn.functional.embedding_bag checks its arguments in Python, then calls this with mode 0: sum.
                seen += int(torch.embedding_bag(weights[t], ids[t], offsets[t], False, 0)[0].size(0))
        return seen


class NullLoop(torch.nn.Module):
    indices: list[Tensor]
    offsets: list[Tensor]

    def __init__(self, inputs: Inputs) -> None:
        super().__init__()
        self.indices, self.offsets = inputs.indices, inputs.offsets

    def forward(self, first: int, count: int) -> int:
        seen = 0
        for i in range(first, first + count):
            seen += self.indices[i].dim() + self.offsets[i].dim()
        return seen
