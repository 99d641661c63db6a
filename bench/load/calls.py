"""Python functions as a load: whole models in this process, for instance."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sidepool.bench.load.target import NOT_SENT, OK, OUTCOMES, Driver, check_at_once
from sidepool.wire.errors import SidepoolError

# From the start of a run to its first moment: threads are there by then.
_LEAD_NS = 20_000_000
# How long a sleeping caller may fail to notice that it was stopped.
_NAP_S = 0.1


class CallTarget:
    """Functions that answer request `i`, one for each thread that may call at once (a `Pipeline` belongs to one thread)."""

    def __init__(self, callers: Sequence[Callable[[int], object]], requests: int) -> None:
        """`callers[k](i)` answers request `i` of `requests`, or raises; errors are counted by their code."""
        check_at_once("callers", len(callers))
        self._callers, self._requests = list(callers), requests
        self._statuses: dict[str, int] = {}
        self._lock = threading.Lock()

    @property
    def requests(self) -> int:
        return self._requests

    def driver(self) -> Driver:
        return _CallDriver(self._callers, self._status)

    def status_name(self, status: int) -> str:
        return OUTCOMES.get(status) or next(code for code, number in self._statuses.items() if number == status)

    def describe(self) -> dict[str, Any]:
        return {"kind": "in-process calls", "requests": self._requests, "callers": len(self._callers)}

    def close(self) -> None:
        """The functions are their owner's."""

    def _status(self, error: Exception) -> int:
        name = error.code if isinstance(error, SidepoolError) else type(error).__name__
        with self._lock:
            return self._statuses.setdefault(name, 256 * (1 + len(self._statuses)))


class _CallDriver:
    def __init__(self, callers: Sequence[Callable[[int], object]], status_of: Callable[[Exception], int]) -> None:
        self._callers, self._status_of = callers, status_of
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._next = self._busy = self._most_busy = 0
        self._examples: dict[int, str] = {}

    def run(
        self,
        due_ns: NDArray[np.int64],
        request: NDArray[np.int32],
        sent_ns: NDArray[np.int64],
        done_ns: NDArray[np.int64],
        status: NDArray[np.int32],
        drain_ns: int,
    ) -> dict[str, int]:
        start_ns = time.monotonic_ns() + _LEAD_NS
        end_ns = start_ns + int(due_ns[-1]) + drain_ns

        def call_in_turn(answer: Callable[[int], object]) -> None:
            while (i := self._take()) < due_ns.size:
                self._wait_until(start_ns + int(due_ns[i]))
                now_ns = time.monotonic_ns()
                outcome = NOT_SENT
                if not self._stopped.is_set() and now_ns < end_ns:
                    sent_ns[i] = now_ns - start_ns
                    outcome = self._call(answer, int(request[i]))
                done_ns[i] = time.monotonic_ns() - start_ns
                status[i] = outcome

        threads = [threading.Thread(target=call_in_turn, args=(answer,), daemon=True) for answer in self._callers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return {"start_ns": start_ns, "most_outstanding": self._most_busy, "most_bytes": 0, "reconnects": 0}

    def stop(self) -> None:
        self._stopped.set()

    def examples(self) -> dict[int, str]:
        return self._examples

    def _take(self) -> int:
        with self._lock:
            self._next += 1
            return self._next - 1

    def _wait_until(self, due_ns: int) -> None:
        while not self._stopped.is_set() and (left_ns := due_ns - time.monotonic_ns()) > 0:
            time.sleep(min(left_ns / 1e9, _NAP_S))

    def _call(self, answer: Callable[[int], object], request: int) -> int:
        with self._lock:
            self._busy += 1
            self._most_busy = max(self._most_busy, self._busy)
        try:
            answer(request)
            return OK
        except Exception as e:
            status = self._status_of(e)
            self._examples.setdefault(status, str(e))
            return status
        finally:
            with self._lock:
                self._busy -= 1
