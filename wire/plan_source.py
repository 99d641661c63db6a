"""Where a deployment's present plan is found: read at start, watched by whoever follows it, replaced when it changes."""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from sidepool.wire.config import dump_yaml
from sidepool.wire.durable import replace_text
from sidepool.wire.errors import PlanError
from sidepool.wire.plan import Plan, load_plan

# A file is looked at this often: a `stat` costs microseconds, and old and new plan are both served for far longer.
POLL_S = 1.0


class PlanSource(Protocol):
    """One place that holds one plan at a time. Thread-safe; whoever makes it closes it.

    A plan is told from another by its fingerprint. Readers see the old plan or the new one, never a mix. When the place is
    out of reach its readers go on with the plan they have: `read` and `wait` raise, and may be called again.
    """

    def read(self) -> Plan:
        """The present plan, validated. Raises `PlanError` where there is none or it is wrong, `TransportError` out of reach."""

    def wait(self, known: Plan, timeout_s: float) -> Plan | None:
        """Wait until the present plan is another than `known` and return it; None after `timeout_s`, or once closed.

        Raises as `read`, once for each content that is wrong; then it waits for the next.
        """

    def replace(self, expected: Plan, new: Plan) -> None:
        """Put `new` in the place of `expected`, at once for all readers. Does nothing where `new` is there already.

        Raises `PlanError` where the present plan is neither of the two, or the place cannot be written: nothing has changed then.
        """

    def close(self) -> None:
        """End every `wait`. Idempotent."""


class FilePlanSource:
    """A plan file (`plan.yaml`), looked at once a second."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._closed = threading.Event()
        self._seen: tuple[int, ...] = ()
        """What of the file has been read last, wrong content included."""

    def read(self) -> Plan:
        return load_plan(self.path)

    def wait(self, known: Plan, timeout_s: float) -> Plan | None:
        ends = time.monotonic() + timeout_s
        while not self._closed.is_set():
            seen = self._identity()
            if seen != self._seen:
                self._seen = seen
                plan = self.read()
                if plan.fingerprint != known.fingerprint:
                    self._seen = ()  # until the caller knows it, it is found again
                    return plan
            left = ends - time.monotonic()
            if left <= 0:
                break
            self._closed.wait(min(POLL_S, left))
        return None

    def replace(self, expected: Plan, new: Plan) -> None:
        path = self.path.resolve()  # a link goes on leading to the file
        try:
            with _lock(path.parent):
                present = self.read()
                if present.fingerprint == new.fingerprint:
                    return
                if present.fingerprint != expected.fingerprint:
                    raise PlanError(f"{self.path}: epoch: found {present.epoch}, another plan; allowed: {expected.epoch}")
                replace_text(path, dump_yaml(new))
        except OSError as e:
            raise PlanError(f"{self.path}: cannot be replaced: {e}") from e

    def close(self) -> None:
        self._closed.set()

    def _identity(self) -> tuple[int, ...]:
        try:
            found = self.path.stat()
        except OSError:
            return (0,)
        return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size


@contextmanager
def _lock(directory: Path) -> Iterator[None]:
    """One replacement at a time; a process that ends loses its lock."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
