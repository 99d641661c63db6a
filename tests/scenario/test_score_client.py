"""`ScoreClient` against a real Triton: the model's scores from every form of input, and the ranker's errors by their class."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from served_dlrm import MAX_ROWS, Served, served

from sidepool.bench.deployment import DISAGGREGATED
from sidepool.bench.models import dlrm
from sidepool.client import ScoreClient
from sidepool.client.shared_regions import SHM_FOLDER
from sidepool.wire.errors import ConfigError, DeadlineExceeded, LookupRejected, TransportError

pytestmark = pytest.mark.triton
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture(scope="module", params=["fixed", "jagged"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(jagged=request.param == "jagged", directory=tmp_path_factory.mktemp(request.param)) as running:
        yield running


# Not of the module: pytest would order by it, and start the models once more.
@pytest.fixture(params=["grpc", "http"])
def client(model: Served, request: pytest.FixtureRequest) -> Iterator[ScoreClient]:
    server = model.deployment.server
    names = [f"c{i}" for i in range(len(dlrm.table_rows(MAX_ROWS)))]
    with ScoreClient(getattr(server, request.param), DISAGGREGATED, protocol=request.param, features=names) as connected:
        yield connected


def given(model: Served, samples: int, seed: int = 0) -> dict[str, Any]:
    """The request with its ids per feature: a list of bags, or one id per sample."""
    if not model.jagged:
        dense, sparse = model.arguments(samples, seed)
        return {"dense": dense.numpy(), "sparse": list(sparse.numpy().T)}
    dense, values, offsets = model.arguments(samples, seed)
    bags = [np.split(v.numpy(), o.numpy()[1:]) for v, o in zip(values, offsets, strict=True)]
    return {"dense": dense.numpy(), "sparse": bags}


def scores(client: ScoreClient, inputs: dict[str, Any], **options: Any) -> np.ndarray[Any, Any]:
    (found,) = client.score(inputs, **options).values()
    return found.reshape(-1)


def test_arrays_per_feature_score_like_the_model(model: Served, client: ScoreClient) -> None:
    for samples in (1, 5, 64):
        found = scores(client, given(model, samples), deadline_ms=20_000, request_id="r1", traceparent=TRACEPARENT)
        np.testing.assert_allclose(found, model.expected(samples), atol=1e-5)


def test_arrays_by_feature_name_score_like_the_model(model: Served, client: ScoreClient) -> None:
    inputs = given(model, 7)
    inputs["sparse"] = {f"c{i}": column for i, column in enumerate(inputs["sparse"])}
    np.testing.assert_allclose(scores(client, inputs), model.expected(7), atol=1e-5)


def test_large_requests_go_through_shared_memory_and_leave_none(model: Served) -> None:
    before = set(os.listdir(SHM_FOLDER))
    for protocol in ("grpc", "http"):
        url = getattr(model.deployment.server, protocol)
        with ScoreClient(url, DISAGGREGATED, protocol=protocol, shared_memory_bytes_threshold=1) as client:  # type: ignore[arg-type]
            for samples in (64, 3, 128):
                np.testing.assert_allclose(scores(client, given(model, samples)), model.expected(samples), atol=1e-5)
            assert client._regions.usable
            assert not {name for name in set(os.listdir(SHM_FOLDER)) - before if name.startswith("sidepool-")}


def test_an_id_outside_its_table_is_a_rejected_lookup(model: Served, client: ScoreClient) -> None:
    inputs = given(model, 4)
    column = inputs["sparse"][3]
    inputs["sparse"][3] = [np.array([10**9])] * 4 if model.jagged else np.full_like(column, 10**9)
    with pytest.raises(LookupRejected, match=r"^feature .*, bag 0: id 1000000000 is outside its table; allowed: 0 to "):
        client.score(inputs)
    np.testing.assert_allclose(scores(client, given(model, 4)), model.expected(4), atol=1e-5)


def test_a_budget_that_is_too_small_is_a_deadline(model: Served, client: ScoreClient) -> None:
    with pytest.raises(DeadlineExceeded):
        client.score(given(model, 64), deadline_ms=0.05)
    # Calls that are given up must not be cancelled: this Triton (2.51) ends with a segmentation fault on some in a thousand.
    for deadline_ms in np.random.default_rng(1).uniform(0.05, 3, 200):
        with contextlib.suppress(DeadlineExceeded):
            client.score(given(model, 64), deadline_ms=deadline_ms)
    np.testing.assert_allclose(scores(client, given(model, 4)), model.expected(4), atol=1e-5)


def test_what_is_not_there_is_named(model: Served, tmp_path: Path) -> None:
    for protocol in ("grpc", "http"):
        url = getattr(model.deployment.server, protocol)
        with pytest.raises(ConfigError, match="model 'nothing'"):
            ScoreClient(url, "nothing", protocol=protocol)  # type: ignore[arg-type]
        with pytest.raises(TransportError, match=r"Triton at 127\.0\.0\.1:1"):
            ScoreClient("127.0.0.1:1", "nothing", protocol=protocol)  # type: ignore[arg-type]
