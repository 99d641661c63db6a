"""DeepRecSys's eight models as `sidepool bench slo` serves them: limits, tables, requests, artifacts."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sidepool.bench.ids import calibrated
from sidepool.bench.load.sizes import Sizes
from sidepool.bench.models.deeprecsys import SIZES, deeprecsys, inputs
from sidepool.bench.monolith import write_monolith
from sidepool.bench.traffic import Arrays
from sidepool.client.pipeline import model_directory
from sidepool.partition import partition_model
from sidepool.wire.model import MODEL_FILE, PLAN_FILE, load_model
from sidepool.wire.plan import load_plan

# p95 limits in milliseconds that DeepRecSys publishes for its models (Gupta et al., ISCA 2020).
LIMITS_MS: dict[str, float] = {
    "ncf": 5,
    "wide_and_deep": 25,
    "mt_wide_and_deep": 25,
    "dlrm_rmc1": 100,
    "dlrm_rmc2": 400,
    "dlrm_rmc3": 100,
    "din": 100,
    "dien": 35,
}
# Published tables have up to ten million rows. A tenth of a million each lets the whole model, twice (once per process), and
# everything else lie in 16 GB; the largest then takes 0.8 GB, and even its smallest tables are beyond a level-2 cache.
MAX_ROWS = 100_000
# Distinct requests take so much memory at most: RMC2's have 7 MB of ids each.
REQUEST_BYTES, MOST_REQUESTS, LEAST_REQUESTS = 256 << 20, 256, 24
# Ids of one trace, with Meta's reuse over so many, folded into each table's rows.
TRACE = 1 << 18


def build(name: str, directory: Path, seed: int) -> Path:
    """`directory` with that model's artifact in `artifact` and the whole model in `whole/NAME`; kept if it is there already."""
    if directory.exists():
        return directory
    torch.manual_seed(seed)
    model, example = deeprecsys(name, max_rows=MAX_ROWS)
    making = directory.with_name(f".{directory.name}.making")
    shutil.rmtree(making, ignore_errors=True)
    # One sidecar: on one machine a second would share its memory and cores; how many engines it has is tuned.
    report = partition_model(model, example, making / "artifact", name=name, sidecars=1)
    config = report.out_dir / "model_repository" / name / "config.pbtxt"
    write_monolith(model, config=config, repository=making / "whole", name=name)
    making.rename(directory)
    return directory


def table_rows(name: str) -> list[int]:
    """Rows of each table as they are served."""
    return [min(n, MAX_ROWS) for n in SIZES[name].rows]


def requests(name: str, artifact: Path, sizes: Callable[[int, int], Sizes], seed: int) -> list[Arrays]:
    """As many requests of `sizes(count, seed)` samples as `REQUEST_BYTES` hold, with the reuse of Meta's traces."""
    spec = load_model(model_directory(artifact) / MODEL_FILE, load_plan(artifact / PLAN_FILE))
    draw = _Traces(seed)

    def request(samples: int) -> Arrays:
        tensors = inputs(name, table_rows(name), samples, draw)
        return {t.name: given.numpy() for t, given in zip(spec.inputs, tensors, strict=True)}

    sample_bytes = sum(array.nbytes for array in request(1).values())
    fit = REQUEST_BYTES / (sample_bytes * sizes(MOST_REQUESTS, seed).mean())
    return [request(size) for size in sizes(int(np.clip(fit, LEAST_REQUESTS, MOST_REQUESTS)), seed).tolist()]


class _Traces:
    """Ids of calibrated traces, each table's where the last draw from it ended."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._seed = seed
        self._traces: dict[int, NDArray[np.int64]] = {}

    def __call__(self, rows: int, shape: tuple[int, ...]) -> Tensor:
        trace = self._traces.get(rows)
        if trace is None:
            trace = self._traces[rows] = calibrated(1, TRACE, TRACE, self._seed)[0] % rows
        count = int(np.prod(shape))
        begin = int(self._random.integers(0, trace.size))
        return torch.from_numpy(np.take(trace, np.arange(begin, begin + count), mode="wrap").reshape(shape))
