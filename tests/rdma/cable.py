"""Trouble on the cable between rxeA and rxeB (interfaces vA and vB)."""

from __future__ import annotations

import json
import subprocess
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


def dropped(interface: str = "vA") -> int:
    """Packets that `losing` has lost so far."""
    (discipline,) = json.loads(_run("tc", "-j", "-s", "qdisc", "show", "dev", interface, "root"))
    return int(discipline["drops"])


def received_packets(interface: str) -> int:
    return int(Path(f"/sys/class/net/{interface}/statistics/rx_packets").read_text())


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
