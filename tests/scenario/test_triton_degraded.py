"""Under `on_missing_shard: degrade`, callers of Triton get scores without a lost sidecar's rows, and the features' names."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest
import torch
import tritonclient.grpc as triton
from numpy.typing import NDArray
from served_dlrm import Served, served

from sidepool.bench.deployment import DISAGGREGATED
from sidepool.bench.traffic import infer_inputs
from sidepool.client import ScoreClient
from sidepool.probe import probe
from sidepool.wire.plan import OnMissingShard

pytestmark = pytest.mark.triton

SAMPLES = 3
# Reconnecting backs off for at most a few seconds.
PATIENCE_S = 30.0


@pytest.fixture(scope="module", params=[False, True], ids=["fixed", "jagged"])
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp("deployment")
    with served(jagged=request.param, directory=directory, lane="tcp", on_missing_shard=OnMissingShard.DEGRADE) as found:
        yield found


def ask(running: Served, seed: int) -> tuple[NDArray[np.float32], list[str]]:
    """Scores, and what the output `degraded` says, once per sample (jagged: per request)."""
    result = running.caller._client.infer(DISAGGREGATED, infer_inputs(running.request(SAMPLES, seed)))
    said = result.as_numpy("degraded")
    assert said.shape == (1 if running.jagged else SAMPLES, 1)
    return result.as_numpy("score").reshape(-1), [text.decode() for text in said.reshape(-1)]


def without(running: Served, features: set[str]) -> torch.nn.Module:
    """The model itself, with the tables of `features` all zero."""
    model = copy.deepcopy(running.model)
    for i, feature in enumerate(running.deployment.report.plan.features):
        if feature.name in features:
            model.tables[i].weight.data.zero_()
    return model


def test_the_response_names_the_features_of_a_killed_sidecar_until_it_is_back(running: Served) -> None:
    plan = running.deployment.report.plan
    lost = plan.sidecars[1].name
    held = [f.name for f in plan.features if any(s.sidecar == lost for s in plan.shards if s.table == f.table)]
    assert 0 < len(held) < len(plan.features)
    running.check_serving()
    scores, said = ask(running, 5)
    assert set(said) == {""}
    np.testing.assert_allclose(scores, running.expected(SAMPLES, 5), atol=1e-5)

    running.deployment.sidecars[1].kill()
    scores, said = ask(running, 5)
    assert set(said) == {",".join(held)}
    with torch.inference_mode():
        expected = without(running, set(held))(*running.arguments(SAMPLES, 5)).reshape(-1).numpy()
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert np.abs(scores - running.expected(SAMPLES, 5)).max() > 1e-4, "the lost rows count"
    with closing(ScoreClient(running.deployment.server.grpc, DISAGGREGATED)) as client:
        encoded = {name: array[0] if running.jagged else array for name, array in running.request(SAMPLES, 5).items()}
        found = client.score(encoded)
    np.testing.assert_array_equal(found["score"].reshape(-1), scores)
    assert {text.decode() for text in found["degraded"].reshape(-1)} == set(said)
    only_scores = [triton.InferRequestedOutput("score")]
    inputs = infer_inputs(running.request(SAMPLES, 5))
    result = running.caller._client.infer(DISAGGREGATED, inputs, outputs=only_scores)
    np.testing.assert_array_equal(result.as_numpy("score").reshape(-1), scores)

    running.deployment.sidecars[1].start()
    running.deployment.sidecars[1].wait_ready()
    deadline = time.monotonic() + PATIENCE_S
    while set(said) != {""}:
        assert time.monotonic() < deadline
        time.sleep(0.05)
        scores, said = ask(running, 5)
    np.testing.assert_allclose(scores, running.expected(SAMPLES, 5), atol=1e-5)


def test_the_liveness_probe_gets_scores_from_either_form(running: Served) -> None:
    assert probe(running.deployment.server.http, DISAGGREGATED, PATIENCE_S) == f"{DISAGGREGATED}: scores"


def test_a_jagged_request_without_samples_says_that_nothing_is_degraded(running: Served) -> None:
    if not running.jagged:
        pytest.skip("Triton itself refuses a batch of 0 in fixed-width requests")
    result = running.caller._client.infer(DISAGGREGATED, infer_inputs(running.request(0)))
    assert result.as_numpy("score").shape == (1, 0, 1)
    assert result.as_numpy("degraded").tolist() == [[b""]]
