"""The highest rate at which a limit is met, found by trying rates."""

from __future__ import annotations

from collections.abc import Callable, Generator

Meets = Callable[[float], bool]
"""Whether the limit is met at a rate, in requests per second. Asked for one rate at a time, as seldom as possible."""
Search = Generator[float, bool, float]
"""Yields rates to try, is sent whether they met the limit, returns the highest that did; 0 where none did."""

# Rates are bracketed by steps of this ratio, then the bracket is halved until its ends are this close: what a few hundred
# requests can tell apart.
STEP, PRECISION = 1.5, 1.06
# Below so many requests per second nothing is served: the limit is shorter than an answer takes.
LEAST = 0.2


def search(start: float, *, low: float = 0.0, high: float = 0.0, least: float = LEAST) -> Search:
    """Bracket and halve. `start`: a guess; low, high: rates known to meet the limit and to miss it, 0: none.

    least: a rate at which the server is all but idle; what misses the limit there meets it nowhere.
    """
    rate = max(start, least)
    while not (low and high and high / low <= PRECISION):
        if low and high:
            rate = (low * high) ** 0.5
        elif low:
            rate = max(rate, low * STEP)
        elif high:
            rate = min(rate, high / STEP)
            if rate < least:
                return 0.0
        if (yield rate):
            low = rate
        else:
            high = rate
    return low


def highest_rate(meets: Meets, start: float, least: float = LEAST) -> float:
    """The highest rate that was seen to meet the limit, 0 where none above `least` does."""
    return in_turns({"": (search(start, least=least), meets)})[""]


def better_rate(meets: Meets, beat: float, gain: float) -> float:
    """The highest rate, if it is at least `gain` times `beat`; else `beat` is not reached and the answer is 0. One try tells."""
    first = beat * gain
    if not meets(first):
        return 0.0
    return in_turns({"": (search(first * STEP, low=first), meets)})[""]


def in_turns(searches: dict[str, tuple[Search, Meets]]) -> dict[str, float]:
    """Several searches, one try of each in turn: so that none sees another machine than the others. Their results by name."""
    found: dict[str, float] = {}
    waiting = list(searches)
    answers: dict[str, bool] = {}
    while waiting:
        for name in tuple(waiting):
            going, meets = searches[name]
            try:
                rate = going.send(answers[name]) if name in answers else next(going)
            except StopIteration as done:
                found[name] = done.value
                waiting.remove(name)
                continue
            answers[name] = meets(rate)
    return found
