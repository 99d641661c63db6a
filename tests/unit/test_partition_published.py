"""Models as their packages publish them are partitioned unchanged, and score as before."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from published_models import DEEPCTR, TORCHREC, Published, deepctr, keyed, torchrec

from sidepool.client import Pipeline
from sidepool.partition import PartitionReport, partition_model
from sidepool.wire.errors import CutError, LookupRejected

# The packages themselves use what newer releases of others deprecate.
pytestmark = pytest.mark.filterwarnings("ignore")


def partitioned(tmp_path: Path, published: Published) -> PartitionReport:
    """Partition; compare the written artifact with the model on fresh inputs."""
    torch.manual_seed(1)
    report = partition_model(published.model, published.make(4), tmp_path / "out", name="m", sidecars=1)
    with Pipeline.open(tmp_path / "out") as pipeline, torch.no_grad():
        for batch in (1, 2, 7):
            if batch >= published.least_batch:
                given = published.make(batch)
                torch.testing.assert_close(pipeline(*given), published.model(*given), rtol=1e-5, atol=1e-6)
    return report


@pytest.mark.parametrize("name", TORCHREC)
def test_a_torchrec_model_takes_its_keyed_jagged_tensor_before_and_after(tmp_path: Path, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # importing the package warns
        published = torchrec(name)
    before = copy.copy(vars(published.model))
    report = partitioned(tmp_path, published)
    assert {f.name: str(f.pooling) for f in report.plan.features} == published.poolings
    assert {f.weighted for f in report.plan.features} == {name == "weighted"}
    assert report.model.jagged
    assert vars(published.model) == before


@pytest.mark.parametrize("name", DEEPCTR)
def test_a_deepctr_model_pools_its_histories_in_the_sidecar(tmp_path: Path, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        published = deepctr(name)
    report = partitioned(tmp_path, published)
    assert {str(f.pooling) for f in report.plan.features} == set(published.poolings)


def test_a_keyed_jagged_tensor_of_several_batch_sizes_is_refused(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        published = torchrec("DLRM")
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

    dense = torch.rand(2, 5)
    ragged: Any = KeyedJaggedTensor(
        keys=["f0", "f1"],
        values=torch.arange(6),
        lengths=torch.tensor([2, 1, 3]),
        stride_per_key_per_rank=[[2], [1]],
    )
    with pytest.raises(CutError, match="KeyedJaggedTensor: found a batch size per key; allowed: one for all keys"):
        partition_model(published.model, (dense, ragged), tmp_path / "out", name="m")
    partition_model(published.model, published.make(4), tmp_path / "good", name="m")
    with Pipeline.open(tmp_path / "good") as pipeline, pytest.raises(LookupRejected, match="found a batch size per key"):
        pipeline(dense, ragged)


def test_rows_of_a_keyed_jagged_tensor_that_are_not_pooled_are_refused(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("torchrec", reason="torchrec is not installed", exc_type=ImportError)
        from torchrec.modules.embedding_configs import EmbeddingConfig
        from torchrec.modules.embedding_modules import EmbeddingCollection

    class Sequences(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            table = EmbeddingConfig(name="t", embedding_dim=8, num_embeddings=20, feature_names=["f0"])
            self.tables = EmbeddingCollection(tables=[table])

        def forward(self, keyed: Any) -> Any:
            return self.tables(keyed)["f0"].to_padded_dense(5).sum(1)

    with pytest.raises(CutError, match=r"(?s)rows of a KeyedJaggedTensor that are not pooled.*remedy: give sequences as a matrix"):
        partition_model(Sequences(), (keyed(4),), tmp_path / "out", name="m", sidecars=1)
