"""Ids as benchmarks look them up: uniform, Zipf, and with the reuse that Meta measured in production.

Every generator gives one trace per table, `[tables]` arrays of int64 ids in `[0, rows)`, and is deterministic in its seed.
Which rows are hot is random: nothing depends on neighbouring rows being hot together.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]

# Share of all accesses that go to rows used 1, 2, 3-4, 5-8, …, 16,385-32,768 times and more often, in one batch of 65,536
# samples over 856 tables: the section `fbgemm_t856_bs65536.pt` of meta_locality_stats_2021.txt, published by Meta with
# the dataset https://github.com/facebookresearch/dlrm_datasets (embedding_bag/2021).
META_REUSE_SHARES = (
    0.069, 0.044, 0.068, 0.101, 0.121, 0.104, 0.073, 0.058, 0.052, 0.050, 0.049, 0.048, 0.048, 0.043, 0.031, 0.023, 0.019,
)  # fmt: skip
# Close to Zipf's own law (1), and above it, so that the hottest rows keep a fixed share however large the table.
ZIPF_EXPONENT = 1.05


def uniform(tables: int, rows: int, accesses: int, seed: int) -> list[Ids]:
    """Every row alike: the worst case for any cache."""
    random = np.random.default_rng(seed)
    return list(random.integers(0, rows, (tables, accesses)))


def zipf(tables: int, rows: int, accesses: int, seed: int) -> list[Ids]:
    """The row of rank r with a probability proportional to r to the power of -`ZIPF_EXPONENT`."""
    random = np.random.default_rng(seed)
    cumulative = np.cumsum(np.arange(1, rows + 1, dtype=np.float64) ** -ZIPF_EXPONENT)
    cumulative /= cumulative[-1]
    # Without the last sum, so that no rounding of a draw leads past the last rank.
    return [random.permutation(rows)[np.searchsorted(cumulative[:-1], random.random(accesses))] for _ in range(tables)]


def calibrated(tables: int, rows: int, accesses: int, seed: int) -> list[Ids]:
    """Traces whose reuse histogram, over all tables together, is `META_REUSE_SHARES`: about `accesses` ids per table.

    How often each row is used is drawn first (log-uniform within its bucket), the uses are dealt to the tables and
    shuffled: nothing is left to the chance of sampling, so the histogram is met up to the granularity of single rows.
    The hottest bucket needs a few million accesses in all to hold its share. Traces differ in length, as
    tables with hotter rows are used more. Raises `ValueError` where the tables have too few rows for so many accesses.
    """
    random = np.random.default_rng(seed)
    counts = np.sort(np.concatenate([_uses(random, k, share * accesses * tables) for k, share in enumerate(META_REUSE_SHARES)]))
    # Dealt from the hottest on, to and fro, so that every table gets rows of every bucket and the lengths stay close.
    padded = np.zeros(-(-len(counts) // tables) * tables, np.int64)
    padded[: len(counts)] = counts[::-1]
    hands = padded.reshape(-1, tables)
    hands[1::2] = hands[1::2, ::-1]
    if len(hands) > rows:
        raise ValueError(f"rows: found {rows}; allowed: at least {len(hands)} for {accesses} accesses per table")
    traces = []
    for uses in hands.T:
        places = random.permutation(rows)[: len(uses)]
        traces.append(random.permutation(np.repeat(places, uses)))
    return traces


def _uses(random: np.random.Generator, bucket: int, accesses: float) -> Ids:
    """Uses per row of bucket `(2^(k-1), 2^k]`, adding up to `accesses` less at most one row."""
    low = 0 if bucket == 0 else 1 << (bucket - 1)
    drawn = np.floor(2.0 ** (bucket - 1 + random.random(int(accesses / (low + 1)) + 1))).astype(np.int64) + 1
    drawn = np.clip(drawn, low + 1, 1 << bucket)
    kept = int(np.searchsorted(np.cumsum(drawn), accesses, side="right"))
    uses: Ids = drawn[:kept]
    return uses


GENERATORS: dict[str, Callable[[int, int, int, int], list[Ids]]] = {"uniform": uniform, "zipf": zipf, "calibrated": calibrated}
