"""A sidecar hears which plan is in place from etcd, and lets a plan that was replaced go even where the tool cannot tell it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from sidepool.sidecar import logs
from sidepool.wire.errors import SidepoolError
from sidepool.wire.plan import Plan
from sidepool.wire.plan_source import PlanSource

# How long it waits at a time, and before it tries again.
WATCH_S = 1.0


@dataclass(frozen=True)
class InPlace:
    """The plan that a deployment is under."""

    plan: Plan


class PlanFollower:
    """A thread that reports the plan in place, and every one after it. Out of reach: nothing is reported, nothing changes."""

    def __init__(self, source: PlanSource, report: Callable[[InPlace], None]) -> None:
        """Owns `source`."""
        self._source, self._report = source, report
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="follow", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._stopped.set()
        self._source.close()
        self._thread.join()

    def _run(self) -> None:
        known: Plan | None = None
        said = ""
        while not self._stopped.is_set():
            try:
                plan = self._source.read() if known is None else self._source.wait(known, WATCH_S)
            except SidepoolError as e:
                if str(e) != said and not self._stopped.is_set():
                    said = str(e)
                    logs.error("the plan in place is not known; serving goes on", code=e.code, reason=said)
                self._stopped.wait(WATCH_S)
                continue
            said = ""
            if plan is not None:
                known = plan
                self._report(InPlace(plan))
