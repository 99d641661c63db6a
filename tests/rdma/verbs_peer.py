"""An independent end of a reliable connection, on pyverbs: for tests that need a peer which shares no code with the core.

Works with the pyverbs of rdma-core 44 and of 59.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pyverbs.addr import GID, AHAttr, GlobalRoute
from pyverbs.cq import CQ, CompChannel
from pyverbs.device import Context
from pyverbs.mr import MR
from pyverbs.pd import PD
from pyverbs.qp import QP, QPAttr, QPCap, QPInitAttr
from pyverbs.wr import SGE, RecvWR, SendWR

PORT = 1
ROCE_V2_IPV4_GID_INDEX = 1  # see tests/guest/README.md
# Any wait that a healthy guest ends: emulation is slow, and never so slow.
PATIENT_S = 30.0


def _constants() -> SimpleNamespace:
    """The IBV_ names: module constants in pyverbs 44, members of enumerations later."""
    try:
        import pyverbs.enums as source
    except ImportError:
        import pyverbs.libibverbs_enums as source
    found: dict[str, int] = {}
    for name, value in vars(source).items():
        members = getattr(value, "__members__", {name: value})
        found.update({key: int(member) for key, member in members.items() if key.startswith("IBV_")})
    return SimpleNamespace(**found)


ibv = _constants()


@dataclass(frozen=True)
class Address:
    """What one end must be told about the other: its queue pair, and the memory that it lets others write."""

    gid: str
    queue_pair: int
    first_packet: int
    memory: int
    key: int
    size_bytes: int


@dataclass(frozen=True)
class Completion:
    """One work completion. `immediate` as the network carries it, big-endian, made a number."""

    wr_id: int
    status: int
    opcode: int
    length_bytes: int
    immediate: int


class Peer:
    """A queue pair with its own device context, completion queue and registered `memory` (uint8, `size_bytes`, zeros).

    Every post names the work request; completions of sends and receives come from `completion`, in the order of the queue.
    One thread. Close it, or use it in a `with`: verbs objects must go before those they were made from.
    """

    def __init__(self, device: str, size_bytes: int = 1 << 20, *, depth: int = 64, gid_index: int = ROCE_V2_IPV4_GID_INDEX) -> None:
        self._gid_index = gid_index
        self._access = ibv.IBV_ACCESS_LOCAL_WRITE | ibv.IBV_ACCESS_REMOTE_WRITE
        self.memory: NDArray[np.uint8] = np.zeros(size_bytes, np.uint8)
        self.context = Context(name=device)
        self._domain = PD(self.context)
        self._channel, self._event_descriptor = _completion_channel(self.context)
        self._queue = CQ(self.context, 2 * depth, None, self._channel, 0)
        self._queue.req_notify()
        self._region = MR(self._domain, size_bytes, self._access, address=self.memory.ctypes.data)
        capacity = QPCap(max_send_wr=depth, max_recv_wr=depth, max_send_sge=1, max_recv_sge=1)
        wanted = QPInitAttr(qp_type=ibv.IBV_QPT_RC, scq=self._queue, rcq=self._queue, cap=capacity, sq_sig_all=1)
        self._queue_pair = QP(self._domain, wanted, QPAttr(port_num=PORT))
        self._other: Address | None = None

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give everything back, the queue pair first."""
        for made in (self._queue_pair, self._region, self._queue, self._channel, self._domain, self.context):
            made.close()

    @property
    def address(self) -> Address:
        number = self._queue_pair.qp_num
        gid = str(self.context.query_gid(PORT, self._gid_index))
        # Any first packet number will do; one of its own per queue pair shows when ends are mixed up.
        return Address(gid, number, number & 0xFFFF, self._region.buf, self._region.rkey, self.memory.size)

    def connect(self, other: Address, *, timeout: int = 14, retries: int = 7, receiver_not_ready_retries: int = 7) -> None:
        """Take the queue pair to ready-to-send. `timeout` is 4.096 µs * 2**timeout; 7 receiver-not-ready retries mean for ever."""
        at = QPAttr(port_num=PORT)
        at.qp_access_flags = self._access
        at.pkey_index = 0
        self._queue_pair.to_init(at)
        route = GlobalRoute(dgid=GID(other.gid), sgid_index=self._gid_index, hop_limit=64)
        at.ah_attr = AHAttr(gr=route, is_global=1, port_num=PORT)
        at.path_mtu = self.context.query_port(PORT).active_mtu
        at.dest_qp_num, at.rq_psn, at.sq_psn = other.queue_pair, other.first_packet, self.address.first_packet
        at.max_dest_rd_atomic = at.max_rd_atomic = at.min_rnr_timer = 1
        at.timeout, at.retry_cnt, at.rnr_retry = timeout, retries, receiver_not_ready_retries
        self._queue_pair.to_rts(at)
        self._other = other

    def post_receive(self, wr_id: int) -> None:
        """Expect one write with immediate, or one empty send."""
        # pyverbs 44 refuses a receive without an element, so it gets an empty one.
        element = SGE(self._region.buf, 0, self._region.lkey)
        request = RecvWR(wr_id=wr_id, num_sge=1, sg=[element])
        self._queue_pair.post_recv(request)
        request.close()  # not freed otherwise

    def write(
        self, wr_id: int, payload: bytes, *, to: int, immediate: int, at: int = 0, key: int | None = None, plain: bool = False
    ) -> None:
        """Place `payload` in own memory at `at` and write it to the other's at `to`; `key` instead of the other's own.

        `plain`: without the immediate, so that the other is not told.
        """
        assert self._other is not None, "connect first"
        self.memory[at : at + len(payload)] = np.frombuffer(payload, np.uint8)
        element = SGE(self._region.buf + at, len(payload), self._region.lkey)
        # pyverbs hands the number to the card as it is; the network's order is big-endian.
        swapped = int.from_bytes(immediate.to_bytes(4, "big"), "little")
        opcode = ibv.IBV_WR_RDMA_WRITE if plain else ibv.IBV_WR_RDMA_WRITE_WITH_IMM
        request = SendWR(wr_id=wr_id, opcode=opcode, num_sge=1, imm_data=swapped, sg=[element])
        request.set_wr_rdma(self._other.key if key is None else key, self._other.memory + to)
        self._queue_pair.post_send(request)

    def completion(self, within_s: float = PATIENT_S) -> Completion:
        """The next completion, whatever its status; TimeoutError when none comes."""
        end = time.monotonic() + within_s
        while True:
            count, (done, *_) = self._polled()
            if count:
                immediate = int.from_bytes((done.imm_data & 0xFFFFFFFF).to_bytes(4, "little"), "big")
                return Completion(done.wr_id, done.status, done.opcode, done.byte_len, immediate)
            # get_cq_event blocks with the interpreter's lock held: it is called only when there is an event.
            if not select.select([self._event_descriptor], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError(f"no completion within {within_s} s")
            self._channel.get_cq_event(self._queue)
            self._queue.ack_events(1)
            self._queue.req_notify()

    def _polled(self) -> tuple[int, list[Any]]:
        count, done = self._queue.poll(1)
        return count, done or [None]


@contextmanager
def pair(first: str, second: str, **options: Any) -> Iterator[tuple[Peer, Peer]]:
    """Two connected ends in this process; `options` of `Peer.connect`."""
    with Peer(first) as a, Peer(second) as b:
        a.connect(b.address, **options)
        b.connect(a.address, **options)
        yield a, b


def _completion_channel(context: Context) -> tuple[CompChannel, int]:
    """A channel and its descriptor, which pyverbs 44 does not tell: it is the one that opening the channel brings."""
    before = _event_descriptors()
    channel = CompChannel(context)
    (descriptor,) = _event_descriptors() - before
    return channel, descriptor


def _event_descriptors() -> set[int]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # the one that listdir itself had open
            continue
        if "infinibandevent" in target:
            found.add(int(name))
    return found
