"""Machines on one switch, as network namespaces of this one: each has an `eth0` of a given speed and whatever runs in it.

    with star(3, Link(gbps=1, queue_bytes=256 << 10)) as (ranker, *sidecars):
        subprocess.run(ranker.command(["ping", "-c1", sidecars[0].address]))

Nothing outside is touched, and nothing has a name that could stay: a namespace lives as long as what runs in it, at least the
`cat` that holds it, whose input ends with this process however that ends. Needs root and iproute2.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

CLONE_NEWNET = 0x40000000
SWITCH = "switch"
# Tokens of a shaped link: a tenth of a millisecond, which a timer on a busy machine keeps to, and at least some whole packets.
BURST_S, LEAST_BURST_BYTES = 1e-4, 16 << 10


class CannotShape(Exception):
    """Namespaces or shaped links cannot be had here; the message says why."""


@dataclass(frozen=True)
class Link:
    """A cable between a machine and the switch, the same both ways."""

    gbps: float
    queue_bytes: int
    """What waits for the cable at either end; more is dropped, as a switch does."""


@dataclass(frozen=True)
class Machine:
    """One of the namespaces. Plain data: may be used in any process, as long as the `star` that made it lasts."""

    address: str
    """IPv4, without a port. Every port is free."""
    pid: int
    """Of the process that holds the namespace."""
    switch_pid: int
    port: str
    """The switch's end of the cable."""

    def command(self, words: Sequence[str]) -> list[str]:
        """A command line that runs `words` on this machine, as the same process (nothing is forked)."""
        return ["nsenter", f"--net=/proc/{self.pid}/ns/net", *words]

    def enter(self) -> None:
        """Move the calling thread, and those it starts from now on, to this machine. Raises `OSError`."""
        with open(f"/proc/{self.pid}/ns/net") as namespace:
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.setns(namespace.fileno(), CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), "setns")

    def received_bytes(self) -> int:
        """Bytes that came over the cable so far, Ethernet's headers included."""
        return self._counted(0)

    def sent_bytes(self) -> int:
        """Bytes that left over the cable so far, Ethernet's headers included."""
        return self._counted(8)

    def dropped_packets(self) -> int:
        """Packets for this machine that found the switch's queue full."""
        found = json.loads(_run_in(self.switch_pid, "tc", "-s", "-j", "qdisc", "show", "dev", self.port))
        return int(found[0]["drops"])

    def _counted(self, column: int) -> int:
        for line in Path(f"/proc/{self.pid}/net/dev").read_text(encoding="utf-8").splitlines():
            name, _, counters = line.partition(":")
            if name.strip() == "eth0":
                return int(counters.split()[column])
        raise CannotShape(f"namespace of process {self.pid}: its eth0 is gone")


@contextlib.contextmanager
def star(count: int, link: Link) -> Iterator[list[Machine]]:
    """`count` machines (at most 250), each on a cable of its own to one switch; gone when the block ends. Raises `CannotShape`."""
    with contextlib.ExitStack() as stack:
        switch = stack.enter_context(_held())
        _run_in(switch, "ip", "link", "add", "name", SWITCH, "type", "bridge")
        _run_in(switch, "ip", "link", "set", SWITCH, "up")
        yield [_plug_in(stack.enter_context(_held()), switch, f"port{i}", f"10.77.0.{i + 1}", link) for i in range(count)]


def _plug_in(pid: int, switch: int, port: str, address: str, link: Link) -> Machine:
    _run_in(pid, "ip", "link", "add", "eth0", "type", "veth", "peer", "name", port, "netns", str(switch))
    # Packets of the cable's size all the way, or counters and queues would see some of 64 KB with one header.
    for owner, device in ((switch, port), (pid, "eth0")):
        _run_in(owner, "ip", "link", "set", device, "addrgenmode", "none", "gso_max_segs", "1", "up")
        burst = max(LEAST_BURST_BYTES, int(link.gbps * 1e9 / 8 * BURST_S))
        shape = ("tbf", "rate", f"{link.gbps * 1e9:.0f}bit", "burst", str(burst), "limit", str(link.queue_bytes))
        _run_in(owner, "tc", "qdisc", "add", "dev", device, "root", *shape)
    _run_in(switch, "ip", "link", "set", port, "master", SWITCH)
    _run_in(pid, "ip", "link", "set", "lo", "up")
    _run_in(pid, "ip", "address", "add", f"{address}/24", "dev", "eth0")
    return Machine(address, pid, switch, port)


@contextlib.contextmanager
def _held() -> Iterator[int]:
    """A new network namespace, and the process that holds it: not in our session, so that Ctrl-C ends it through us alone."""
    words = ["unshare", "--net", "sh", "-c", "echo there && exec cat"]
    try:
        holder = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )
    except OSError as e:
        raise CannotShape(f"unshare: {e.strerror}") from e
    try:
        assert holder.stdout is not None
        if holder.stdout.readline() != b"there\n":
            raise CannotShape(holder.communicate()[1].decode(errors="replace").strip())
        yield holder.pid
    finally:
        holder.communicate()  # ends its input, and waits


def _run_in(pid: int, *words: str) -> str:
    """What a command prints in the namespace that a process holds; raises `CannotShape`."""
    try:
        done = subprocess.run(["nsenter", f"--net=/proc/{pid}/ns/net", *words], capture_output=True, text=True)
    except OSError as e:
        raise CannotShape(f"nsenter: {e.strerror}") from e
    if done.returncode != 0:
        raise CannotShape(f"{' '.join(words)}: {done.stderr.strip()}")
    return done.stdout
