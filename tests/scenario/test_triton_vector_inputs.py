"""Inputs and outputs `[batch]`, several outputs, awkward names: through the real Triton as from the model itself."""

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
