"""Two models under the same conditions: short blocks of requests to each in turn, figures as medians over the rounds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sidepool.bench.traffic import Arrays, Caller, Percentiles, concurrently, infer_inputs, summarise, time_block

# Enough rounds for a median that one disturbed round cannot move.
ROUNDS = 5
# Blocks per model in a round, in turns; a round's percentiles are taken over all of them.
TURNS = 4
# Seconds of one block: short, so that both models see the same weather on a machine whose speed drifts within seconds.
BLOCK_S = 0.3
# At least this many, so that a round has 400 requests and its p99 is not its worst one.
MIN_BLOCK_REQUESTS = 100
MAX_BLOCK_REQUESTS = 1000
CLIENTS = 8


@dataclass(frozen=True)
class Shape:
    """One kind of request; `requests` are distinct ones, so that no model answers from its cache lines alone."""

    title: str
    requests: Sequence[Arrays]


@dataclass(frozen=True)
class Measured:
    """One model under one shape: alone at concurrency 1, and its rate under `CLIENTS` clients at once."""

    p50_us: float
    p95_us: float
    p99_us: float
    qps: float
    qps_8_clients: float

    def as_json(self) -> dict[str, float]:
        return asdict(self)


def compare(
    address: str, models: Sequence[str], shape: Shape, *, rounds: int = ROUNDS, progress: Callable[[], None]
) -> dict[str, Measured]:
    """Measure `models` under `shape`, alternately. `progress` is called after every block (`blocks(rounds)` times per model)."""
    requests = [infer_inputs(arrays) for arrays in shape.requests]
    callers = {model: Caller(address, model) for model in models}
    crowds = {model: [Caller(address, model) for _ in range(CLIENTS)] for model in models}
    try:
        sizes = {model: _block_size(caller, requests) for model, caller in callers.items()}
        alone: dict[str, list[Percentiles]] = {model: [] for model in models}
        together: dict[str, list[float]] = {model: [] for model in models}
        for _ in range(rounds):
            latencies: dict[str, list[NDArray[np.int64]]] = {model: [] for model in models}
            crowded_s = dict.fromkeys(models, 0.0)
            for turn in range(TURNS):
                for model in _order(models, turn):
                    latencies[model].append(time_block(callers[model], _cycle(requests, sizes[model])))
                    progress()
                for model in _order(models, turn):
                    crowded_s[model] += _throughput_block(crowds[model], requests, sizes[model])
                    progress()
            for model in models:
                taken = np.concatenate(latencies[model])
                alone[model].append(summarise(taken, taken.sum() / 1e9))
                together[model].append(TURNS * sizes[model] / crowded_s[model])
    finally:
        for caller in (*callers.values(), *(c for crowd in crowds.values() for c in crowd)):
            caller.close()
    return {model: _median(alone[model], together[model]) for model in models}


def blocks(rounds: int = ROUNDS) -> int:
    """How often `compare` reports progress per model."""
    return 2 * rounds * TURNS


def ratios(ours: Measured, theirs: Measured) -> Mapping[str, float]:
    """Ours over theirs: below 1 is better for latencies, above 1 for rates."""
    mine, other = ours.as_json(), theirs.as_json()
    return {name: round(mine[name] / other[name], 3) for name in mine}


def _order(models: Sequence[str], turn: int) -> Sequence[str]:
    """Who goes first changes every round."""
    return models if turn % 2 == 0 else list(reversed(models))


def _block_size(caller: Caller, requests: Sequence[list[Any]]) -> int:
    """Warms the model up, then says how many requests take about `BLOCK_S`."""
    time_block(caller, _cycle(requests, MIN_BLOCK_REQUESTS // 2))
    begin = time.perf_counter()
    time_block(caller, _cycle(requests, MIN_BLOCK_REQUESTS // 2))
    per_request_s = (time.perf_counter() - begin) / (MIN_BLOCK_REQUESTS // 2)
    return min(MAX_BLOCK_REQUESTS, max(MIN_BLOCK_REQUESTS, int(BLOCK_S / per_request_s)))


def _throughput_block(callers: Sequence[Caller], requests: Sequence[list[Any]], size: int) -> float:
    """Seconds for `size` requests with all callers busy; each request is one job, so that fast clients take more."""

    def send(caller: Caller, inputs: list[Any]) -> None:
        caller.infer(inputs)

    return concurrently(callers, [partial(send, inputs=inputs) for inputs in _cycle(requests, size)])


def _cycle(requests: Sequence[list[Any]], count: int) -> list[list[Any]]:
    return [requests[i % len(requests)] for i in range(count)]


def _median(alone: Sequence[Percentiles], together: Sequence[float]) -> Measured:
    middle = {name: statistics.median(getattr(p, name) for p in alone) for name in ("p50_us", "p95_us", "p99_us", "qps")}
    return Measured(**middle, qps_8_clients=round(statistics.median(together), 1))
