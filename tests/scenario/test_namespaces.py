"""Machines in network namespaces: their cables have the speed asked for and count what passes; nothing of them stays."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sidepool.bench.namespaces import CannotShape, Link, Machine, star

LINK = Link(gbps=0.1, queue_bytes=64 << 10)
PORT, SENT_BYTES = 5000, 2_000_000
PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def machines() -> Iterator[list[Machine]]:
    try:
        with star(3, LINK) as found:
            yield found
    except CannotShape as e:
        pytest.skip(str(e))


def together(*calls: Callable[[], None]) -> None:
    """Every call on a thread of its own."""
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_what_passes_a_cable_is_counted_whole_and_takes_its_time(machines: list[Machine]) -> None:
    here, there, _ = machines
    listening, received = threading.Event(), []

    def receive() -> None:
        here.enter()
        with socket.create_server((here.address, PORT)) as server:
            listening.set()
            with server.accept()[0] as connection:
                while count := len(connection.recv(1 << 16)):
                    received.append(count)

    def send() -> None:
        there.enter()
        assert listening.wait(PATIENCE_S)
        with socket.create_connection((here.address, PORT)) as connection:
            connection.sendall(bytes(SENT_BYTES))

    before, began = here.received_bytes(), time.monotonic()
    together(receive, send)
    assert sum(received) == SENT_BYTES
    assert time.monotonic() - began > 0.9 * SENT_BYTES * 8 / (LINK.gbps * 1e9)
    # 1,448 bytes of a packet of 1,514 are data; with packets of 64 KB the counter would have next to nothing but data.
    assert here.received_bytes() - before > 1.04 * SENT_BYTES


def test_a_queue_that_two_fill_at_once_drops_and_says_so(machines: list[Machine]) -> None:
    here, *others = machines

    def flood(machine: Machine) -> None:
        machine.enter()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            for _ in range(2000):
                sender.sendto(bytes(1000), (here.address, PORT))

    before = here.dropped_packets()
    together(*(lambda machine=machine: flood(machine) for machine in others))  # type: ignore[misc]
    assert here.dropped_packets() > before


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_nothing_stays_however_a_process_ends(machines: list[Machine], how: signal.Signals) -> None:
    code = "from sidepool.bench.namespaces import Link, star\nimport time\n"
    code += "with star(1, Link(1, 65536)) as (m,):\n print(m.pid, m.switch_pid, flush=True)\n time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        holders = process.stdout.readline().split()
        namespaces = {os.readlink(f"/proc/{pid}/ns/net") for pid in holders}
        process.send_signal(how)
    until = time.monotonic() + PATIENCE_S
    while namespaces & in_use():
        assert time.monotonic() < until
        time.sleep(0.01)


def in_use() -> set[str]:
    """The network namespaces that processes are in."""
    found = set()
    for namespace in Path("/proc").glob("[0-9]*/ns/net"):
        try:
            found.add(os.readlink(namespace))
        except OSError:
            continue  # ended meanwhile
    return found
