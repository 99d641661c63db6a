"""What a stranger may send to a sidecar's ports: endless, random, reproducible by its seed."""

from __future__ import annotations

import contextlib
import socket
import struct
from random import Random

import numpy as np
from golden.make_frames import MAGIC, VERSION, request

# Long enough for a sidecar to have read what was sent, in most cases; what has not been read meets a closed socket.
LISTEN_S = 0.02
HELLO, HELLO_CREDITS, TOKEN_BYTES = 1, 7, 16
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
EXTREMES = (
    0,
    1,
    2,
    63,
    64,
    127,
    128,
    (1 << 15),
    (1 << 16) - 1,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 1,
    1 << 40,
    (1 << 63),
    (1 << 64) - 1,
)
# Header fields of a request frame, `(offset, bytes)`, and those of its first entry (docs/wire-format.md).
HEADER_FIELDS = [
    (0, 4),
    (4, 1),
    (5, 1),
    (6, 2),
    (8, 8),
    (16, 4),
    (20, 4),
    (24, 8),
    (32, 8),
    (40, 8),
    (48, 8),
    (56, 4),
    (60, 4),
    (64, 8),
]
ENTRY_FIELDS = [(128, 4), (132, 2), (134, 2), (136, 4), (140, 4), (144, 8)]


def frame(random: Random, epoch: int, features: list[tuple[int, bool]]) -> bytes:
    """A valid request frame over `(position, weighted)` features, ids 0 to 5."""
    batch = random.randrange(1, 9)
    chosen = []
    for position, weighted in features:
        lengths = [random.randrange(4) for _ in range(batch)]
        ids = [random.randrange(6) for _ in range(sum(lengths))]
        chosen.append((position, -1, lengths, ids, [random.random() for _ in ids] if weighted else []))
    return request(slot=random.randrange(4), lookup_id=random.getrandbits(63), epoch=epoch, batch=batch, features=chosen)


def spoiled(random: Random, good: bytes) -> bytes:
    """`good` with one thing wrong (or, now and then, nothing)."""
    bad = bytearray(good)
    kind = random.randrange(5)
    if kind == 0:  # a field
        at, size = random.choice(HEADER_FIELDS + ENTRY_FIELDS)
        bad[at : at + size] = (random.choice(EXTREMES) % (1 << 8 * size)).to_bytes(size, "little")
    elif kind == 1:  # any byte
        bad[random.randrange(len(bad))] ^= 1 << random.randrange(8)
    elif kind == 2:  # any number in the body
        at = 8 * random.randrange(len(bad) // 8)
        bad[at : at + 8] = random.choice(EXTREMES).to_bytes(8, "little")
    elif kind == 3:  # the end
        del bad[random.randrange(len(bad)) :]
    else:
        bad += random.randbytes(random.randrange(200))
    return bytes(bad)


def hello(token: bytes, kind: int = HELLO) -> bytes:
    """The frame that opens a tcp or shm lane, or (`HELLO_CREDITS`) a tcp lane's second connection."""
    return struct.pack("<IBBH", MAGIC, VERSION, kind, 0) + token + bytes(64 - 8 - TOKEN_BYTES)


def connect(where: str) -> socket.socket:
    """A connection to `host:port`, or to a Unix socket's path."""
    if where.startswith("/"):
        stranger = socket.socket(socket.AF_UNIX)
        stranger.connect(where)
    else:
        host, _, port = where.rpartition(":")
        stranger = socket.create_connection((host, int(port)))
    stranger.settimeout(LISTEN_S)
    return stranger


def say(where: str, *pieces: bytes) -> None:
    """Connect, send, listen for a moment, and hang up: with a reset every other time."""
    with connect(where) as stranger, contextlib.suppress(OSError):
        for piece in pieces:
            stranger.sendall(piece)
        stranger.recv(4096)
        if sum(map(len, pieces)) % 2:
            stranger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def say_on_both(where: str, token: bytes, frames: list[bytes], grants: list[bytes]) -> None:
    """Open a tcp lane with its connection for credits, and say something on either."""
    with connect(where) as stranger, connect(where) as second, contextlib.suppress(OSError):
        stranger.sendall(hello(token))
        stranger.recv(64)
        second.sendall(hello(token, HELLO_CREDITS))
        second.recv(64)
        for connection, pieces in ((second, grants), (stranger, frames)):
            for piece in pieces:
                connection.sendall(piece)
        stranger.recv(4096)


def http2(random: Random) -> list[bytes]:
    """Something that begins as HTTP/2 and goes wrong."""
    length = random.choice([0, 1, 8, 1 << 14, (1 << 24) - 1])
    head = (
        length.to_bytes(3, "big") + bytes([random.randrange(12), random.getrandbits(8)]) + random.getrandbits(32).to_bytes(4, "big")
    )
    settings = bytes(3) + b"\x04" + bytes(5)
    return [PREFACE[: random.choice([5, len(PREFACE), len(PREFACE)])], settings, head, random.randbytes(random.randrange(300))]


def http1(random: Random) -> list[bytes]:
    """Something that begins as HTTP/1.1 and goes wrong, or is merely unusual."""
    noise = random.randbytes(random.randrange(200))
    return random.choice(
        [
            [b"GET /metrics HTTP/1.1\r\n" + b"X: " + b"y" * 70_000 + b"\r\n"],
            [b"GET /" + b"m" * 70_000 + b" HTTP/1.1\r\n\r\n"],
            [b"GET /metrics HTTP/1.1\r\n" + b"A: b\r\n" * 500 + b"\r\n"],
            [b"POST /metrics HTTP/1.1\r\nContent-Length: 99999999999999\r\n\r\n", noise],
            [b"GET /metrics HTTP/9.9\r\n\r\n"],
            [b"GET /metrics?name[]=" + noise.hex().encode() + b" HTTP/1.0\r\n\r\n"],
            [b"GET"],
            [noise],
        ]
    )


def noise(random: Random) -> list[bytes]:
    """Random bytes, or a TLS greeting that goes wrong."""
    return [random.choice([b"", b"\x16\x03\x01"]), random.randbytes(int(np.exp(random.uniform(0, 9))))]
