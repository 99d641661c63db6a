"""A padding index of the model becomes its feature's, and means there what it means in torch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from artifact_oracle import ArtifactOracle
from torch import Tensor, nn
from torch.nn import functional

from sidepool.client import Pipeline
from sidepool.partition import partition_model
from sidepool.wire.config import decode, dump_yaml
from sidepool.wire.errors import PlanError
from sidepool.wire.plan import Plan, validate_plan

# Every bag of the first two samples holds padding of some table; one holds nothing else.
IDS = torch.tensor([[0, 7, 9], [9, 9, 9], [7, 7, 3], [0, 0, 0], [1, 2, 3]])


class Padded(nn.Module):
    """One table, looked up with paddings in every way that a model can; no padding row is zero."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.sum = nn.EmbeddingBag(10, 4, mode="sum", padding_idx=0)
        self.mean = nn.EmbeddingBag(10, 5, mode="mean", padding_idx=-1)
        self.max = nn.EmbeddingBag(10, 6, mode="max", padding_idx=7)
        self.functional = nn.Parameter(torch.randn(10, 3))
        self.weighted = nn.EmbeddingBag(10, 2, mode="sum", padding_idx=9)
        self.rows = nn.Embedding(10, 3, padding_idx=7)
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    def forward(self, ids: Tensor, weights: Tensor, values: Tensor, offsets: Tensor) -> Tensor:
        bags = [self.sum(ids), self.mean(ids), self.max(ids), functional.embedding_bag(ids, self.functional, padding_idx=-1)]
        bags += [self.weighted(ids, per_sample_weights=weights), self.rows(ids).mean(1), self.mean(values, offsets)]
        return torch.cat(bags, 1)


INPUTS = (IDS, torch.rand(5, 3, generator=torch.manual_seed(1)), torch.tensor([9, 9, 3, 1, 9, 2]), torch.tensor([0, 2, 2, 3, 5]))


def test_padding_passes_from_the_model_to_the_plan_and_back_into_the_scores(tmp_path: Path) -> None:
    model = Padded().eval()
    plan = partition_model(model, INPUTS, tmp_path / "out", name="m", sidecars=1).plan
    assert sorted((f.table, f.padding_index) for f in plan.features if f.padding_index is not None) == [
        ("functional", 9), ("max", 7), ("mean", 9), ("mean", 9), ("sum", 0),
    ]  # fmt: skip
    with torch.no_grad():
        expected = model(*INPUTS)
    [found] = ArtifactOracle(tmp_path / "out")(*INPUTS)
    torch.testing.assert_close(found, expected)
    with Pipeline.open(tmp_path / "out") as pipeline:
        torch.testing.assert_close(torch.as_tensor(pipeline(*INPUTS)), expected)


def small_plan(**feature: object) -> Plan:
    return decode(
        {
            "epoch": 1,
            "model": "m",
            "tables": [{"name": "t", "rows": 10, "dim": 2}],
            "features": [{"name": "f", "table": "t", **feature}],
            "sidecars": [{"name": "s", "address": "h:1"}],
            "shards": [{"table": "t", "sidecar": "s", "rows": [0, 10], "columns": [0, 2]}],
        },
        Plan,
        where="plan",
        error=PlanError,
    )


def test_a_padding_index_that_is_no_row_is_refused() -> None:
    validate_plan(small_plan(padding_index=10))  # the number of rows: nothing but padding
    with pytest.raises(PlanError, match=r"features\.0\.padding_index: found 11; allowed: 0 to 10, a row of its table or"):
        validate_plan(small_plan(padding_index=11))
    with pytest.raises(PlanError, match=r"features\.0\.padding_index: found -1"):
        small_plan(padding_index=-1)


def test_plans_without_padding_read_and_sign_as_before_there_was_any() -> None:
    assert "padding_index" not in dump_yaml(small_plan())
    assert small_plan().fingerprint == "2e1f0df4db9596ccde85f968edd46f893409b5197c89f0a6914e3ee40d92f20e"
    assert small_plan(padding_index=0).fingerprint != small_plan().fingerprint
