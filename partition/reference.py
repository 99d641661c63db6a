"""What a lookup gives, by torch's own operators: what a cut and an artifact are compared with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from sidepool.wire.plan import Pooling


def pool_rows(
    read: Callable[[Tensor], Tensor],
    ids: Tensor,
    pooling: Pooling,
    *,
    padding_index: int | None = None,
    offsets: Tensor | None = None,
    weights: Tensor | None = None,
    include_last_offset: bool = False,
) -> Tensor:
    """Rows of `ids`, pooled per bag: `[batch, dim]`, or `[batch, ids, dim]` with pooling none.

    read: the rows `[n, dim]` of ids `[n]`, each asked for once. ids: `[batch, ids per bag]`, or `[nnz]` with `offsets` as
    `torch.nn.functional.embedding_bag` takes them, and `weights` per id. padding_index: a row, or no row at all: it is never read.
    """
    unique, places = torch.unique(ids.long(), return_inverse=True)
    readable = unique if unique.numel() else unique.new_zeros(1)
    if pooling is Pooling.NONE:
        return functional.embedding(places, read(readable))
    padded = (unique == padding_index).nonzero().flatten().tolist() if padding_index is not None else []
    # Any other row in its place, since it is passed over.
    rows = read(readable.masked_fill(readable == padding_index, 0) if padded else readable)
    return functional.embedding_bag(
        places,
        rows,
        None if offsets is None else offsets.long(),
        mode=str(pooling),
        per_sample_weights=None if weights is None else weights.to(rows.dtype),
        include_last_offset=include_last_offset,
        padding_idx=padded[0] if padded else None,
    )
