"""Triton's queue as `sidepool tune` sets it: what is merged, and what is refused for being late."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as grpcclient

from sidepool.bench import triton_server
from sidepool.bench.tuning.knobs import Knobs, triton_config

pytestmark = pytest.mark.triton

# Takes 20 ms, and answers each request with the number of those that came along.
MODEL = """
import time
import numpy as np
import triton_python_backend_utils as pb

class TritonPythonModel:
    def execute(self, requests):
        time.sleep(0.02)
        sizes = [pb.get_input_tensor_by_name(request, "x").as_numpy().shape[0] for request in requests]
        return [pb.InferenceResponse([pb.Tensor("merged", np.full((size, 1), len(sizes), np.float32))]) for size in sizes]
"""
CONFIG = """
backend: "python"
input [ { name: "x" data_type: TYPE_FP32 dims: [ 1 ] } ]
output [ { name: "merged" data_type: TYPE_FP32 dims: [ 1 ] } ]
instance_group [ { count: 1 kind: KIND_CPU } ]
"""
LARGEST = 64
MINUTES_MS, SECOND_MS = 240_000.0, 1000.0


def flood(client: grpcclient.InferenceServerClient, model: str, count: int) -> tuple[list[float], list[str]]:
    """So many requests at once, of 1 to 64 samples: with how many each was merged, and why others were refused."""
    merged: list[float] = []
    refused: list[str] = []
    over = threading.Semaphore(0)

    def answered(result: grpcclient.InferResult | None, error: Exception | None) -> None:
        if result is None:
            refused.append(str(error))
        else:
            merged.append(float(result.as_numpy("merged")[0, 0]))
        over.release()

    for i in range(count):
        samples = np.zeros((1 + 21 * (i % 4), 1), np.float32)
        tensor = grpcclient.InferInput("x", samples.shape, "FP32")
        tensor.set_data_from_numpy(samples)
        client.async_infer(model, [tensor], answered)
    for _ in range(count):
        assert over.acquire(timeout=60)
    return merged, refused


def test_a_tuned_queue_merges_what_it_should_and_refuses_what_is_late(tmp_path: Path) -> None:
    if reason := triton_server.missing():
        pytest.skip(f"no Triton: {reason}")
    repository = tmp_path / "repository"
    for name, max_batch, limit_ms in (("alone", 0, MINUTES_MS), ("merged", LARGEST, MINUTES_MS), ("late", 0, SECOND_MS)):
        (repository / name / "1").mkdir(parents=True)
        (repository / name / "1" / "model.py").write_text(MODEL)
        config = triton_config(CONFIG, Knobs(max_batch=max_batch), name=name, least_batch=LARGEST, limit_ms=limit_ms)
        (repository / name / "config.pbtxt").write_text(config)
    with (
        triton_server.TritonServer(repository, work_dir=Path("build"), log=tmp_path / "triton.log") as server,
        grpcclient.InferenceServerClient(server.grpc) as client,
    ):
        assert flood(client, "alone", 40) == ([1.0] * 40, [])
        merged, refused = flood(client, "merged", 40)
        assert (len(merged), refused) == (40, [])
        assert max(merged) > 1
        # Two seconds of work for a queue of half a second.
        merged, refused = flood(client, "late", 100)
        assert set(merged) == {1.0}
        assert {"Request timeout expired" in error for error in refused} == {True}
        assert len(merged) + len(refused) == 100
