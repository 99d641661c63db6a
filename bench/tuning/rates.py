"""The highest rate at which a limit is met, found by trying rates."""

from __future__ import annotations

from collections.abc import Callable

Meets = Callable[[float], bool]
"""Whether the limit is met at a rate, in requests per second. Asked for one rate at a time, as seldom as possible."""

# Rates are bracketed by steps of this ratio, then the bracket is halved until its ends are this close: what a few hundred
# requests can tell apart.
STEP, PRECISION = 1.5, 1.06
# Below so many requests per second nothing is served: the limit is shorter than an answer takes.
LEAST = 0.2


def highest_rate(meets: Meets, start: float, *, least: float = LEAST, precision: float = PRECISION) -> float:
    """The highest rate that was seen to meet the limit, 0 where none above `least` does. `start`: a guess."""
    low, high, rate = 0.0, 0.0, max(start, least)
    while True:
        if meets(rate):
            low = rate
        else:
            high = rate
        if high and low and high / low <= precision:
            return low
        if high and not low and rate <= least:
            return 0.0
        rate = (low * high) ** 0.5 if low and high else low * STEP if low else max(high / STEP, least)


def better_rate(meets: Meets, beat: float, gain: float) -> float:
    """The highest rate, if it is at least `gain` times `beat`; else `beat` is not reached and the answer is 0. One try tells."""
    return highest_rate(meets, beat * gain) if meets(beat * gain) else 0.0
