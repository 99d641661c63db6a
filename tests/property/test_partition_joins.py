"""However a model joins its pooled vectors, in whatever order and width, the dense program joins them the same."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from artifact_oracle import ArtifactOracle
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sidepool.partition import partition_model

DENSE = -1  # stands for the dense input in an order of items


class Joins(nn.Module):
    """Tables of the given widths over columns of one id matrix, joined by `cat` and, where widths agree, by `stack`."""

    def __init__(self, dims: list[int], orders: list[list[int]], shape: str) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.EmbeddingBag(7, dim, mode="sum") for dim in dims)
        self.orders, self.shape = orders, shape

    def forward(self, ids: Tensor, dense: Tensor) -> tuple[Tensor, ...]:
        vectors = [table(ids[:, i : i + 1]) for i, table in enumerate(self.tables)]
        return tuple(self.join([dense if item == DENSE else vectors[item] for item in order]) for order in self.orders)

    def join(self, items: list[Tensor]) -> Tensor:
        if self.shape == "stack":
            return torch.stack(items, dim=1).mul(2)
        if self.shape == "cat":
            return torch.cat(items, dim=1).mul(2)
        return torch.cat([item.unsqueeze(1) for item in items], dim=2 if self.shape == "rows_wide" else 1).mul(2)


@st.composite
def joins(draw: st.DrawFn) -> tuple[list[int], list[list[int]], str]:
    shape = draw(st.sampled_from(["cat", "stack", "rows_wide", "rows_tall"]))
    count = draw(st.integers(2, 5))
    same = shape in ("stack", "rows_tall")
    dims = [3] * count if same else draw(st.lists(st.integers(1, 4), min_size=count, max_size=count))
    items = st.lists(st.sampled_from([DENSE, *range(count)]), min_size=1, max_size=count + 1)
    orders = draw(st.lists(items, min_size=1, max_size=3))
    return dims, [list(range(count)), *orders], shape


@given(joins())
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_joins_of_pooled_vectors_are_kept(case: tuple[list[int], list[list[int]], str]) -> None:
    dims, orders, shape = case
    torch.manual_seed(0)
    model = Joins(dims, orders, shape).eval()
    with tempfile.TemporaryDirectory() as folder:
        example = (torch.randint(0, 7, (3, len(dims))), torch.randn(3, 3))
        partition_model(model, example, Path(folder) / "out", name="m", sidecars=1)
        oracle = ArtifactOracle(Path(folder) / "out")
        for batch in (1, 4):
            inputs = torch.randint(0, 7, (batch, len(dims))), torch.randn(batch, 3)
            with torch.no_grad():
                expected = model(*inputs)
            for found, wanted in zip(oracle(*inputs), expected, strict=True):
                torch.testing.assert_close(found, wanted, rtol=0, atol=0)
