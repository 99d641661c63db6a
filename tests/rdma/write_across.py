"""One of two ends in two guests: each writes a pattern to the other and checks what the other wrote; then one looks up at the
other over an rdma lane. Started by test_rdma_guest.py.

Usage: write_across.py GUEST_ADDRESS PEER_ADDRESS
"""

from __future__ import annotations

import json
import socket
import sys
import time
from dataclasses import asdict
from typing import Any, TextIO

import numpy as np
from lane_world import REQUEST_BYTES, RESPONSE_BYTES, SLOTS, assert_answers, make_client, make_server, path
from verbs_peer import PATIENT_S, Address, Peer, ibv

TCP_PORT = 7471  # on the guests' own network, where nothing else is
SIZE_BYTES = 300_000


def meet(own: str, other: str) -> socket.socket:
    """The end with the lower address listens; the other may have started first, so it tries until someone is there."""
    if own < other:
        with socket.create_server((own, TCP_PORT)) as listening:
            listening.settimeout(PATIENT_S)
            return listening.accept()[0]
    end = time.monotonic() + PATIENT_S
    while True:
        try:
            return socket.create_connection((other, TCP_PORT), timeout=1)
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


def swap(wire: TextIO, own: object) -> Any:
    """Tell the other end something and hear the same from it; also where both ends wait for each other."""
    wire.write(json.dumps(own) + "\n")
    wire.flush()
    return json.loads(wire.readline())


def pattern(address: str) -> bytes:
    """What the end at `address` writes."""
    return np.random.default_rng(int(address.rpartition(".")[2])).bytes(SIZE_BYTES)


def serve(wire: TextIO) -> None:
    """A sidecar for one lane of the other guest, until that is done."""
    server = make_server(device="rxeN")
    end = server.connect_rdma(SLOTS, REQUEST_BYTES, RESPONSE_BYTES, bytes.fromhex(swap(wire, "")))
    swap(wire, end.hex())
    swap(wire, "served")
    server.close()


def look_up(wire: TextIO) -> None:
    """Lookups of many sizes at the other guest's sidecar."""
    client = make_client()
    offer = client.offer_rdma(path("rxeN"), 1, SLOTS, REQUEST_BYTES, RESPONSE_BYTES)
    swap(wire, offer.end.hex())
    client.attach_rdma(0, offer, bytes.fromhex(swap(wire, "")))
    for seed, batch in enumerate((1, 7, 64, 500, 2000)):
        assert_answers(client, batch, seed)
    swap(wire, "answered")
    client.close()


def main(own: str, other: str) -> None:
    with Peer("rxeN") as peer, meet(own, other) as connection, connection.makefile("rw") as wire:
        connection.settimeout(PATIENT_S)
        peer.connect(Address(**swap(wire, asdict(peer.address))))
        peer.post_receive(1)
        swap(wire, "receiving")
        peer.write(2, pattern(own), to=SIZE_BYTES, immediate=7)
        done = sorted((peer.completion(), peer.completion()), key=lambda completion: completion.wr_id)
        assert [completion.status for completion in done] == [ibv.IBV_WC_SUCCESS] * 2, done
        assert (done[0].immediate, done[0].length_bytes) == (7, SIZE_BYTES), done
        assert peer.memory[SIZE_BYTES : 2 * SIZE_BYTES].tobytes() == pattern(other)
        swap(wire, "done")
        (serve if own < other else look_up)(wire)
    print(f"wrote {SIZE_BYTES} bytes to {other} and got its own, and lookups over a lane")


if __name__ == "__main__":
    main(*sys.argv[1:])
