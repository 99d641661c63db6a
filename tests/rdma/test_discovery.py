"""What `sidepool.wire.rdma_devices` reads from sysfs is what the verbs library tells; `doctor` calls the guest's devices good."""

from __future__ import annotations

from ipaddress import IPv6Address

import pytest
from cable import link_down
from pyverbs.device import Context, get_device_list
from verbs_peer import ibv

from sidepool import doctor
from sidepool.wire.rdma_devices import Device, rdma_devices, verbs_limits

DEVICES = {device.name: device for device in rdma_devices()}


def test_the_same_devices_are_found() -> None:
    assert DEVICES.keys() == {device.name.decode() for device in get_device_list()} >= {"rxe0", "rxeA", "rxeB"}


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_ports_addresses_and_packet_sizes_are_those_of_the_verbs_library(device: Device) -> None:
    (port,) = device.ports
    with Context(name=device.name) as context:
        told = context.query_port(port.number)
        assert (port.state, port.link_layer) == ("ACTIVE", "Ethernet")
        assert (told.state, told.link_layer) == (ibv.IBV_PORT_ACTIVE, ibv.IBV_LINK_LAYER_ETHERNET)
        assert port.mtu_bytes == verbs_limits(device).active_mtus_bytes[1] == 4096
        for gid in port.gids:
            assert gid.address == IPv6Address(str(context.query_gid(port.number, gid.index)))
            assert gid.type == "RoCE v2"
            assert context.query_gid_type(port.number, gid.index) == ibv.IBV_GID_TYPE_SYSFS_ROCE_V2


def test_the_limits_are_the_drivers() -> None:
    limits = verbs_limits(DEVICES["rxe0"])
    with Context(name="rxe0") as context:
        told = context.query_device()
    assert (limits.queue_pairs, limits.requests_per_queue) == (told.max_qp, told.max_qp_wr)
    assert (limits.completions_per_queue, limits.registrations) == (told.max_cqe, told.max_mr)


def test_doctor_calls_good_devices_good_and_says_how_to_bring_a_link_up() -> None:
    findings = {finding.name: finding for finding in doctor.rdma()}
    assert {finding.state for finding in findings.values()} == {"ok"}
    assert "RoCE v2 GID 1 10.9.0.1 on vA" in findings["rxeA/1"].found
    assert "queue pairs" in findings["rxeA/1"].found
    with link_down("vA"):
        findings = {finding.name: finding for finding in doctor.rdma()}
        assert (findings["rxeA/1"].state, "ip link set vA up" in findings["rxeA/1"].todo) == ("limited", True)
        assert findings["rxe0/1"].state == "ok"
