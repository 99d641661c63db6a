"""Poisson loads of a few seconds on a model in Triton, and what they say of a rate."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

from tritonclient.utils import InferenceServerException

from sidepool.bench.load import LoadResult, make_schedule, run_load
from sidepool.bench.load.arrivals import poisson
from sidepool.bench.load.triton import FIRST_ATTEMPTS, TritonTarget
from sidepool.bench.traffic import Arrays, Caller, infer_inputs

# Seconds of one load: enough requests for a 95th percentile, but no longer than a climb can afford.
REQUESTS, LEAST_S, MOST_S = 300, 3.0, 10.0
WARMUP_S = 0.5
# Rates at which requests that come one after another keep the server so busy: a first guess, and one below which it only idles.
BUSY, IDLE = 0.6, 0.05
# A share of requests in time that misses by less than this may be one stall of the machine: 300 ms of a load of three seconds.
NARROW = 0.1
# Requests sent one after another before the first load: the first ones meet code that is not loaded and memory not touched.
WARMING = 6


class Prober:
    """One model in a running Triton under Poisson loads; every load has arrivals of its own."""

    def __init__(self, target: TritonTarget, seed: int, *, scale: float = 1.0) -> None:
        """scale: of a load's length."""
        self._target, self._seed, self._scale = target, seed, scale

    def load(self, rate: float, *, slo_ms: float, seconds: float | None = None) -> LoadResult:
        """One load at `rate` requests per second; `LoadResult.attainment` counts what was not answered as late."""
        if seconds is None:
            seconds = self._scale * min(max(REQUESTS / rate, LEAST_S), MOST_S) + WARMUP_S
        self._seed += 1
        arrivals = poisson(rate, seconds, self._seed)
        schedule = make_schedule(arrivals, self._target.requests, self._seed, seconds=seconds)
        return run_load(self._target, schedule, warmup_s=WARMUP_S, slo_ms=slo_ms)

    def meets(self, rate: float, *, limit_ms: float, percent: float, kept: list[tuple[float, LoadResult]] | None = None) -> bool:
        """Whether `percent` of the requests at `rate` were answered within the limit; a second load decides a narrow miss.

        kept: takes the rate and what came of it.
        """
        wanted = percent / 100
        result = self.load(rate, slo_ms=limit_ms)
        if wanted - NARROW < result.attainment < wanted:
            result = self.load(rate, slo_ms=limit_ms)
        if kept is not None:
            kept.append((rate, result))
        return result.attainment >= wanted


def _seconds(caller: Caller, inputs: list[Any]) -> float:
    """What one request takes that is answered."""
    for left in reversed(range(FIRST_ATTEMPTS)):
        began = time.perf_counter()
        try:
            caller.infer(inputs)
        except InferenceServerException:
            if not left:
                raise
        else:
            break
    return time.perf_counter() - began


@contextlib.contextmanager
def prober(
    address: str, model: str, requests: Sequence[Arrays], *, seed: int, scale: float = 1.0, shared_memory: bool = False
) -> Iterator[tuple[Prober, float]]:
    """A prober of a warm model, and the seconds of one request alone, over gRPC. shared_memory: where the loads' tensors lie."""
    with contextlib.closing(Caller(address, model)) as caller:
        encoded = [infer_inputs(arrays) for arrays in requests[:WARMING]]
        for inputs in encoded:
            _seconds(caller, inputs)
        alone_s = sum(_seconds(caller, inputs) for inputs in encoded) / len(encoded)
    with contextlib.closing(TritonTarget(address, model, requests, shared_memory=shared_memory)) as target:
        yield Prober(target, seed, scale=scale), alone_s
