"""Models as their packages publish them, partitioned, behind sidecars and a real Triton: scores as the models' own."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from published_models import Published, deepctr, torchrec

from sidepool.bench import triton_server
from sidepool.bench.processes import running_sidecars
from sidepool.client import ScoreClient
from sidepool.partition import partition_model
from sidepool.partition.triton_config import TritonOptions

# The packages themselves use what newer releases of others deprecate.
pytestmark = [pytest.mark.triton, pytest.mark.filterwarnings("ignore")]

TORCHREC, DEEPCTR = ("DLRM", "DLRM_DCN", "sequences"), ("DIN", "DIEN")


def test_starred_models_score_through_sidecars_and_triton_as_by_themselves(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        models = {name: torchrec(name) for name in TORCHREC} | {name: deepctr(name) for name in DEEPCTR}
    with served(models, tmp_path) as address:
        for name, published in models.items():
            with ScoreClient(address, name, shared_memory_bytes_threshold=None) as client:
                for batch in (1, 2, 7):
                    given = published.make(batch)
                    with torch.no_grad():
                        expected = published.model(*given).numpy()
                    (found,) = client.score(request(given)).values()
                    np.testing.assert_allclose(found.reshape(expected.shape), expected, rtol=1e-5, atol=1e-6)


def request(given: tuple[Any, ...]) -> dict[str, Any]:
    """What a client sends for a model's arguments: deepctr-torch's one matrix, or TorchRec's numbers and keyed bags."""
    if len(given) == 1:
        return {"x": given[0].numpy()}
    dense, keyed = given
    lengths: NDArray[np.int32] = keyed.lengths().view(len(keyed.keys()), -1).numpy().astype(np.int32)
    return {"dense_features": dense.numpy(), "sparse": (keyed.values().numpy(), lengths)}


@contextlib.contextmanager
def served(models: dict[str, Published], directory: Path) -> Iterator[str]:
    """The gRPC address of a Triton that serves all `models`, two sidecars for each of TorchRec's and one for the others."""
    reason = triton_server.missing()
    if reason is not None:
        pytest.skip(f"no Triton: {reason}")
    torch.manual_seed(4)
    repository, configs = directory / "repository", []
    repository.mkdir()
    for name, published in models.items():
        out, sidecars = directory / name, 2 if name in TORCHREC else 1
        addresses = [f"127.0.0.1:{port}" for port in triton_server.free_ports(sidecars)]
        options = TritonOptions(torch_threads=1)
        partition_model(published.model, published.make(4), out, name=name, sidecars=sidecars, addresses=addresses, triton=options)
        configs += sorted((out / "sidecars").glob("*/sidecar.yaml"))
        (repository / name).symlink_to(out / "model_repository" / name)
    with (
        running_sidecars(configs, work_dir=directory / "logs"),
        triton_server.TritonServer(repository, work_dir=Path("build"), log=directory / "triton.log") as server,
    ):
        yield server.grpc
