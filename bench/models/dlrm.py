"""DLRM in the shape of MLPerf's DLRM-v2, scaled to the machine: the model that the demo partitions.

26 tables, a bottom net over 13 dense features, pairwise dot products, a top net, one probability. Two variants
that share every weight: one id per feature (`single_id`), and bags of ids (`multi_hot`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

# num_embeddings_per_feature and multi_hot_sizes of MLPerf's DLRM-v2 (mlcommons/training, recommendation_v2/torchrec_dlrm).
MLPERF_ROWS: tuple[int, ...] = (
    40000000, 39060, 17295, 7424, 20265, 3, 7122, 1543, 63, 40000000, 3067956, 405282, 10,
    2209, 11938, 155, 4, 976, 14, 40000000, 40000000, 40000000, 590152, 12973, 108, 36,
)  # fmt: skip
MLPERF_BAG_IDS: tuple[int, ...] = (3, 2, 1, 2, 6, 1, 1, 1, 1, 7, 3, 8, 1, 6, 9, 5, 1, 1, 1, 12, 100, 27, 10, 3, 1, 1)
DENSE_FEATURES = 13
DIM = 64
# 26 tables of at most this many rows take 0.6 GB in fp32: fits any machine that can build the project.
DEFAULT_MAX_ROWS = 200_000
# Rows of the example inputs; export treats the batch as dynamic, so any size above one does.
EXAMPLE_BATCH = 4


def table_rows(max_rows: int = DEFAULT_MAX_ROWS) -> tuple[int, ...]:
    """Rows of the 26 tables: MLPerf's, capped at `max_rows`."""
    return tuple(min(rows, max_rows) for rows in MLPERF_ROWS)


def mlp(widths: Sequence[int], *, last_relu: bool) -> nn.Sequential:
    """Linear layers of the given widths with ReLU between them, and after the last where `last_relu`."""
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU(inplace=True)]
    return nn.Sequential(*(layers if last_relu else layers[:-1]))


class DotInteraction(nn.Module):
    """Products of every pair of `[batch, features, dim]`: the lower triangle without its diagonal, `[batch, pairs]`."""

    pairs: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        rows, columns = torch.tril_indices(features, features, offset=-1)
        self.register_buffer("pairs", rows * features + columns, persistent=False)

    def forward(self, stacked: Tensor) -> Tensor:
        return torch.bmm(stacked, stacked.transpose(1, 2)).flatten(1).index_select(1, self.pairs)


class Dlrm(nn.Module):
    """The weights and the dense part that both variants share."""

    def __init__(self, rows: Sequence[int], dim: int = DIM) -> None:
        super().__init__()
        tables = [nn.EmbeddingBag(n, dim, mode="sum", sparse=True) for n in rows]
        for table in tables:
            # DLRM's own initialisation: uniform within ±1/sqrt(rows).
            bound = 1 / math.sqrt(table.num_embeddings)
            nn.init.uniform_(table.weight, -bound, bound)
        self.tables = nn.ModuleList(tables)
        features = len(rows) + 1
        self.bottom = mlp((DENSE_FEATURES, 512, 256, dim), last_relu=True)
        self.interaction = DotInteraction(features)
        self.top = mlp((dim + features * (features - 1) // 2, 512, 256, 1), last_relu=False)

    def score(self, dense: Tensor, pooled: list[Tensor]) -> Tensor:
        """Probabilities `[batch, 1]` from dense features `[batch, 13]` and 26 pooled vectors `[batch, dim]`."""
        bottom = self.bottom(dense)
        pairs = self.interaction(torch.stack([bottom, *pooled], dim=1))
        return torch.sigmoid(self.top(torch.cat([bottom, pairs], dim=1)))


class SingleIdDlrm(Dlrm):
    """One id per feature: `dense [batch, 13] float32`, `sparse [batch, 26] int64`."""

    def forward(self, dense: Tensor, sparse: Tensor) -> Tensor:
        pooled = [table(sparse[:, i : i + 1]) for i, table in enumerate(self.tables)]
        return self.score(dense, pooled)


class MultiHotDlrm(Dlrm):
    """Bags of ids: `dense [batch, 13] float32` and, per feature, `values [nnz] int64`, `offsets [batch] int64`."""

    def forward(self, dense: Tensor, values: list[Tensor], offsets: list[Tensor]) -> Tensor:
        pooled = [table(v, o) for table, v, o in zip(self.tables, values, offsets, strict=True)]
        return self.score(dense, pooled)


def single_id(max_rows: int = DEFAULT_MAX_ROWS, seed: int = 0) -> tuple[SingleIdDlrm, tuple[Tensor, Tensor]]:
    """The single-id variant and example inputs for it; the same weights for the same seed."""
    torch.manual_seed(seed)
    rows = table_rows(max_rows)
    model = SingleIdDlrm(rows).eval()
    ids = torch.stack([torch.randint(0, n, (EXAMPLE_BATCH,)) for n in rows], dim=1)
    return model, (torch.randn(EXAMPLE_BATCH, DENSE_FEATURES), ids)


def multi_hot(max_rows: int = DEFAULT_MAX_ROWS, seed: int = 0) -> tuple[MultiHotDlrm, tuple[Tensor, list[Tensor], list[Tensor]]]:
    """The multi-hot variant and example inputs for it (MLPerf's ids per bag); the same weights as `single_id`."""
    torch.manual_seed(seed)
    rows = table_rows(max_rows)
    model = MultiHotDlrm(rows).eval()
    values = [torch.randint(0, n, (EXAMPLE_BATCH * ids,)) for n, ids in zip(rows, MLPERF_BAG_IDS, strict=True)]
    offsets = [torch.arange(EXAMPLE_BATCH) * ids for ids in MLPERF_BAG_IDS]
    return model, (torch.randn(EXAMPLE_BATCH, DENSE_FEATURES), values, offsets)
