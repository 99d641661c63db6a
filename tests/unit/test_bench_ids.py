"""The ids of the benchmarks have the distribution they are named after."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from sidepool.bench.ids import GENERATORS, META_REUSE_SHARES, ZIPF_EXPONENT, calibrated, zipf

META = Path(__file__).resolve().parents[2].parent / "shared/data/meta_locality_stats_2021.txt"
BOUNDS = [0, *(1 << k for k in range(16)), np.inf]


def reuse_shares(traces: list[NDArray[np.int64]]) -> NDArray[np.float64]:
    """Share of all accesses per bucket of uses: (0, 1], (1, 2], (2, 4], … (32768, ∞)."""
    uses = np.concatenate([np.unique(trace, return_counts=True)[1] for trace in traces])
    shares, _ = np.histogram(uses, np.array(BOUNDS) + 0.5, weights=uses)
    return shares / uses.sum()


def published_shares() -> list[float]:
    if not META.exists():
        pytest.skip(f"{META.name} is not on this machine")
    section = META.read_text(encoding="utf-8").split("\n\n")[0]
    ratios = section.partition("Ratio of index distribution")[2]
    return [float(share) for share in re.findall(r"^\(\d+(?:, \d+\]|\+): ([\d.]+)$", ratios, re.MULTILINE)]


def test_the_reuse_shares_are_those_that_meta_published() -> None:
    assert list(META_REUSE_SHARES) == published_shares()


@pytest.mark.parametrize(("tables", "rows", "accesses"), [(26, 100_000, 400_000), (8, 400_000, 1_500_000)])
def test_calibrated_traces_have_the_published_reuse_histogram(tables: int, rows: int, accesses: int) -> None:
    traces = calibrated(tables, rows, accesses, 1)
    found = reuse_shares(traces)
    # The published shares have three decimals; the hottest bucket is short of at most one row of up to 65,536 uses.
    np.testing.assert_allclose(found, published_shares(), atol=0.006)
    cumulative = np.cumsum(found)[[0, 3, 6, 10, 15]]
    np.testing.assert_allclose(cumulative, [0.069, 0.28, 0.58, 0.79, 0.98], atol=0.01)
    assert sum(map(len, traces)) == pytest.approx(tables * accesses, rel=0.01)


def test_a_table_of_too_few_rows_for_the_reuse_histogram_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rows: found 1000; allowed: at least \d+ for 400000 accesses"):
        calibrated(4, 1000, 400_000, 1)


def test_zipf_ids_fall_with_the_power_of_their_rank() -> None:
    (trace,) = zipf(1, 10_000, 1_000_000, 1)
    uses = np.sort(np.bincount(trace, minlength=10_000))[::-1]
    expected = np.arange(1, 101) ** -ZIPF_EXPONENT
    # Ranks with thousands of uses each: sorting by use then hardly reorders them.
    np.testing.assert_allclose(uses[:100] / uses[0], expected, rtol=0.1)


def test_uniform_ids_reach_all_rows_equally_often() -> None:
    (trace,) = GENERATORS["uniform"](1, 1000, 1_000_000, 1)
    uses = np.bincount(trace, minlength=1000)
    # Chi-square with 999 degrees of freedom: mean 999, standard deviation 45.
    assert np.sum((uses - 1000) ** 2 / 1000) < 999 + 6 * 45


@pytest.mark.parametrize("kind", sorted(GENERATORS))
def test_a_seed_gives_the_same_ids_again_and_another_seed_others(kind: str) -> None:
    def make(seed: int) -> list[NDArray[np.int64]]:
        return GENERATORS[kind](3, 20_000, 50_000, seed)

    first, again, other = make(7), make(7), make(8)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(np.array_equal(a, b) for a, b in zip(first, other, strict=True))
    assert all(trace.dtype == np.int64 and trace.min() >= 0 and trace.max() < 20_000 for trace in first)
    assert not np.array_equal(first[0], first[1])
