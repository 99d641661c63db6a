"""A program that turns every line of stdin, `{"lane", "address", "token", "moment"}`, into a client process that is killed.

Forks children that have nothing loaded but NumPy and the native core, so that a thousand of them take seconds. Each
attaches a lane, and ends by SIGKILL at its moment: `attached`, `answered` (after a lookup) or `asking` (during lookups).
Prints one line per child: nothing when it got as far as its moment, else what went wrong.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sidepool import _native

EPOCH, ROWS, DIM = 1, 50, 8
DEADLINE_NS = 20_000_000_000


def attached(lane: str, address: str, token: bytes) -> _native.LookupClient:
    """A client of a plan with one feature over one table `[ROWS, DIM]`, on one sidecar."""
    client = _native.LookupClient(
        epoch=EPOCH,
        sidecars=1,
        spin_us=0,
        degrade=False,
        rows=np.array([ROWS], np.int64),
        dims=np.array([DIM], np.int32),
        poolings=["sum"],
        weighted=[False],
        out_of_range=["error"],
        sidecar_of_feature=np.zeros(1, np.int32),
    )
    if lane == "shm":
        client.attach_shm(0, address, token, 5.0)
    else:
        host, _, port = address.rpartition(":")
        client.attach_tcp(0, host, int(port), token, 5.0)
    return client


def ask(client: _native.LookupClient, ids: NDArray[np.int64]) -> int:
    """The status of one lookup."""
    out = np.empty((len(ids), DIM), np.float32)
    verdicts, timings = np.empty((1, 5), np.int64), np.empty((2, 6), np.int64)
    return client.lookup([(ids, None, None)], out, (), DEADLINE_NS, 0, b"", verdicts, timings)[0]


def live_and_die(lane: str, address: str, token: str, moment: str) -> None:
    """In the child; does not return unless something is wrong."""
    client = attached(lane, address, bytes.fromhex(token))
    ids = np.random.default_rng(os.getpid()).integers(0, ROWS, (2000, 1))
    if moment != "attached" and (status := ask(client, ids)):
        raise RuntimeError(f"a lookup ended with status {status}")
    if moment == "asking":
        for _ in range(2):
            threading.Thread(target=lambda: [ask(client, ids) for _ in range(10_000)], daemon=True).start()
        time.sleep(0.002)
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    for line in sys.stdin:
        order: dict[str, Any] = json.loads(line)
        child = os.fork()
        if child == 0:
            try:
                live_and_die(**order)
            except BaseException as e:
                print(f"{type(e).__name__}: {e}", file=sys.stderr, flush=True)
            os._exit(1)
        _, status = os.waitpid(child, 0)
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        print("" if killed else f"status {status}", flush=True)


if __name__ == "__main__":
    main()
