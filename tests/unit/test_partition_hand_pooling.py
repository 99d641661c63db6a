"""Pooling written by hand leaves with its lookup where it provably is pooling, and stays where it only looks like it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sidepool.client import Pipeline
from sidepool.partition import PartitionReport, partition_model

ROWS, WIDTH, DIM = 12, 5, 4
Body = Callable[[Tensor, Tensor, Tensor], Tensor]


class Pooled(nn.Module):
    """Rows of `ids [B, 5]`, pooled by `body(rows, ids, lengths [B, 1])`."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.table, self.body = nn.Embedding(ROWS, DIM), body

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        return self.body(self.table(ids), ids, lengths) + lengths.float()


def inputs(batch: int) -> tuple[Tensor, Tensor]:
    """Bags that are empty, full and between; ids of 0 also among those that lengths keep."""
    lengths = torch.arange(batch).remainder(WIDTH + 1).unsqueeze(1)
    return torch.where(torch.arange(WIDTH) < lengths, torch.randint(0, ROWS, (batch, WIDTH)), 0), lengths


def partitioned(tmp_path: Path, body: Body) -> PartitionReport:
    torch.manual_seed(2)
    model = Pooled(body).eval()
    # Programs would run what is not pooling in the sidecar as well.
    report = partition_model(model, inputs(4), tmp_path / "out", name="m", sidecars=1, programs=False)
    with Pipeline.open(tmp_path / "out") as pipeline, torch.no_grad():
        for batch in (1, 2, 13):
            given = inputs(batch)
            torch.testing.assert_close(pipeline(*given), model(*given), rtol=1e-5, atol=1e-6)
    return report


def kept(lengths: Tensor) -> Tensor:
    return torch.arange(WIDTH) < lengths


PROVABLE: dict[str, tuple[Body, str, int | None]] = {
    "ids that are not 0": (lambda rows, ids, n: (rows * (ids != 0).unsqueeze(-1)).sum(1), "sum", 0),
    "ids that are not 0, as numbers": (lambda rows, ids, n: ((ids > 0).float()[:, :, None] * rows).sum(dim=1), "sum", 0),
    "ids as truth values": (lambda rows, ids, n: (rows * ids.bool().unsqueeze(2)).sum(1), "sum", ROWS),
    "ids left out": (lambda rows, ids, n: rows.masked_fill((ids == 3).unsqueeze(2), 0).sum(-2), "sum", 3),
    "ids left out, negated": (lambda rows, ids, n: (rows * (~(ids == 3)).unsqueeze(2)).sum(1), "sum", 3),
    "lengths": (lambda rows, ids, n: (rows * kept(n).unsqueeze(-1).float()).sum(1), "sum", ROWS),
    "lengths, chosen": (lambda rows, ids, n: torch.where(kept(n).unsqueeze(2), rows, 0.0).sum([1]), "sum", ROWS),
    "lengths, as a product": (lambda rows, ids, n: torch.bmm(kept(n).float().unsqueeze(1), rows).squeeze(1), "sum", ROWS),
    "mean over lengths": (lambda rows, ids, n: (rows * kept(n).unsqueeze(-1)).sum(1) / n.clamp(min=1), "sum", ROWS),
    "largest": (lambda rows, ids, n: rows.max(dim=1).values, "max", None),
    "largest of the kept": (lambda rows, ids, n: rows.masked_fill(~kept(n).unsqueeze(2), -1e9).amax(1), "max", ROWS),
    "largest, by a penalty": (lambda rows, ids, n: (rows - (1 - kept(n).float().unsqueeze(2)) * 1e9).max(1)[0], "max", ROWS),
    "an id among others": (lambda rows, ids, n: (rows * ((ids != 0) & (ids != 3)).unsqueeze(2)).sum(1), "sum", ROWS),
    "ids from the other end": (lambda rows, ids, n: (rows * (ids != 0).flip(1).unsqueeze(2)).sum(1), "sum", ROWS),
}  # fmt: skip


@pytest.mark.parametrize("name", PROVABLE)
def test_pooling_by_hand_becomes_a_pooled_lookup(tmp_path: Path, name: str) -> None:
    body, pooling, padding = PROVABLE[name]
    (feature,) = partitioned(tmp_path, body).plan.features
    assert (str(feature.pooling), feature.padding_index) == (pooling, padding)


DIFFERENT: dict[str, Body] = {
    "a mask along the vector": lambda rows, ids, n: (rows * (ids != 0)[:, None, :DIM]).sum(1),
    "weights": lambda rows, ids, n: (rows * ids.float().unsqueeze(2)).sum(1),
    "a mask from the rows": lambda rows, ids, n: (rows * (rows > 0)).sum(1),
    "a mean with the masked ones": lambda rows, ids, n: (rows * (ids != 0).unsqueeze(2)).mean(1),
    "a number among the rows": lambda rows, ids, n: rows.masked_fill((ids == 0).unsqueeze(2), 0.0).amax(1),
    "masked ones that count": lambda rows, ids, n: rows.masked_fill((ids == 0).unsqueeze(2), 1.0).sum(1),
    "rows that something else reads": lambda rows, ids, n: (rows * (ids != 0).unsqueeze(2)).sum(1) + rows[:, 0],
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_only_looks_like_pooling_keeps_its_rows(tmp_path: Path, name: str) -> None:
    (feature,) = partitioned(tmp_path, DIFFERENT[name]).plan.features
    assert (str(feature.pooling), feature.padding_index) == ("none", None)


class Dependent(nn.Module):
    """A lookup by the input, one by what the first one found, and one in a table that a layer reads too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.shared = nn.Embedding(9, DIM), nn.Embedding(DIM, 3), nn.Embedding(7, DIM)

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        found = self.first(ids)
        return {"chain": self.second(found.argmax(1)), "logits": self.shared(ids % 7) @ self.shared.weight.T}


def test_lookups_that_the_dense_program_needs_stay_in_it_and_the_report_says_why(tmp_path: Path) -> None:
    model = Dependent().eval()
    report = partition_model(model, torch.arange(4), tmp_path / "out", name="m", sidecars=1)
    assert [t.name for t in report.plan.tables] == ["first"]
    assert len(report.kept) == 2
    assert any("depend on the lookup" in line and "test_partition_hand_pooling" in line for line in report.kept)
    assert any("table shared.weight: also read by" in line for line in report.kept)
    assert all(line in report.text for line in report.kept)
    with Pipeline.open(tmp_path / "out") as pipeline, torch.no_grad():
        found: Any = pipeline(torch.arange(9))
        for ours, theirs in zip(found.values(), model(torch.arange(9)).values(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


class Repeating(nn.Module):
    """The same columns sliced and looked up twice."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, DIM)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.table(x[:, 0:1].long()).sum(2), self.table(x[:, 0:1].long()).sum(2)


def test_the_same_lookup_twice_is_one_feature(tmp_path: Path) -> None:
    model = Repeating().eval()
    report = partition_model(model, torch.randint(0, 9, (3, 2)).float(), tmp_path / "out", name="m", sidecars=1)
    assert len(report.plan.features) == 1
    with Pipeline.open(tmp_path / "out") as pipeline, torch.no_grad():
        given = torch.randint(0, 9, (5, 2)).float()
        for ours, theirs in zip(pipeline(given), model(given), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
