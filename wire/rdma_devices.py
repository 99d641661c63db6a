"""RDMA devices of this machine as the kernel tells them under /sys/class/infiniband: no package and no permission is needed.

What sysfs does not tell (limits, an InfiniBand port's active MTU) comes from `verbs_limits`, which needs pyverbs.
The files: https://www.kernel.org/doc/Documentation/ABI/stable/sysfs-class-infiniband
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SYS = Path("/sys")
DEV = Path("/dev/infiniband")  # a file per device, which programs open
ROCE_V2 = "RoCE v2"
MTUS_BYTES = (256, 512, 1024, 2048, 4096)  # those that verbs know
# What a RoCE v2 packet adds to its payload on an IP network, at most: IPv6 40, UDP 8, base header 12, the largest
# extended header 28 with its 4 of XRC, checksum 4. The kernel's own choice of MTU leaves the same room.
ROCE_HEADER_BYTES = 96


@dataclass(frozen=True, slots=True)
class Gid:
    """One address of a port. `type` is the kernel's word: "IB/RoCE v1" or "RoCE v2"; `interface` is None on InfiniBand."""

    index: int
    address: ipaddress.IPv6Address
    type: str
    interface: str | None

    @property
    def routable(self) -> bool:
        """Whether it reaches beyond its own network segment: RoCE v2 on an IP address that is not link-local."""
        return self.type == ROCE_V2 and not self.address.is_link_local

    def __str__(self) -> str:
        return str(self.address.ipv4_mapped or self.address)


@dataclass(frozen=True, slots=True)
class Port:
    """One port. `link_layer` is "Ethernet" or "InfiniBand"; `state` is "ACTIVE" when it can carry data.

    `mtu_bytes` is the largest packet payload that the interface's own MTU leaves; None where there is no interface (InfiniBand).
    """

    number: int
    link_layer: str
    state: str
    rate: str
    lid: int
    mtu_bytes: int | None
    gids: tuple[Gid, ...]

    @property
    def interfaces(self) -> tuple[str, ...]:
        """Network interfaces behind it, each once."""
        return tuple(dict.fromkeys(gid.interface for gid in self.gids if gid.interface))


@dataclass(frozen=True, slots=True)
class Device:
    """One device. `numa_node` is None where the kernel knows none; `verbs` is its file's name in DEV, None without ib_uverbs."""

    name: str
    numa_node: int | None
    verbs: str | None
    ports: tuple[Port, ...]


@dataclass(frozen=True, slots=True)
class VerbsLimits:
    """What a device allows, as its driver tells it; `active_mtus_bytes` by port number."""

    queue_pairs: int
    requests_per_queue: int
    completions_per_queue: int
    registrations: int
    active_mtus_bytes: dict[int, int]


def rdma_devices(root: Path = SYS) -> tuple[Device, ...]:
    """All devices, by name. Empty where there is none; never raises for files that are missing or odd."""
    folder = root / "class" / "infiniband"
    if not folder.is_dir():
        return ()
    verbs = {_text(path / "ibdev"): path.name for path in (root / "class" / "infiniband_verbs").glob("uverbs*")}
    return tuple(_device(path, root, verbs.get(path.name)) for path in sorted(folder.iterdir()))


def verbs_limits(device: Device) -> VerbsLimits:
    """Ask the driver, through pyverbs. ImportError without pyverbs or its libraries, OSError where the device cannot be opened."""
    from pyverbs.device import Context
    from pyverbs.pyverbs_error import PyverbsError

    try:
        with Context(name=device.name) as context:
            told = context.query_device()
            # Verbs count MTUs from 1 (256 bytes), each twice the one before.
            mtus = {port.number: 128 << int(context.query_port(port.number).active_mtu) for port in device.ports}
    except PyverbsError as e:
        raise OSError(f"{device.name}: {e}") from e
    return VerbsLimits(told.max_qp, told.max_qp_wr, told.max_cqe, told.max_mr, mtus)


def _device(path: Path, root: Path, verbs: str | None) -> Device:
    node = _number(path / "device" / "numa_node")
    ports = (_port(port, root) for port in sorted((path / "ports").glob("[0-9]*"), key=lambda p: int(p.name)))
    # -1 is the kernel's word for "none".
    return Device(path.name, None if node is None or node < 0 else node, verbs, tuple(ports))


def _port(path: Path, root: Path) -> Port:
    gids = tuple(_gids(path))
    mtus = [_number(root / "class" / "net" / name / "mtu") for name in {gid.interface for gid in gids if gid.interface}]
    return Port(
        number=int(path.name),
        link_layer=_text(path / "link_layer") or "unknown",
        state=_text(path / "state").partition(": ")[2] or "unknown",  # "4: ACTIVE"
        rate=_text(path / "rate") or "unknown",
        lid=_number(path / "lid") or 0,
        mtu_bytes=_payload(min((mtu for mtu in mtus if mtu is not None), default=None)),
        gids=gids,
    )


def _gids(port: Path) -> Iterator[Gid]:
    for path in sorted((port / "gids").glob("[0-9]*"), key=lambda p: int(p.name)):
        try:
            address = ipaddress.IPv6Address(_text(path))
        except ipaddress.AddressValueError:
            continue
        if int(address):  # empty entries are all zeros
            attributes = port / "gid_attrs"
            yield Gid(
                int(path.name), address, _text(attributes / "types" / path.name), _text(attributes / "ndevs" / path.name) or None
            )


def _payload(interface_mtu: int | None) -> int | None:
    if interface_mtu is None:
        return None
    return max((mtu for mtu in MTUS_BYTES if mtu + ROCE_HEADER_BYTES <= interface_mtu), default=None)


def _text(path: Path) -> str:
    """Empty where the file is missing or, as the kernel does for unused entries, refuses to be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    try:
        return int(_text(path), 0)  # decimal, or 0x… for a LID
    except ValueError:
        return None
