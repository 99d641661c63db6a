"""Run a load."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np

from sidepool import _native
from sidepool.bench.load.result import LoadResult
from sidepool.bench.load.schedule import Schedule
from sidepool.bench.load.target import WAITING, Target
from sidepool.wire.errors import ConfigError, error_for

# How long after the last request was due answers are waited for: more than any limit that is served.
DRAIN_S = 10.0
# The time between two looks of a view.
VIEW_PERIOD_S = 0.5

View = Callable[[LoadResult], None]


def run_load(
    target: Target,
    schedule: Schedule,
    *,
    warmup_s: float = 0.0,
    slo_ms: float | None = None,
    drain_s: float = DRAIN_S,
    view: View | None = None,
) -> LoadResult:
    """Put `schedule` on `target`, and return what came of it.

    An open loop: every request leaves when it is due, whatever is outstanding, and its latency runs from then. Returns when all is
    answered, at the latest `drain_s` after the last was due; what is not answered then is counted so.
    warmup_s: requests due earlier are sent but not reported. slo_ms: the limit that goodput is about.
    view: called now and then in this thread with what is known so far; the arrays go on changing (`WAITING`: not over).
    Raises `TransportError` (nobody there to begin with), `ConfigError`. Ctrl-C stops the load and is passed on.
    """
    if not 0 <= warmup_s < schedule.seconds:
        raise ConfigError(f"warmup_s: found {warmup_s}; allowed: from 0, below the run's {schedule.seconds:g} s")
    count = len(schedule)
    sent_ns, done_ns = np.full(count, -1, np.int64), np.full(count, -1, np.int64)
    status = np.full(count, WAITING, np.int32)
    try:
        driver = target.driver()
    except _native.NativeError as e:
        raise _explained(e) from e
    totals: dict[str, int] = {}
    failures: list[BaseException] = []

    def drive() -> None:
        try:
            totals.update(driver.run(schedule.due_ns, schedule.request, sent_ns, done_ns, status, int(drain_s * 1e9)))
        except BaseException as e:
            failures.append(e)

    def result() -> LoadResult:
        names = {int(s): target.status_name(int(s)) for s in np.unique(status) if s != WAITING}
        examples = {target.status_name(s): text for s, text in driver.examples().items() if text} if totals else {}
        about = target.describe()
        return LoadResult(schedule, sent_ns, done_ns, status, warmup_s, slo_ms, names, examples, totals, about)

    thread = threading.Thread(target=drive, name="sidepool-load", daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(VIEW_PERIOD_S)
            if view is not None and thread.is_alive():
                view(result())
    finally:
        driver.stop()
        thread.join()
    if failures:
        raise _explained(failures[0])
    return result()


def _explained(failure: BaseException) -> BaseException:
    return error_for(*failure.args) if isinstance(failure, _native.NativeError) else failure
