"""Small DLRMs behind a real Triton, for tests that send requests through it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tritonclient.grpc as triton
from numpy.typing import NDArray

from sidepool.bench import triton_server
from sidepool.bench.demo import request_for
from sidepool.bench.deployment import DISAGGREGATED, Deployment, deployed
from sidepool.bench.models import dlrm
from sidepool.bench.traffic import Arrays, Caller, infer_inputs
from sidepool.wire.plan import OnMissingShard

MAX_ROWS = 500


@dataclass(frozen=True)
class Served:
    """A deployment, the model it was made from, and a way to call it."""

    deployment: Deployment
    model: torch.nn.Module
    jagged: bool
    caller: Caller

    def arguments(self, samples: int, seed: int = 0) -> tuple[Any, ...]:
        """Random arguments of the model: `(dense, sparse)`, or `(dense, values, offsets)` with bags of 0 to 4 ids."""
        random = np.random.default_rng(seed)
        rows = dlrm.table_rows(MAX_ROWS)
        dense = torch.from_numpy(random.standard_normal((samples, dlrm.DENSE_FEATURES), dtype=np.float32))
        if not self.jagged:
            return dense, torch.from_numpy(np.stack([random.integers(0, n, samples) for n in rows], axis=1))
        lengths = [random.integers(0, 5, samples) for _ in rows]
        values = [torch.from_numpy(random.integers(0, n, int(bags.sum()))) for n, bags in zip(rows, lengths, strict=True)]
        return dense, values, [torch.from_numpy(np.cumsum(bags) - bags) for bags in lengths]

    def request(self, samples: int, seed: int = 0) -> Arrays:
        return request_for(self.arguments(samples, seed))

    def expected(self, samples: int, seed: int = 0) -> NDArray[np.float32]:
        """The unpartitioned model's scores for `request(samples, seed)`."""
        with torch.inference_mode():
            scores: NDArray[np.float32] = self.model(*self.arguments(samples, seed)).reshape(-1).numpy()
        return scores

    def infer(self, arrays: Arrays, **options: Any) -> NDArray[np.float32]:
        return self.caller.infer(infer_inputs(arrays), **options)

    def refusal(self, arrays: Arrays, **options: Any) -> str:
        """The error message that Triton gives for a request; fails the test if it is answered."""
        with pytest.raises(triton.InferenceServerException) as refused:
            self.infer(arrays, **options)
        return str(refused.value)

    def check_serving(self, seed: int = 99) -> None:
        """An ordinary request gets the model's own scores."""
        np.testing.assert_allclose(self.infer(self.request(3, seed)), self.expected(3, seed), atol=1e-5)


@contextlib.contextmanager
def served(
    *, jagged: bool, directory: Path, lane: str = "shm", on_missing_shard: OnMissingShard = OnMissingShard.FAIL
) -> Iterator[Served]:
    """A small DLRM, partitioned over two sidecars, behind a Triton of its own; skips the test where there is none."""
    reason = triton_server.missing()
    if reason is not None:
        pytest.skip(f"no Triton: {reason}")
    model, example_inputs = (dlrm.multi_hot if jagged else dlrm.single_id)(MAX_ROWS, seed=3)
    # The installation is shared with the demo; everything else belongs to the test.
    with deployed(
        model,
        example_inputs,
        directory=directory / "artifact",
        work_dir=Path("build"),
        logs=directory,
        lane=lane,
        on_missing_shard=on_missing_shard,
    ) as deployment:
        caller = Caller(deployment.server.grpc, DISAGGREGATED)
        try:
            yield Served(deployment, model, jagged, caller)
        finally:
            caller.close()
