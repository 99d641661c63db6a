"""A sidecar's entry in etcd, kept alive by a lease as long as the process runs, and gone with it."""

from __future__ import annotations

import threading
from collections.abc import Callable

from sidepool.sidecar import logs
from sidepool.sidecar.serving import Serving
from sidepool.wire.coordination import Coordination
from sidepool.wire.errors import ConfigError, Overloaded, SidepoolError
from sidepool.wire.etcd_members import Member, members_key, members_of

# Two signs of life may be lost before the lease runs out.
SIGNS_PER_LEASE = 3


class Membership:
    """A thread that keeps the entry; nothing else depends on it. Where etcd is away, it is made again after its return."""

    def __init__(self, coordination: Coordination, address: str, serving: Serving) -> None:
        """address: `host:port` under which others reach the control plane."""
        self._coordination, self._address, self._serving = coordination, address, serving
        self._key = members_key(coordination.prefix) + serving.name
        self._etcd = coordination.connect()
        self._lease = 0
        """0: none."""
        self._put: Member | None = None
        self._said = ""
        self._stopped = False
        self._woken = threading.Event()
        self._thread = threading.Thread(target=self._run, name="membership", daemon=True)
        self._thread.start()

    def update(self) -> None:
        """What the entry says may have changed."""
        self._woken.set()

    def close(self) -> None:
        """Remove the entry, and end the thread."""
        self._stopped = True
        self._woken.set()
        self._thread.join()
        self._etcd.close()

    def _run(self) -> None:
        while not self._stopped:
            self._woken.clear()
            self._attempt(self._sign)
            self._woken.wait(self._coordination.lease_s / SIGNS_PER_LEASE)
        if self._lease and not self._said:
            self._attempt(lambda: self._etcd.revoke(self._lease))

    def _attempt(self, step: Callable[[], None]) -> None:
        try:
            step()
        except SidepoolError as e:
            if str(e) != self._said:
                self._said = str(e)
                logs.error("not listed in etcd; serving goes on", code=e.code, reason=str(e))

    def _sign(self) -> None:
        """Keep the lease, or take a new one, and have the entry say what is true now."""
        if self._lease and not self._etcd.keep_alive(self._lease):
            self._lease = 0
        if not self._lease:
            self._lease, self._put = self._etcd.grant(self._coordination.lease_s), None
        member = Member(
            name=self._serving.name,
            address=self._address,
            state=self._serving.state,
            epochs=tuple(p.plan.epoch for p in self._serving.plans),
        )
        if member != self._put:
            self._claim(member)
            self._put = member
            logs.info("listed in etcd", key=self._key, state=member.state, epochs=list(member.epochs))
        self._said = ""

    def _claim(self, member: Member) -> None:
        """Put the entry, in the place of an own one or of one at the same address, which a process before this one left."""
        snapshot = self._etcd.read(self._key)
        found = snapshot.items.get(self._key)
        if found is not None and found.lease != self._lease:
            other = members_of(snapshot).get(member.name)
            if other is not None and other.address != member.address:
                raise ConfigError(f"name: found {member.name!r}, which another sidecar has, at {other.address}; allowed: its own")
        seen = found.mod_revision if found is not None else 0
        if not self._etcd.swap(self._key, member.model_dump_json().encode(), seen=seen, lease=self._lease):
            raise Overloaded(f"{self._key} in etcd: changed at the same moment")
