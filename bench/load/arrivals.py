"""When requests arrive: arrays of int64 nanoseconds from the start, ascending, made up-front from a seed.

`rate` is the mean number of requests per second over the whole run, `seconds` its length.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sidepool.bench.load.numbers_file import read_numbers

Times = NDArray[np.int64]

# Peak and trough of a day about the mean: 1.5 and 0.5 times, three to one, as services with one main time zone see.
DIURNAL_SWING = 0.5
# The bursty arrivals' two states: one tenth of the time at five times the quiet rate, for a second on average.
BURST_RATIO, BURST_SHARE, BURST_SECONDS = 5.0, 0.1, 1.0
# Points at which the expected number of arrivals of a changing rate is known; between them it is a straight line.
_DAY_POINTS = 10_001


def poisson(rate: float, seconds: float, seed: int) -> Times:
    """Independent arrivals: gaps are exponential."""
    return _warped(np.array([0.0, seconds]), np.array([0.0, rate * seconds]), np.random.default_rng(seed))


def constant(rate: float, seconds: float, seed: int) -> Times:
    """One arrival every 1 / rate seconds, the first after one such gap; nothing is random."""
    times: Times = (np.arange(1, int(rate * seconds) + 1) * (1e9 / rate)).astype(np.int64)
    return times


def diurnal(rate: float, seconds: float, seed: int) -> Times:
    """A day compressed into the run: Poisson arrivals whose rate is a sine from trough over peak to trough."""
    times = np.linspace(0.0, seconds, _DAY_POINTS)
    turn = 2 * np.pi * times / seconds
    expected = rate * (times - DIURNAL_SWING * seconds / (2 * np.pi) * np.sin(turn))
    return _warped(times, expected, np.random.default_rng(seed))


def bursty(rate: float, seconds: float, seed: int) -> Times:
    """A Markov-modulated Poisson process of two states, quiet and burst, both of exponential length."""
    random = np.random.default_rng(seed)
    quiet_rate = rate / (1 + BURST_SHARE * (BURST_RATIO - 1))
    quiet_seconds = BURST_SECONDS * (1 - BURST_SHARE) / BURST_SHARE
    times, expected = [0.0], [0.0]
    # The chain's own long-term share decides where it begins.
    burst = random.random() < BURST_SHARE
    while times[-1] < seconds:
        stay = min(random.exponential(BURST_SECONDS if burst else quiet_seconds), seconds - times[-1])
        times.append(times[-1] + stay)
        expected.append(expected[-1] + stay * quiet_rate * (BURST_RATIO if burst else 1.0))
        burst = not burst
    return _warped(np.array(times), np.array(expected), random)


def replay(path: Path) -> Times:
    """Arrivals as they once were: a file of timestamps in seconds, in any order; the first becomes 0. Raises `ConfigError`."""
    seconds = np.sort(read_numbers(path, 0.0))
    times: Times = ((seconds - seconds[0]) * 1e9).astype(np.int64)
    return times


def _warped(times: NDArray[np.float64], expected: NDArray[np.float64], random: np.random.Generator) -> Times:
    """Poisson arrivals of a changing rate: those of rate 1, where `expected(time)` arrivals are due by `time`."""
    total = float(expected[-1])
    # Eight standard deviations more than the mean: fewer than one run in 10^14 would miss its last arrivals.
    gaps = random.exponential(1.0, int(total + 8 * np.sqrt(total) + 20))
    arrived = np.cumsum(gaps)
    seconds = np.interp(arrived[arrived < total], expected, times)
    result: Times = (seconds * 1e9).astype(np.int64)
    return result


ARRIVALS: dict[str, Callable[[float, float, int], Times]] = {
    "poisson": poisson,
    "constant": constant,
    "diurnal": diurnal,
    "bursty": bursty,
}
