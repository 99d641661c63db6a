"""Inputs and outputs `[batch]`, several outputs, awkward names, 16-bit models: through the real Triton as from the model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from sidepool.bench import triton_server
from sidepool.client import ScoreClient
from sidepool.partition import partition_model
from sidepool.partition.triton_config import TritonOptions
from sidepool.wire.errors import LookupRejected

pytestmark = pytest.mark.triton


class Vectors(torch.nn.Module):
    """One id per sample, given without columns, which the dense half reads too."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(20, 3)

    def forward(self, ids: torch.Tensor, pooled: torch.Tensor) -> dict[str, torch.Tensor]:
        rows = self.table(ids) * pooled[:, None]
        return {"score": rows.sum(1), 'rows "of" it': rows, "known": ids > 0}


class Half(torch.nn.Module):
    """Everything in half precision, ids as int32."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = torch.nn.ModuleList(torch.nn.Embedding(20, 8) for _ in range(3))
        self.top = torch.nn.Linear(3 * 8 + 2, 1)
        self.half()

    def forward(self, dense: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        rows = [table(ids[:, i]) for i, table in enumerate(self.tables)]
        score: torch.Tensor = self.top(torch.cat([*rows, dense], 1))
        return score


def test_half_precision_and_int32_ids_go_through_triton_as_they_are(tmp_path: Path) -> None:
    reason = triton_server.missing()
    if reason is not None:
        pytest.skip(f"no Triton: {reason}")
    torch.manual_seed(0)
    model = Half().eval()

    def inputs(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(batch, 2).half(), torch.randint(0, 20, (batch, 3), dtype=torch.int32)

    options = TritonOptions(lane="local", torch_threads=1)
    report = partition_model(model, inputs(3), tmp_path / "artifact", name="half", sidecars=1, triton=options)
    assert report.model.dense.pooled_dtype == "fp16"
    with (
        triton_server.TritonServer(
            tmp_path / "artifact" / "model_repository", work_dir=Path("build"), log=tmp_path / "triton.log"
        ) as server,
        ScoreClient(server.grpc, "half", shared_memory_bytes_threshold=None) as client,
    ):
        for samples in (1, 5):
            dense, ids = inputs(samples)
            with torch.no_grad():
                expected = model(dense, ids).numpy()
            columns = [column.numpy() for column in ids.T]  # of both widths: Triton is sent what it declares
            for given in (ids.numpy(), columns, [column.astype(np.int64) for column in columns]):
                found = client.score({"dense": dense.numpy(), "ids": given})["score"]
                assert found.dtype == np.float16
                np.testing.assert_allclose(found.reshape(samples, 1), expected, atol=4e-3)
        with pytest.raises(LookupRejected, match=r"bag 0: id -2 is outside its table; allowed: 0 to 19"):
            client.score({"dense": dense.numpy(), "ids": np.full((samples, 3), -2, np.int32)})


def test_vectors_go_in_and_come_out_and_an_empty_batch_is_refused(tmp_path: Path) -> None:
    reason = triton_server.missing()
    if reason is not None:
        pytest.skip(f"no Triton: {reason}")
    torch.manual_seed(0)
    model = Vectors().eval()
    example = (torch.tensor([1, 2, 3]), torch.ones(3))
    options = TritonOptions(lane="local", torch_threads=1)
    partition_model(model, example, tmp_path / "artifact", name="vectors", sidecars=1, triton=options)
    with (
        triton_server.TritonServer(
            tmp_path / "artifact" / "model_repository", work_dir=Path("build"), log=tmp_path / "triton.log"
        ) as server,
        ScoreClient(server.grpc, "vectors", shared_memory_bytes_threshold=None) as client,
    ):
        for samples in (1, 5):
            ids, scale = torch.randint(0, 20, (samples,)), torch.randn(samples)
            with torch.no_grad():
                expected = model(ids, scale)
            found = client.score({"ids": ids.numpy()[:, None], "pooled": scale.numpy()[:, None]})
            assert set(found) == set(expected)
            for name, array in found.items():
                np.testing.assert_allclose(array.reshape(expected[name].shape), expected[name].numpy(), atol=1e-6)
            empty = {"ids": np.zeros((0, 1), np.int64), "pooled": np.zeros((0, 1), np.float32)}
            with pytest.raises(LookupRejected, match="byte size mismatch"):
                client._infer_inline(empty, {})
