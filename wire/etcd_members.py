"""Which sidecars of a deployment are there, where, and what they answer: keys in etcd that live as long as their owners."""

from __future__ import annotations

import json
import logging

from sidepool.wire.config import FormatVersion, Frozen, decode
from sidepool.wire.errors import SidepoolError
from sidepool.wire.etcd import Etcd, Snapshot
from sidepool.wire.etcd_watch import EtcdWatch
from sidepool.wire.plan import Name

_log = logging.getLogger("sidepool.wire")


class Member(Frozen):
    """What a sidecar says of itself, `PREFIX/sidecars/NAME`."""

    version: FormatVersion = 1
    name: Name
    address: str
    """`host:port` of its control plane."""
    state: str
    """loading, serving or draining."""
    epochs: tuple[int, ...]
    """Of the plans it answers, the newest first."""


def members_key(prefix: str) -> str:
    """What the keys of all members begin with."""
    return f"{prefix}/sidecars/"


def members_of(snapshot: Snapshot) -> dict[str, Member]:
    """The members in a snapshot, by name; what cannot be read is left out, and logged."""
    found = {}
    for key, item in snapshot.items.items():
        try:
            member = decode(json.loads(item.value), Member, where=f"{key} in etcd")
        except (ValueError, SidepoolError) as e:
            _log.warning("%s is passed over: %s", key, e)
            continue
        found[member.name] = member
    return found


class EtcdMembers:
    """Follows the members of a deployment. Without etcd, those seen last stay: nobody is given up because etcd is away."""

    def __init__(self, etcd: Etcd, prefix: str) -> None:
        """Owns `etcd`."""
        self._etcd = etcd
        self._members: dict[str, Member] = {}
        self._watch = EtcdWatch(etcd, members_key(prefix), self._found, lambda fault: None, prefix=True)

    def address(self, name: str) -> str | None:
        """Where a sidecar is, or None where it is not listed. Any thread; never waits."""
        member = self._members.get(name)
        return None if member is None else member.address

    def close(self) -> None:
        """Stop following. Idempotent."""
        self._etcd.close()  # first: whatever the watch waits for ends
        self._watch.close()

    def _found(self, snapshot: Snapshot) -> None:
        self._members = members_of(snapshot)
