"""The plan of a deployment in etcd: under one key, compressed, replaced by compare and swap, watched."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

from sidepool.wire.errors import PlanError, SidepoolError, TransportError
from sidepool.wire.etcd import Etcd, Snapshot
from sidepool.wire.etcd_watch import EtcdWatch
from sidepool.wire.plan import Plan, check_successor, load_plan, pack_plan, unpack_plan

# What etcd takes in one request by default, less some room for the key.
MAX_VALUE_BYTES = (3 << 19) - 4096

_log = logging.getLogger("sidepool.wire")


class EtcdPlanSource:
    """`PREFIX/plan` in etcd, as a `PlanSource`. Where etcd holds no plan, that of the fallback file holds."""

    def __init__(self, etcd: Etcd, prefix: str, fallback: Path | None = None) -> None:
        """Owns `etcd`. fallback: also what is read at a start without etcd."""
        self.key = f"{prefix}/plan"
        self._etcd, self._fallback = etcd, fallback
        self._changed = threading.Condition()
        self._watch: EtcdWatch | None = None
        self._closed = False
        self._present: Plan | None = None
        self._wrong: SidepoolError | None = None
        """Of content that nobody has been told about yet."""
        self._lost: SidepoolError | None = None
        """Why etcd cannot be reached; None while it can."""

    def read(self) -> Plan:
        """The present plan; of the fallback file where etcd has none or cannot be reached."""
        try:
            plan = self._decoded(self._etcd.read(self.key))
        except TransportError as e:
            if self._fallback is None or not self._fallback.exists():
                raise
            _log.warning("%s; %s is taken until it can be reached", e, self._fallback)
            plan = None
        if plan is not None:
            return plan
        if self._fallback is None:
            raise PlanError(f"{self.key} in etcd: missing; publish one: sidepool etcd publish plan.yaml")
        return load_plan(self._fallback)

    def wait(self, known: Plan, timeout_s: float) -> Plan | None:
        """As `PlanSource.wait`. No plan in etcd is no change; out of reach, `TransportError` after `timeout_s`."""
        ends = time.monotonic() + timeout_s
        with self._changed:
            if self._watch is None and not self._closed:
                self._watch = EtcdWatch(self._etcd, self.key, self._found, self._out_of_reach)
            while not self._closed:
                if self._wrong is not None:
                    wrong, self._wrong = self._wrong, None
                    raise wrong
                if self._present is not None and self._present.fingerprint != known.fingerprint:
                    return self._present
                left = ends - time.monotonic()
                if left <= 0:
                    if self._lost is not None:
                        raise TransportError(str(self._lost)) from self._lost
                    break
                self._changed.wait(left)
        return None

    def replace(self, expected: Plan, new: Plan) -> None:
        """As `PlanSource.replace`; where etcd holds no plan, `expected` must be that of the fallback file."""
        snapshot = self._etcd.read(self.key)
        found = self._decoded(snapshot)
        present = found if found is not None or self._fallback is None else load_plan(self._fallback)
        if found is not None and found.fingerprint == new.fingerprint:
            return
        if present is None or present.fingerprint != expected.fingerprint:
            said = "no plan" if present is None else f"{present.epoch}, another plan"
            raise PlanError(f"{self.key} in etcd: epoch: found {said}; allowed: {expected.epoch}")
        self._put(new, snapshot)

    def publish(self, new: Plan) -> Plan | None:
        """Put `new` in the place of whatever is there, if it may follow that; returns what was there."""
        snapshot = self._etcd.read(self.key)
        found = self._decoded(snapshot)
        if found is not None and found.fingerprint == new.fingerprint:
            return found
        if found is not None:
            check_successor(found, new)
        self._put(new, snapshot)
        return found

    def close(self) -> None:
        """End every `wait`, and the connection to etcd. Idempotent."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            watch, self._watch = self._watch, None
        self._etcd.close()  # first: whatever the watch waits for ends
        if watch is not None:
            watch.close()

    def _put(self, new: Plan, snapshot: Snapshot) -> None:
        value = pack_plan(new)
        if len(value) > MAX_VALUE_BYTES:
            raise PlanError(f"{self.key} in etcd: {len(value)} bytes compressed; allowed: at most {MAX_VALUE_BYTES}")
        seen = snapshot.items[self.key].mod_revision if self.key in snapshot.items else 0
        if not self._etcd.swap(self.key, value, seen=seen):
            # Another one was faster, or an answer was lost and this is what had been put.
            present = self._decoded(self._etcd.read(self.key))
            if present is None or present.fingerprint != new.fingerprint:
                raise PlanError(f"{self.key} in etcd: another plan was put at the same moment; nothing has been replaced")

    def _decoded(self, snapshot: Snapshot) -> Plan | None:
        if self.key not in snapshot.items:
            return None
        return unpack_plan(snapshot.items[self.key].value, f"{self.key} in etcd")

    def _found(self, snapshot: Snapshot) -> None:
        present, wrong = self._present, None
        try:
            present = self._decoded(snapshot) or present
        except PlanError as e:
            wrong = e
        with self._changed:
            self._present, self._wrong, self._lost = present, wrong, None
            self._changed.notify_all()

    def _out_of_reach(self, fault: SidepoolError) -> None:
        with self._changed:
            self._lost = fault

