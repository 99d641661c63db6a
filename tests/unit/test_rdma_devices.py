"""RDMA devices are read from sysfs as the kernel writes it; `doctor` says what is wrong with each port and what to do."""

from __future__ import annotations

import ctypes.util
from ipaddress import IPv6Address
from pathlib import Path

import pytest

from sidepool import doctor
from sidepool.wire.rdma_devices import Device, Gid, rdma_devices

LIBRARY = ctypes.util.find_library("c") or "libc.so.6"  # one that loads everywhere
LINK_LOCAL = "fe80:0000:0000:0000:0a94:efff:fe24:1932"
IPV4 = "0000:0000:0000:0000:0000:ffff:0a00:0007"


class Sys:
    """A /sys and a /dev with the cards that a test puts in."""

    def __init__(self, directory: Path) -> None:
        self.root, self.dev = directory / "sys", directory / "dev"
        self.dev.mkdir()

    def card(self, name: str = "mlx5_0", *, numa_node: str = "1", **port: str) -> Path:
        """One card with one port; the files of the port's folder by name."""
        device = self.root / "class/infiniband" / name
        verbs = f"uverbs{len(list(self.dev.iterdir()))}"
        write(device / "device/numa_node", numa_node)
        write(self.root / "class/infiniband_verbs" / verbs / "ibdev", name)
        write(self.dev / verbs, "")
        files = {"link_layer": "Ethernet", "state": "4: ACTIVE", "rate": "100 Gb/sec (4X EDR)", "lid": "0x0", **port}
        for file, text in files.items():
            write(device / "ports/1" / file, text)
        return device / "ports/1"

    def gid(self, port: Path, index: int, address: str, kind: str = "RoCE v2", interface: str = "eth4") -> None:
        write(port / f"gids/{index}", address)
        write(port / f"gid_attrs/types/{index}", kind)
        write(port / f"gid_attrs/ndevs/{index}", interface)

    def interface(self, name: str, mtu: int) -> None:
        write(self.root / "class/net" / name / "mtu", str(mtu))

    def findings(self) -> list[doctor.Finding]:
        return doctor.rdma(self.root, self.dev, LIBRARY)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


@pytest.fixture
def sys(tmp_path: Path) -> Sys:
    return Sys(tmp_path)


@pytest.fixture
def good_port(sys: Sys) -> Path:
    """A RoCE port with nothing to complain about."""
    port = sys.card()
    sys.gid(port, 0, LINK_LOCAL, "IB/RoCE v1")
    sys.gid(port, 1, LINK_LOCAL)
    sys.gid(port, 3, IPV4)
    write(port / "gids/4", ":".join(["0000"] * 8))
    sys.interface("eth4", 9000)
    return port


def only(devices: tuple[Device, ...]) -> Device:
    (device,) = devices
    return device


@pytest.mark.usefixtures("good_port")
def test_a_roce_card_is_told_with_its_addresses_and_its_packet_size(sys: Sys) -> None:
    device = only(rdma_devices(sys.root))
    (port,) = device.ports
    assert (device.name, device.numa_node, device.verbs) == ("mlx5_0", 1, "uverbs0")
    assert (port.number, port.link_layer, port.state, port.rate, port.lid) == (1, "Ethernet", "ACTIVE", "100 Gb/sec (4X EDR)", 0)
    assert port.gids == (
        Gid(0, IPv6Address(LINK_LOCAL), "IB/RoCE v1", "eth4"),
        Gid(1, IPv6Address(LINK_LOCAL), "RoCE v2", "eth4"),
        Gid(3, IPv6Address(IPV4), "RoCE v2", "eth4"),
    )
    assert [str(gid) for gid in port.gids if gid.routable] == ["10.0.0.7"]
    assert (port.interfaces, port.mtu_bytes) == (("eth4",), 4096)


@pytest.mark.parametrize(
    ("interface_mtu", "mtu_bytes"), [(1500, 1024), (4191, 2048), (4192, 4096), (9000, 4096), (352, 256), (351, None)]
)
def test_the_packet_size_is_the_largest_that_fits_the_interface(
    sys: Sys, good_port: Path, interface_mtu: int, mtu_bytes: int | None
) -> None:
    sys.interface("eth4", interface_mtu)
    assert only(rdma_devices(sys.root)).ports[0].mtu_bytes == mtu_bytes


def test_files_that_are_missing_or_odd_are_told_as_unknown(sys: Sys) -> None:
    port = sys.card(numa_node="-1", lid="?", state="")
    write(port / "gids/0", "not an address")
    write(port / "gids/1", IPV4)  # without type and interface
    (sys.root / "class/infiniband/bare").mkdir()
    bare, card = rdma_devices(sys.root)
    assert (bare.ports, bare.numa_node, bare.verbs) == ((), None, None)
    assert (card.numa_node, card.ports[0].state, card.ports[0].lid, card.ports[0].mtu_bytes) == (None, "unknown", 0, None)
    assert card.ports[0].gids == (Gid(1, IPv6Address(IPV4), "", None),)
    assert not card.ports[0].gids[0].routable


def test_a_machine_without_a_card_gets_told_which_lanes_it_has(tmp_path: Path) -> None:
    (finding,) = doctor.rdma(tmp_path, tmp_path, "libnosuch.so")
    assert (finding.name, finding.state) == ("RDMA", "absent")
    assert "libnosuch.so is not installed" in finding.found
    assert "tcp" in finding.todo


@pytest.mark.usefixtures("good_port")
def test_a_card_without_its_library_says_what_to_install(sys: Sys) -> None:
    summary, _ = doctor.rdma(sys.root, sys.dev, "libnosuch.so")
    assert (summary.state, summary.todo.split()[-2:]) == ("limited", ["libibverbs1", "ibverbs-providers"])


@pytest.fixture
def _without_pyverbs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cards here are files; nothing may try to open them."""

    def missing(device: Device) -> None:
        raise ImportError

    monkeypatch.setattr(doctor, "verbs_limits", missing)


@pytest.mark.usefixtures("good_port", "_without_pyverbs")
def test_a_good_port_is_ok_and_shows_the_address_to_use(sys: Sys) -> None:
    summary, port = sys.findings()
    assert (summary.state, port.state, port.todo, port.name) == ("ok", "ok", "", "mlx5_0/1")
    assert "RoCE v2 GID 3 10.0.0.7 on eth4, 2 other GIDs, NUMA node 1, limits unknown" in port.found


@pytest.mark.usefixtures("_without_pyverbs")
def test_every_fault_of_a_port_comes_with_its_own_advice(sys: Sys, good_port: Path) -> None:
    faults = {
        "ip link set eth4 up": lambda: write(good_port / "state", "1: DOWN"),
        "MTU of 4192": lambda: sys.interface("eth4", 1500),
        "give eth4 an IP address": lambda: (good_port / "gids/3").unlink(),
        f"hand {sys.dev}/uverbs0": lambda: (sys.dev / "uverbs0").unlink(),
        "modprobe ib_uverbs": lambda: (sys.root / "class/infiniband_verbs/uverbs0/ibdev").unlink(),
    }
    for advice, make in faults.items():
        assert advice not in sys.findings()[1].todo
        make()
        assert (sys.findings()[1].state, advice in sys.findings()[1].todo) == ("limited", True), advice


@pytest.mark.usefixtures("_without_pyverbs")
def test_an_infiniband_port_is_told_by_its_lid_and_needs_no_ip_address(sys: Sys) -> None:
    port = sys.card(link_layer="InfiniBand", lid="0x2f")
    write(port / "gids/0", LINK_LOCAL)
    (finding,) = sys.findings()[1:]
    assert (finding.state, "LID 0x2f" in finding.found, "MTU unknown" in finding.found) == ("ok", True, True)
    write(port / "state", "2: INIT")
    assert "subnet manager" in sys.findings()[1].todo


@pytest.mark.usefixtures("good_port")
def test_a_device_that_cannot_be_opened_is_told_with_the_reason(sys: Sys, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(device: Device) -> None:
        raise OSError("mlx5_0: Operation not permitted")

    monkeypatch.setattr(doctor, "verbs_limits", refuse)
    assert "Operation not permitted" in sys.findings()[1].todo
