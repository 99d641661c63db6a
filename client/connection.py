"""A client's lanes under one plan, and the change from one plan to the next while lookups go on."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from sidepool import _native
from sidepool.client.lanes import LaneOptions, Lanes
from sidepool.wire.errors import LookupRejected, SidepoolError
from sidepool.wire.plan import OnMissingShard, OutOfRange, Plan, Pooling, check_successor
from sidepool.wire.plan_source import PlanSource

# How long a follower waits for its source at a time, and before it tries again to reach the sidecars of a new plan.
WATCH_S = 1.0
# How often it looks whether the last lookup under the old plan has ended.
IDLE_POLL_S = 0.01

_log = logging.getLogger("sidepool.client")


class Connection:
    """Lanes to the sidecars of one plan, and the lookups under way on them."""

    def __init__(self, plan: Plan, options: LaneOptions, spin_us: int, fixed_columns: Sequence[tuple[int, int]] | None) -> None:
        options.check(plan)
        self.plan = plan
        self.degrades = plan.on_missing_shard is OnMissingShard.DEGRADE
        self.sequence_features = [i for i, f in enumerate(plan.features) if f.pooling is Pooling.NONE]
        self.peers = options.peers(plan)
        self.sidecars = ("local",) if options.lane == "local" else tuple(s.name for s in plan.sidecars)
        self.columns = _columns(plan, fixed_columns)
        self.under_way: deque[None] = deque()
        """As long as the lookups under way: appending and popping are atomic, and take no lock."""
        self.native = _native.LookupClient(
            epoch=plan.epoch,
            sidecars=len(self.peers),
            spin_us=spin_us,
            degrade=self.degrades,
            # An id that is nothing but padding lies behind the last row.
            rows=np.array(
                [t.rows + (f.padding_index == t.rows) for f, t in zip(plan.features, plan.feature_tables, strict=True)], np.int64
            ),
            dims=np.array([t.dim for t in plan.feature_tables], np.int32),
            poolings=[str(f.pooling) for f in plan.features],
            weighted=[f.weighted for f in plan.features],
            # Words of a record are no rows of its table.
            out_of_range=[str(t.out_of_range if t.program is None else OutOfRange.ZERO) for t in plan.feature_tables],
            legs=options.legs(plan),
            default_rows=[t.default_row for t in plan.feature_tables],
            padding=[-1 if f.padding_index is None else f.padding_index for f in plan.features],
            ranker_pooling=options.pooling == "ranker",
            hedge_budget=options.hedge_budget,
            window_delay_us=options.window_delay_us,
            max_ids=options.max_ids,
        )
        if fixed_columns is not None:
            begins, ends = np.array(self.columns, np.int32).T
            self.native.set_fixed_columns(np.ascontiguousarray(begins), np.ascontiguousarray(ends - begins))
        self._lanes = Lanes(self.native, plan, options)

    def connect(self) -> None:
        """Attach the lanes; raises as `Lanes.connect`, with everything closed again."""
        try:
            self._lanes.connect()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close every lane; lookups that wait fail. Idempotent."""
        self._lanes.close()


class Connections:
    """The connection that new lookups take. Where there is a plan source, a thread follows it: a new plan is connected beside
    the old one, and takes its place once all its sidecars are ready; the old one is closed when its last lookup has ended.

    `enter` is called by any thread; a lookup belongs to the connection that it got, from its beginning to its end.
    """

    def __init__(
        self,
        plan: Plan,
        options: LaneOptions,
        spin_us: int,
        fixed_columns: Sequence[tuple[int, int]] | None,
        source: PlanSource | None,
    ) -> None:
        """Connect to `plan`, and follow `source` from then on; owns it."""
        self._options, self._spin_us, self._fixed_columns = options, spin_us, fixed_columns
        self._source = source
        self._stopped = threading.Event()
        self._follower: threading.Thread | None = None
        self._said = ""
        self.current = Connection(plan, options, spin_us, fixed_columns)
        self.current.connect()
        if source is not None:
            self._follower = threading.Thread(target=self._follow, name="sidepool-plan", args=(source,), daemon=True)
            self._follower.start()

    def enter(self) -> Connection:
        """The connection for one lookup, which ends with `connection.under_way.pop()`."""
        while True:
            connection = self.current
            connection.under_way.append(None)
            # A connection that is current here is not closed before the lookup has ended: whoever replaces it looks after that.
            if self.current is connection:
                return connection
            connection.under_way.pop()

    def close(self) -> None:
        """Stop following and close every lane. Idempotent. A plan that is being connected is given up first."""
        self._stopped.set()
        if self._source is not None:
            self._source.close()
        self.current.close()
        if self._follower is not None and self._follower is not threading.current_thread():
            self._follower.join()
        self.current.close()

    def _follow(self, source: PlanSource) -> None:
        while not self._stopped.is_set():
            try:
                plan = source.wait(self.current.plan, WATCH_S)
                if plan is not None:
                    self._change_to(plan)
                    self._said = ""
            except SidepoolError as e:
                self._say(str(e))
                self._stopped.wait(WATCH_S)
            except Exception as e:  # a thread has no caller, and lookups have a plan
                self._say(f"{type(e).__name__}: {e}")
                self._stopped.wait(WATCH_S)

    def _change_to(self, plan: Plan) -> None:
        """New lookups are under `plan` from now on; raises, with nothing changed, where that cannot be yet."""
        old = self.current
        check_successor(old.plan, plan)
        # A sidecar that is not ready would be asked and fail, while those of the old plan still answer.
        new = Connection(plan, replace(self._options, require_all=True), self._spin_us, self._fixed_columns)
        new.connect()
        self.current = new
        _log.info("lookups are under plan epoch %d from now on; before: %d", plan.epoch, old.plan.epoch)
        while old.under_way and not self._stopped.is_set():
            time.sleep(IDLE_POLL_S)
        old.close()

    def _say(self, text: str) -> None:
        if text != self._said:
            self._said = text
            _log.warning("the plan before (epoch %d) is used on: %s", self.current.plan.epoch, text)


def _columns(plan: Plan, fixed_columns: Sequence[tuple[int, int]] | None) -> list[tuple[int, int]]:
    if fixed_columns is None:
        return [(i, i + 1) for i in range(len(plan.features))]
    columns = list(fixed_columns)
    if len(columns) != len(plan.features) or any(not 0 <= begin < end for begin, end in columns):
        raise LookupRejected(
            f"fixed_columns: found {columns[:8]}; allowed: one (begin, end) with 0 <= begin < end per feature of the plan"
        )
    return columns
