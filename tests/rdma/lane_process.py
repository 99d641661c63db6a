"""One end of a lane in a process of its own, for tests that kill it. Ends are exchanged as hex lines on stdin and stdout.

serve   reads a ranker's end, writes its own, serves until stdin closes
ask     writes its end, reads the sidecar's, looks up for ever
crowd   does so `CROWD` times, without lookups, then writes an empty line
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lane_world import REQUEST_BYTES, RESPONSE_BYTES, SLOTS, bags, look_up, make_client, make_server, path

# Lanes of one `crowd`.
CROWD = 25


def serve(timeout_s: float) -> None:
    server = make_server(peer_timeout_s=timeout_s)
    end = server.connect_rdma(SLOTS, REQUEST_BYTES, RESPONSE_BYTES, bytes.fromhex(sys.stdin.readline()))
    print(end.hex(), flush=True)
    sys.stdin.read()


def ask(timeout_s: float) -> None:
    client = make_client()
    offer = client.offer_rdma(path("rxeA", peer_timeout_s=timeout_s), 1, SLOTS, REQUEST_BYTES, RESPONSE_BYTES)
    print(offer.end.hex(), flush=True)
    client.attach_rdma(0, offer, bytes.fromhex(sys.stdin.readline()))
    seed = 0
    while look_up(client, bags(20, seed))[0] == 0:
        seed += 1


def crowd(timeout_s: float) -> None:
    client = make_client(CROWD)
    for i in range(CROWD):
        offer = client.offer_rdma(path("rxeA", peer_timeout_s=timeout_s), 1, 1, REQUEST_BYTES, RESPONSE_BYTES)
        print(offer.end.hex(), flush=True)
        client.attach_rdma(i, offer, bytes.fromhex(sys.stdin.readline()))
    print("", flush=True)
    sys.stdin.read()


@contextmanager
def other_process(role: str, timeout_s: float) -> Iterator[subprocess.Popen[str]]:
    """The process, killed at the end if the test has not done so."""
    here = Path(__file__)
    search = f"import sys; sys.path[:0] = [{str(here.parent)!r}, {str(here.parents[1])!r}]"
    code = f"{search}; import lane_process; lane_process.{role}({timeout_s})"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def tell(process: subprocess.Popen[str], end: bytes) -> None:
    assert process.stdin is not None
    process.stdin.write(end.hex() + "\n")
    process.stdin.flush()


def hear(process: subprocess.Popen[str]) -> bytes:
    assert process.stdout is not None
    return bytes.fromhex(process.stdout.readline())
