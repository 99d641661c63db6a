"""DeepRecSys's eight models are partitioned at their published widths, and score as before."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils import _pytree as pytree

from sidepool.bench.models.deeprecsys import SIZES, deeprecsys, inputs
from sidepool.client import Pipeline
from sidepool.partition import partition_model


@pytest.mark.parametrize("name", SIZES)
def test_a_model_of_deeprecsys_scores_as_before(tmp_path: Path, name: str) -> None:
    torch.manual_seed(3)
    # DIEN is one recurrent step per table, each of many operators.
    tables = 9 if name == "dien" else len(SIZES[name].rows)
    model, example = deeprecsys(name, max_rows=20, max_tables=tables)
    report = partition_model(model, example, tmp_path / "out", name=name, sidecars=2)
    assert len([t for t in report.plan.tables if t.program is None]) == tables
    # DIN weighs its history in the sidecar.
    assert [t.name for t in report.plan.tables if t.program is not None] == ["behaviour.program"] * (name == "din")
    assert all(str(f.pooling) == "sum" for f in report.plan.features)
    with Pipeline.open(tmp_path / "out") as pipeline, torch.no_grad():
        for batch in (1, 5):
            given = inputs(name, (20,) * tables, batch)
            for ours, theirs in zip(pytree.tree_leaves(pipeline(*given)), pytree.tree_leaves(model(*given)), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
