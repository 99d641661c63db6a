"""Writes the golden frames, from the specification and not from the product's encoder.

Run by hand when a new wire version is defined; existing frames never change.
"""

from __future__ import annotations

import struct
from pathlib import Path

MAGIC, VERSION = 0x31465053, 1


def pad(data: bytes) -> bytes:
    """Up to the next multiple of 64 bytes."""
    return data + bytes(-len(data) % 64)


def request(
    *,
    slot: int,
    lookup_id: int,
    epoch: int,
    batch: int,
    features: list[tuple[int, int, list[int], list[int], list[float]]],
    output_format: int = 0,
    shards: list[tuple[int, int, int]] | None = None,
) -> bytes:
    """`features`: (plan position, fixed length or -1, lengths, ids, weights or none). `output_format`: 0, 1 or 2.

    `shards`: per entry shard, bags and flags beside `weighted`.
    """
    entries = b"".join(
        struct.pack("<IHHiIQ", position, flags | (1 if weights else 0), shard, fixed, bags, len(ids))
        for (position, fixed, _, ids, weights), (shard, bags, flags) in zip(
            features, shards or [(0, 0, 0)] * len(features), strict=True
        )
    )
    lengths = b"".join(struct.pack(f"<{len(lens)}i", *lens) for _, fixed, lens, _, _ in features if fixed < 0)
    values = b"".join(struct.pack(f"<{len(ids)}q", *ids) for _, _, _, ids, _ in features)
    weights_section = b"".join(struct.pack(f"<{len(w)}f", *w) for *_, w in features)
    trace = bytes.fromhex("00" + "0af7651916cd43dd8448eb211c80319c" + "b7ad6b7169203331" + "01")
    count = sum(len(ids) for _, _, _, ids, _ in features)
    total = 64 * (-(-(128 + len(entries)) // 64)) + len(pad(lengths)) + len(pad(values)) + len(pad(weights_section))
    header = struct.pack(
        "<IBBHQIiQQQQIIQ26sB29s",
        MAGIC,
        VERSION,
        3,
        0,
        total,
        slot,
        2,
        lookup_id,
        epoch,
        50_000_000,
        123_456_789,
        batch,
        len(features),
        count,
        trace,
        output_format,
        bytes(29),
    )
    return pad(header + entries) + pad(lengths) + pad(values) + pad(weights_section)


def response(*, slot: int, lookup_id: int, epoch: int, batch: int, blocks: list[list[float]], status: int = 0) -> bytes:
    """One last piece with the given blocks."""
    payload = b"".join(pad(struct.pack(f"<{len(b)}f", *b)) for b in blocks)
    header = struct.pack(
        "<IBBHQIiQQIIIiiIqqQQQ24s",
        MAGIC,
        VERSION,
        4,
        1,
        128 + len(payload),
        slot,
        status,
        lookup_id,
        epoch,
        0,
        len(blocks),
        batch,
        0,
        -1,
        0,
        -1,
        0,
        1000,
        2000,
        3000,
        bytes(24),
    )
    return header + payload


FRAMES = {
    "request_fixed": request(
        slot=3, lookup_id=77, epoch=9, batch=2, features=[(0, 1, [], [4, 5], []), (2, 2, [], [1, 2, 3, 4], [])]
    ),
    "request_bf16": request(slot=3, lookup_id=77, epoch=9, batch=2, features=[(2, 2, [], [1, 2, 3, 4], [])], output_format=2),
    "request_jagged_weighted": request(
        slot=0,
        lookup_id=1,
        epoch=1,
        batch=3,
        features=[
            (1, -1, [2, 0, 1], [10, 11, 12], [0.5, 1.5, -2.0]),
            (5, -1, [0, 0, 0], [], []),
            (7, -1, [1, 1, 1], [-1, 0, 1 << 40], []),
        ],
    ),
    "request_shards": request(
        slot=1,
        lookup_id=6,
        epoch=9,
        batch=4,
        features=[(0, -1, [2, 1], [0, 1, 4], [1.0, 2.0, 0.5]), (0, 1, [], [3], []), (1, 1, [], [2, 0, 1], [])],
        shards=[(1, 2, 2), (0, 1, 4), (0, 3, 0)],
        output_format=1,
    ),
    "response_two_blocks": response(slot=3, lookup_id=77, epoch=9, batch=2, blocks=[[1.0, 2.0, 3.0, 4.0], [0.5, -0.5]]),
    "response_deadline": response(slot=1, lookup_id=5, epoch=9, batch=1, blocks=[], status=3),
}

if __name__ == "__main__":
    for name, frame in FRAMES.items():
        (Path(__file__).parent / f"{name}.bin").write_bytes(frame)
