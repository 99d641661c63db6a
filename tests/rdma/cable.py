"""Trouble on the cable between rxeA and rxeB (interfaces vA and vB), and a device that may be removed."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def losing(percent: float, interface: str = "vA") -> Iterator[None]:
    """What leaves `interface` is lost with this probability."""
    _run("tc", "qdisc", "add", "dev", interface, "root", "netem", "loss", f"{percent}%")
    try:
        yield
    finally:
        _run("tc", "qdisc", "del", "dev", interface, "root")


@contextmanager
def link_down(interface: str = "vA") -> Iterator[None]:
    """The link is down. Routes go with it, so they are put back as tests/guest/main makes them."""
    table = {"vA": "101", "vB": "102"}[interface]
    _run("ip", "link", "set", interface, "down")
    try:
        yield
    finally:
        _run("ip", "link", "set", interface, "up")
        _run("ip", "route", "replace", "10.9.0.0/24", "dev", interface, "table", table)


@contextmanager
def removable_device() -> Iterator[tuple[str, str]]:
    """(name, interface) of a device like rxe0, gone at the end if not before."""
    device, interface = "rxeR", "dummyR"
    _run("ip", "link", "add", interface, "type", "dummy")
    try:
        _run("ip", "link", "set", interface, "mtu", "9000", "up")
        _run("ip", "addr", "add", "10.78.0.1/24", "dev", interface)
        _run("rdma", "link", "add", device, "type", "rxe", "netdev", interface)
        # The kernel fills the address in a moment after the device appears.
        gid = Path(f"/sys/class/infiniband/{device}/ports/1/gids/1")
        for _ in range(100):
            if ":ffff:" in gid.read_text():
                break
            time.sleep(0.1)
        yield device, interface
    finally:
        subprocess.run(["ip", "link", "delete", interface], check=False, stderr=subprocess.DEVNULL)


def dropped(interface: str = "vA") -> int:
    """Packets that `losing` has lost so far."""
    (discipline,) = json.loads(_run("tc", "-j", "-s", "qdisc", "show", "dev", interface, "root"))
    return int(discipline["drops"])


def received_packets(interface: str) -> int:
    return int(Path(f"/sys/class/net/{interface}/statistics/rx_packets").read_text())


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
