"""Either end of an rdma lane written from docs/wire-format.md alone, on pyverbs: shares no code with the native core."""

from __future__ import annotations

import ipaddress
import struct
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from lane_world import DIMS, EPOCH, TABLES, Bags
from numpy.typing import NDArray
from verbs_peer import PATIENT_S, Address, Completion, Peer, ibv

MAGIC, VERSION = 0x31465053, 1
REQUEST, RESPONSE, END = 3, 4, 5
ASK, PIECE, LAST, BYE = 1, 2, 3, 4
HEADER_BYTES = 128
GRANT_AT = 112
WINDOW_BYTES = 4 << 20

_END = struct.Struct("<IBBBB16sIIIIHHIQQIIQQQI28x")
_REQUEST = struct.Struct("<IBBHQIiQQQQIIQ26s14xQQ")
_ENTRY = struct.Struct("<IHHiIQ")
_RESPONSE = struct.Struct("<IBBHQIiQQIIIiiIqqQQQ8xQQ")


class End(NamedTuple):
    magic: int
    version: int
    kind: int
    link_layer: int
    mtu: int
    gid: bytes
    data_qpn: int
    data_psn: int
    control_qpn: int
    control_psn: int
    lid: int
    zero: int
    receives: int
    slots_address: int
    control_address: int
    slots_rkey: int
    control_rkey: int
    slot_stride: int
    window_bytes: int
    clock_id: int
    slots: int

    def pack(self) -> bytes:
        return _END.pack(*self)

    @staticmethod
    def unpack(data: bytes) -> End:
        return End(*_END.unpack(data))

    def address(self, queue_pair: int, first_packet: int, memory: int, key: int) -> Address:
        return Address(str(ipaddress.IPv6Address(self.gid).exploded), queue_pair, first_packet, memory, key, 0)


def immediate(kind: int, slot: int = 0, done: int = 0) -> int:
    return kind << 28 | done << 6 | slot


class Arrived(NamedTuple):
    kind: int
    slot: int
    done: int
    length_bytes: int


@dataclass
class WirePeer:
    """One end: `data` carries frames, its memory is the slots and behind them the control page."""

    data: Peer
    slots: int
    stride: int
    receives: int
    _came: deque[Completion] = field(default_factory=deque)

    @staticmethod
    def open(device: str, *, slots: int, stride: int, receives: int = 64) -> WirePeer:
        return WirePeer(Peer(device, slots * stride * 2 + 4096, depth=256), slots, stride, receives)

    def end(self, **changes: int) -> End:
        own = self.data.address
        gid = ipaddress.IPv6Address(own.gid).packed
        end = End(
            MAGIC, VERSION, END, 2, 5, gid, own.queue_pair, own.first_packet, 0, 0, 0, 0, self.receives, own.memory,
            own.memory + self.slots * self.stride, own.key, own.key, self.stride, WINDOW_BYTES, 0, self.slots,
        )  # fmt: skip
        return end._replace(**changes)

    def connect(self, other: End, *, receives: int | None = None) -> None:
        """Join the other end; `receives` posted instead of as many as it was promised."""
        self.other = other
        self.data.connect(other.address(other.data_qpn, other.data_psn, other.slots_address, other.slots_rkey))
        for i in range(self.receives if receives is None else receives):
            self.data.post_receive(i)

    @property
    def staging(self) -> int:
        """Where in `data.memory` frames are made, behind everything that the other end writes."""
        return self.slots * self.stride + 4096

    def send(self, frame: bytes, imm: int, to: int, key: int | None = None) -> None:
        self.data.write(1000, frame, to=to, immediate=imm, at=self.staging, key=key)

    def arrived(self, within_s: float = PATIENT_S) -> Arrived:
        """The next message from the other end; own sends that are complete meanwhile must be good."""
        while not self._came:
            self._take(within_s)
        done = self._came.popleft()
        self.data.post_receive(0)
        word = done.immediate
        return Arrived(word >> 28, word & 63, word >> 6 & 0x3FFFFF, done.length_bytes)

    def sent(self) -> None:
        """Wait until the one send that is under way is complete: frames are all made in one place."""
        while not self._take(PATIENT_S):
            pass

    def _take(self, within_s: float) -> bool:
        done = self.data.completion(within_s)
        assert done.status == ibv.IBV_WC_SUCCESS, done
        if done.opcode != ibv.IBV_WC_RECV_RDMA_WITH_IMM:
            return True
        self._came.append(done)
        return False

    def slot(self, slot: int) -> NDArray[np.uint8]:
        return self.data.memory[slot * self.stride : (slot + 1) * self.stride]


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 64)


def request_frame(asked: Bags, *, slot: int, lookup_id: int, epoch: int = EPOCH) -> bytes:
    counts = asked.lengths.sum(axis=1)
    entries = b"".join(_ENTRY.pack(f, 0, 0, -1, 0, int(n)) for f, n in enumerate(counts))
    body = padded(entries) + padded(asked.lengths.astype("<i4").tobytes()) + padded(asked.values.astype("<i8").tobytes())
    batch, total = asked.lengths.shape[1], HEADER_BYTES + len(body)
    header = _REQUEST.pack(
        MAGIC, VERSION, REQUEST, 0, total, slot, 0, lookup_id, epoch, 60_000_000_000, 0, batch, len(DIMS), asked.values.size,
        bytes(26), 0, 0,
    )  # fmt: skip
    return header + body


class Response(NamedTuple):
    magic: int
    version: int
    kind: int
    flags: int
    frame_bytes: int
    slot: int
    status: int
    lookup_id: int
    epoch: int
    first: int
    count: int
    batch: int
    reason: int
    fault_feature: int
    zero: int
    fault_bag: int
    fault_value: int
    received_ns: int
    started_ns: int
    finished_ns: int
    grant_limit: int
    granted_ns: int

    @staticmethod
    def unpack(data: bytes) -> Response:
        return Response(*_RESPONSE.unpack(data))


def response_header(
    *, slot: int, lookup_id: int, batch: int, payload_bytes: int, grant: int, count: int = len(DIMS), status: int = 0
) -> bytes:
    return _RESPONSE.pack(
        MAGIC, VERSION, RESPONSE, 1, HEADER_BYTES + payload_bytes, slot, status, lookup_id, EPOCH, 0, count, batch,
        0, -1, 0, -1, 0, 1, 2, 3, grant, 0,
    )  # fmt: skip


def pooled_blocks(asked: Bags) -> list[bytes]:
    """The blocks of a response: float32 rows per feature, padded."""
    columns = np.split(asked.expected, np.cumsum(DIMS)[:-1], axis=1)
    return [padded(np.ascontiguousarray(c).astype("<f4").tobytes()) for c in columns]


def read_request(frame: bytes) -> tuple[int, Bags]:
    """(lookup id, its bags) of a jagged request over every table."""
    fields = _REQUEST.unpack_from(frame)
    assert (fields[0], fields[1], fields[2]) == (MAGIC, VERSION, REQUEST)
    batch, features, count = fields[11], fields[12], fields[13]
    assert features == len(TABLES)
    entries = [_ENTRY.unpack_from(frame, HEADER_BYTES + i * _ENTRY.size) for i in range(features)]
    at = HEADER_BYTES + features * _ENTRY.size
    at += -at % 64
    rows, by = [], at
    for entry in entries:
        if entry[3] >= 0:
            rows.append(np.full(batch, entry[3], np.int32))
        else:
            rows.append(np.frombuffer(frame, "<i4", batch, by))
            by += 4 * batch
    by += -by % 64
    return fields[7], Bags(np.frombuffer(frame, "<i8", count, by).copy(), np.stack(rows).astype(np.int32))
