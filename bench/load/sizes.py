"""How many samples (candidates to rank) the queries have: int64 `[count]`.

Sizes are the quantiles of their distribution in random order, not draws from it: a few hundred requests then have its mean and
its tail.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sidepool.bench.load.numbers_file import read_numbers
from sidepool.wire.errors import ConfigError

Sizes = NDArray[np.int64]

# Of twenty queries, what MLPerf Inference's DLRM aggregates per query: the sample sizes at twenty quantiles that its reference
# implementation reads (mlcommons/inference, recommendation/dlrm_v2/pytorch/tools/dist_quantile.txt).
MLPERF_QUANTILES = (100,) * 2 + (200,) * 12 + (300,) * 2 + (400, 500, 600, 700)
# The lognormal that is usually taken for query sizes. Gupta et al., DeepRecSys (ISCA 2020), found production's tail to be heavier,
# up to about 1,000 candidates.
LOGNORMAL_MEAN, LOGNORMAL_SIGMA = 5.1, 0.2
LARGEST = 1000
# So a tail is mixed in: this share of the queries (our choice) is spread log-uniformly from the lognormal's 95th percentile to
# `LARGEST`. It brings a third of all samples.
TAIL_SHARE = 0.15


def mlperf(count: int, seed: int) -> Sizes:
    """100 to 700 samples, as in MLPerf Inference's DLRM."""
    return _shuffled(np.array(MLPERF_QUANTILES)[(_quantiles(count) * len(MLPERF_QUANTILES)).astype(np.int64)], seed)


def lognormal(count: int, seed: int) -> Sizes:
    """Lognormal(5.1, 0.2), a median of 164 samples, with a heavy tail up to 1,000 mixed in."""
    from scipy.stats import norm

    tail = round(count * TAIL_SHARE)
    body = np.exp(LOGNORMAL_MEAN + LOGNORMAL_SIGMA * norm.ppf(_quantiles(count - tail)))
    begin = np.log(np.exp(LOGNORMAL_MEAN + LOGNORMAL_SIGMA * norm.ppf(0.95)))
    far = np.exp(begin + (np.log(LARGEST) - begin) * _quantiles(tail))
    return _shuffled(np.rint(np.concatenate([body, far])), seed)


def fixed(size: int) -> Callable[[int, int], Sizes]:
    """Always `size` samples."""
    return lambda count, seed: np.full(count, size, np.int64)


def from_file(path: Path) -> Callable[[int, int], Sizes]:
    """Sizes of a file, in its order and over again; raises `ConfigError`."""
    read = read_numbers(path, 1.0).astype(np.int64)
    return lambda count, seed: np.resize(read, count)


def _quantiles(count: int) -> NDArray[np.float64]:
    return (np.arange(count) + 0.5) / count


def _shuffled(sizes: NDArray[np.generic], seed: int) -> Sizes:
    return np.random.default_rng(seed).permutation(sizes.astype(np.int64))


SIZES: dict[str, Callable[[int, int], Sizes]] = {"mlperf": mlperf, "lognormal": lognormal}


def parse_sizes(text: str) -> Callable[[int, int], Sizes]:
    """`mlperf`, `lognormal`, a number, or a file; raises `ConfigError`."""
    if text in SIZES:
        return SIZES[text]
    if text.isdecimal() and int(text) > 0:
        return fixed(int(text))
    if Path(text).exists():
        return from_file(Path(text))
    raise ConfigError(f"sizes: found {text!r}; allowed: {', '.join(SIZES)}, a number of samples, or a file of them")


def describe(sizes: Sequence[int] | Sizes) -> dict[str, float]:
    """Mean and percentiles, for reports."""
    p50, p99 = np.percentile(sizes, (50, 99))
    return {"mean": round(float(np.mean(sizes)), 1), "p50": float(p50), "p99": round(float(p99), 1), "max": float(np.max(sizes))}
