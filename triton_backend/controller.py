"""Adjusts how far batches are split while requests flow: over cores while these have time, less when work queues up.

Triton does not tell a Python model how long requests waited. What is known here is when batches began and ended: the mean
wait follows from that as in a queue with one server, rate · E[S²] / (2 · (1 - busy)) (Pollaczek and Khinchine).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

# A decision takes a second and so many batches: enough for a 95th percentile.
WINDOW_NS = 1_000_000_000
WINDOW_BATCHES = 20
# Queue delay as a share of the limit. Above the first, throughput counts; below the second, cores are idle and latency counts.
# Between them nothing changes, so that no load makes it go to and fro.
HIGH, LOW = 0.2, 0.02
# So many windows in a row must want the same; a step is judged so many windows later.
PATIENCE, SETTLE = 3, 3
# A step that made the tail so much longer under about the same load is taken back, and not tried again for so many windows.
WORSE, SAME_LOAD, BARRED = 1.1, 0.2, 60
# Beyond a busy share this close to 1 the formula says nothing but "much".
MOST_BUSY = 0.99


@dataclass(frozen=True)
class Window:
    """What one window of batches looked like."""

    rate: float
    queue_ms: float
    tail_ms: float
    """Mean wait and the 95th percentile of a batch's own time."""


@dataclass
class _Step:
    """The last change: its direction, what there was before it, and the windows until it is judged."""

    direction: int
    split_samples: int
    before: Window
    left: int


class SplitController:
    """Belongs to the thread that runs batches. `split_samples` doubles or halves between `least` and `most`."""

    def __init__(
        self, *, limit_ms: float, split_samples: int, least: int, most: int, clock: Callable[[], int] = time.monotonic_ns
    ) -> None:
        self.split_samples = split_samples
        self._limit_ms, self._least, self._most, self._clock = limit_ms, least, most, clock
        self._began_ns = clock()
        self._times_ns: list[int] = []
        self._wanted, self._streak = 0, 0
        self._barred = {1: 0, -1: 0}
        self._last: _Step | None = None

    def observe(self, elapsed_ns: int) -> str | None:
        """A batch took so long. Returns what was done, `up`, `down` or `back`, when `split_samples` has changed."""
        self._times_ns.append(elapsed_ns)
        passed_ns = self._clock() - self._began_ns
        if passed_ns < WINDOW_NS or len(self._times_ns) < WINDOW_BATCHES:
            return None
        window = self._close(passed_ns)
        self._barred = {direction: max(0, left - 1) for direction, left in self._barred.items()}
        if self._last is not None:
            return self._judge(self._last, window)
        wanted = 1 if window.queue_ms > HIGH * self._limit_ms else -1 if window.queue_ms < LOW * self._limit_ms else 0
        self._streak = self._streak + 1 if wanted == self._wanted else 1
        self._wanted = wanted
        if wanted == 0 or self._streak < PATIENCE or self._barred[wanted]:
            return None
        return self._step(wanted, window)

    def _close(self, passed_ns: int) -> Window:
        times = sorted(self._times_ns)
        rate = len(times) / passed_ns
        busy = min(sum(times) / passed_ns, MOST_BUSY)
        queue_ns = rate * (sum(t * t for t in times) / len(times)) / (2 * (1 - busy))
        self._began_ns += passed_ns
        self._times_ns.clear()
        return Window(rate, queue_ns / 1e6, (queue_ns + times[int(0.95 * len(times))]) / 1e6)

    def _step(self, direction: int, window: Window) -> str | None:
        changed = min(max(self.split_samples * 2 if direction > 0 else self.split_samples // 2, self._least), self._most)
        if changed == self.split_samples:
            return None
        self._last = _Step(direction, self.split_samples, window, SETTLE)
        self.split_samples = changed
        return "up" if direction > 0 else "down"

    def _judge(self, step: _Step, window: Window) -> str | None:
        step.left -= 1
        if step.left:
            return None
        self._last, self._streak = None, 0
        longer = window.tail_ms > WORSE * step.before.tail_ms
        if not longer or abs(window.rate / step.before.rate - 1) > SAME_LOAD:
            return None
        self.split_samples = step.split_samples
        self._barred[step.direction] = BARRED
        return "back"
