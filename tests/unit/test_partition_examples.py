"""One small example of each kind of model that a team writes itself, in process: equal to the model."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sidepool.bench.checkpoint import partition_checkpoint, write_checkpoint
from sidepool.client import Pipeline
from sidepool.partition import PartitionReport, partition_model

ROWS = 50


class TwoTower(nn.Module):
    """A user with a padded history and an item, each through layers of its own; their product is the score."""

    def __init__(self) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(ROWS, 8), nn.Embedding(ROWS, 8, padding_idx=0)
        self.left, self.right = nn.Linear(16, 6), nn.Linear(8, 6)

    def forward(self, user: Tensor, history: Tensor, item: Tensor) -> Tensor:
        kept = (history != 0).unsqueeze(2)
        mean = (self.item(history) * kept).sum(1) / kept.sum(1).clamp(min=1)
        left = nn.functional.normalize(self.left(torch.cat([self.user(user), mean], 1)), dim=1)
        return (left * nn.functional.normalize(self.right(self.item(item)), dim=1)).sum(1)


class MultiTask(nn.Module):
    """One bottom, three heads of different shapes, a dict of results."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(ROWS, 8) for _ in range(3))
        self.bottom, self.click, self.buy = nn.Linear(26, 16), nn.Linear(16, 1), nn.Linear(16, 3)

    def forward(self, dense: Tensor, ids: Tensor) -> dict[str, Tensor]:
        rows = torch.cat([*(t(ids[:, i]) for i, t in enumerate(self.tables)), dense], 1)
        found = self.bottom(rows).relu()
        return {"click": self.click(found).sigmoid().squeeze(1), "buy": self.buy(found).softmax(1), "bottom": found}


class Shared(nn.Module):
    """One table under two names, looked up by three features in two poolings, each with a fixed shift of its ids."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Embedding(ROWS, 8)
        self.second = nn.EmbeddingBag(ROWS, 8, mode="mean")
        self.second.weight = self.first.weight
        self.top = nn.Linear(24, 1)

    def forward(self, ids: Tensor) -> Tensor:
        parts = [self.first(ids[:, 0] % 7), self.second(ids[:, 1:4]), self.first((ids[:, 4] + 3).clamp(max=ROWS - 1))]
        score: Tensor = self.top(torch.cat(parts, 1))
        return score


def check(model: nn.Module, make: Callable[[int], tuple[Any, ...]], out: Path, tolerance: float = 1e-5) -> PartitionReport:
    torch.manual_seed(3)
    report = partition_model(model.eval(), make(4), out, name="m", sidecars=1)
    with Pipeline.open(out) as pipeline, torch.no_grad():
        for batch in (1, 3):
            given = make(batch)
            torch.testing.assert_close(pipeline(*given), model(*given), rtol=tolerance, atol=tolerance)
    return report


def ids(*shape: int) -> Tensor:
    return torch.randint(0, ROWS, shape)


def test_two_towers_of_which_one_pools_a_history(tmp_path: Path) -> None:
    report = check(TwoTower(), lambda n: (ids(n), ids(n, 6), ids(n)), tmp_path / "out")
    assert {f.padding_index for f in report.plan.features} == {None, 0}
    assert {str(f.pooling) for f in report.plan.features} == {"sum"}


def test_several_outputs_of_several_shapes(tmp_path: Path) -> None:
    report = check(MultiTask(), lambda n: (torch.rand(n, 2), ids(n, 3)), tmp_path / "out")
    assert [o.name for o in report.model.outputs] == ["click", "buy", "bottom"]


def test_one_table_of_several_features(tmp_path: Path) -> None:
    report = check(Shared(), lambda n: (ids(n, 5),), tmp_path / "out")
    assert len(report.plan.tables) == 1
    assert sorted(str(f.pooling) for f in report.plan.features) == ["mean", "sum", "sum"]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 4e-3), (torch.bfloat16, 3e-2)])
def test_a_model_of_sixteen_bits(tmp_path: Path, dtype: torch.dtype, tolerance: float) -> None:
    class Narrow(MultiTask):
        def forward(self, dense: Tensor, ids: Tensor) -> dict[str, Tensor]:
            return {name: value.float() for name, value in super().forward(dense.to(dtype), ids).items()}

    report = check(Narrow().to(dtype), lambda n: (torch.rand(n, 2), ids(n, 3)), tmp_path / "out", tolerance)
    assert {str(t.row_format) for t in report.plan.tables} == {"fp16" if dtype is torch.float16 else "bf16"}


class Sequence(nn.Module):
    """Rows of a history straight into a layer: `body(model, rows [B, 6, 8], ids [B, 6])`."""

    def __init__(self, body: Callable[[Any, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.table, self.user, self.body = nn.Embedding(ROWS, 8), nn.Embedding(ROWS, 8), body
        self.lstm = nn.LSTM(8, 4, num_layers=2, batch_first=True, bidirectional=True)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(self, ids: Tensor) -> Any:
        return self.body(self, self.table(ids), ids)


def best(model: Any, rows: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    found, places = (rows * model.user(ids[:, 0]).unsqueeze(1)).sum(2).topk(2, dim=1)
    return found, ids.gather(1, places)


SEQUENCES: dict[str, Callable[[Any, Tensor, Tensor], Any]] = {
    "recurrent": lambda model, rows, ids: model.lstm(rows)[0][:, -1],
    "transformer": lambda model, rows, ids: model.encoder(rows, src_key_padding_mask=ids == ROWS - 1)[:, 0],
    "best of the candidates": best,
    "ids in one row": lambda model, rows, ids: model.user((ids % 7).reshape(-1)).view(ids.shape[0], 6, 8) * rows,
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_rows_of_a_history_may_go_anywhere(tmp_path: Path, name: str) -> None:
    def make(n: int) -> tuple[Tensor]:
        return (torch.stack([torch.randperm(ROWS - 1)[:6] for _ in range(n)]),)

    report = check(Sequence(SEQUENCES[name]), make, tmp_path / "out")
    assert "table" in {table.name for table in report.plan.tables}


class Wide(nn.Module):
    """Very many features of one id each."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(ROWS, 4) for _ in range(features))
        self.top = nn.Linear(4 * features, 1)

    def forward(self, ids: Tensor) -> Tensor:
        score: Tensor = self.top(torch.cat([table(ids[:, i]) for i, table in enumerate(self.tables)], 1))
        return score


@pytest.mark.slow
def test_two_thousand_features(tmp_path: Path) -> None:
    report = check(Wide(2000), lambda n: (ids(n, 2000),), tmp_path / "out")
    assert len(report.plan.features) == 2000


def test_a_mapped_checkpoint_never_lies_in_memory_as_a_whole(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, 800 << 20)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        peak = fresh.submit(partition_checkpoint, checkpoint, tmp_path / "out").result()
    for part in (checkpoint, tmp_path / "out"):
        shutil.rmtree(part)  # pytest keeps what tests leave
    assert peak.checkpoint > 750 << 20
    assert peak.during - peak.before < peak.checkpoint // 2
