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

    read: the rows `[n, dim]` of ids `[n]`. ids: `[batch, ids per bag]`, or `[nnz]` with `offsets` as
    `torch.nn.functional.embedding_bag` takes them, and `weights` per id. padding_index: a row, or no row at all: it is never read.
    """
    flat = ids.reshape(-1).long()
    if pooling is Pooling.NONE:
        rows = read(flat)
        return rows.view(*ids.shape, rows.shape[1])
    if offsets is None and padding_index is None and ids.shape[1:] == (1,):
        return read(flat)  # the row itself, whatever the pooling
    places, padding = torch.arange(flat.numel()), None
    if padding_index is not None:
        padded = flat == padding_index
        if bool(padded.any()):
            padding = int(padded.int().argmax())
            # Any other row in their place, since it is passed over.
            flat, places = flat.masked_fill(padded, 0), places.masked_fill(padded, padding)
    return functional.embedding_bag(
        places.view_as(ids),
        read(flat if flat.numel() else flat.new_zeros(1)),
        None if offsets is None else offsets.long(),
        mode=str(pooling),
        per_sample_weights=weights,
        include_last_offset=include_last_offset,
        padding_idx=padding,
    )
