"""What `sidepool.wire.rdma_devices` reads from sysfs is what the verbs library tells; `doctor` calls the guest's devices good."""

from __future__ import annotations

import fcntl
import os
import struct
from ipaddress import IPv6Address
from pathlib import Path

import pytest
from cable import link_down
from pyverbs.device import Context, get_device_list
from verbs_peer import ibv

from sidepool import _native, doctor
from sidepool.wire.rdma_devices import Device, rdma_devices, verbs_limits

# _IOW('u', 0x42, struct udmabuf_create) of linux/udmabuf.h.
UDMABUF_CREATE = 0x40187542
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


def test_doctor_tells_what_the_driver_says_of_gpu_memory() -> None:
    # SoftRoCE of 6.1 has no dma-buf registration: asked without memory and with a real dma-buf, it says so.
    (told,) = [finding.found for finding in doctor.rdma() if finding.name == "rxeA/1"]
    assert told.endswith("registration of GPU memory (dma-buf): no (Operation not supported)")
    assert _native.rdma_dmabuf_refusal("rxeA") == "Operation not supported"
    with pytest.raises(_native.NativeError, match="found 'mlx5_9'; allowed: a device of this machine"):
        _native.rdma_dmabuf_refusal("mlx5_9")


@pytest.mark.skipif(not Path("/dev/udmabuf").exists(), reason="no udmabuf, which makes a dma-buf of memory")
def test_a_real_dma_buf_gets_the_answer_that_asking_without_one_gets() -> None:
    memory = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.truncate(memory, 4096)
    fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    with open("/dev/udmabuf", "rb") as maker:
        # With a buffer that it may change, the call returns what the kernel does: the dma-buf's descriptor.
        fd = fcntl.ioctl(maker, UDMABUF_CREATE, bytearray(struct.pack("=IIQQ", memory, 0, 0, 4096)), True)
    try:
        assert _native.rdma_dmabuf_refusal("rxeA", fd) == _native.rdma_dmabuf_refusal("rxeA")
    finally:
        os.close(fd)
        os.close(memory)


def test_doctor_calls_good_devices_good_and_says_how_to_bring_a_link_up() -> None:
    findings = {finding.name: finding for finding in doctor.rdma()}
    assert {finding.state for finding in findings.values()} == {"ok"}
    assert "RoCE v2 GID 1 10.9.0.1 on vA" in findings["rxeA/1"].found
    assert "queue pairs" in findings["rxeA/1"].found
    with link_down("vA"):
        findings = {finding.name: finding for finding in doctor.rdma()}
        assert (findings["rxeA/1"].state, "ip link set vA up" in findings["rxeA/1"].todo) == ("limited", True)
        assert findings["rxe0/1"].state == "ok"
