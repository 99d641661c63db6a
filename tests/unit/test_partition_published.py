"""Models as their packages publish them are partitioned unchanged, and score as before."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from published_models import DEEPCTR, TORCHREC, Published, deepctr, keyed, torchrec
from torch import Tensor, nn

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


class Mixed(nn.Module):
    """Rows and pooled vectors of one key; a key's own ids and lengths; ids padded in front of a lookup; no other input."""

    def __init__(self) -> None:
        super().__init__()
        from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig
        from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

        rows = EmbeddingConfig(name="rows", embedding_dim=8, num_embeddings=20, feature_names=["f0"])
        bags = EmbeddingBagConfig(name="bags", embedding_dim=8, num_embeddings=20, feature_names=["f0"])
        self.rows, self.bags = EmbeddingCollection(tables=[rows], need_indices=True), EmbeddingBagCollection(tables=[bags])
        self.padded = nn.Embedding(21, 8)

    def forward(self, keyed: Any) -> Tensor:
        rows = self.rows(keyed)["f0"]
        even = rows.to_padded_dense(5) * (rows.to_padded_dense_weights(5) % 2 == 0)[:, :, None]
        seconds = self.padded(keyed["f0"].to_padded_dense(2))[:, 1]
        return even.sum(1) + self.bags(keyed).values() + seconds * rows.lengths()[:, None]


def test_rows_and_pooled_vectors_of_one_key_go_together(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("torchrec", reason="torchrec is not installed", exc_type=ImportError)
        published = Published(Mixed().eval(), lambda batch: (keyed(batch),), {})
    report = partitioned(tmp_path, published)
    assert {str(f.pooling) for f in report.plan.features if f.name.startswith("f0.")} == {"none", "sum"}
    assert report.model.index is not None


@pytest.mark.parametrize(
    ("forward", "said"),
    [
        (lambda m, k: m.rows(k)["f0"].values(), "output score: found a row per id; allowed: the batch as its first dimension"),
        (lambda m, k: m.rows(k)["f0"].to_padded_dense(2).sum(1) + k["f1"].lengths()[:, None], "needs the offsets of the key 'f1'"),
        (lambda m, k: m.padded(k["f1"].values() + 1).sum(0) + m.bags(k).values(), "found values computed by add"),
    ],
)
def test_what_is_left_of_jagged_ids_is_refused_by_name(tmp_path: Path, forward: Callable[[Any, Any], Tensor], said: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("torchrec", reason="torchrec is not installed", exc_type=ImportError)
        model = Mixed()
    model.forward = lambda keyed: forward(model, keyed)  # type: ignore[method-assign]
    with pytest.raises(CutError, match=re.escape(said)):
        partition_model(model, (keyed(4),), tmp_path / "out", name="m")
