"""`sidepool doctor`: what this machine offers, each finding with what to do about it. Nothing is changed."""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from sidepool.wire.rdma_devices import (
    DEV,
    MTUS_BYTES,
    ROCE_HEADER_BYTES,
    ROCE_V2,
    SYS,
    Device,
    Port,
    VerbsLimits,
    rdma_devices,
    verbs_limits,
)

State = Literal["ok", "limited", "absent"]

GIB = 1 << 30
# Dims 16 to 128 in fp32, 32 to 256 in fp16.
LOOKAHEAD_ROW_BYTES = (64, 128, 256, 512)
# What Triton's documentation starts its containers with (--shm-size=1g); Docker's own default is 64 MB.
WANTED_SHM_BYTES = GIB
# A card has a GID per address and VLAN, up to hundreds; a line shows a few.
SHOWN_GIDS = 3


@dataclass(frozen=True)
class Finding:
    """One line of the report. `limited`: works, but slower or smaller than it could. `todo` is empty when `ok`."""

    name: str
    state: State
    found: str
    todo: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `sidepool doctor`."""
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the findings; 0 always, since nothing here is needed by every deployment."""
    findings = examine()
    if args.json:
        print(json.dumps([asdict(f) for f in findings], indent=1))
    else:
        _print(findings)
    return 0


def examine() -> list[Finding]:
    """Every finding, in the order in which it is printed. Imports torch, which takes a few seconds."""
    found: list[Finding] = []
    for check in CHECKS:
        result = check()
        found += result if isinstance(result, list) else [result]
    return found


def simd() -> Finding:
    """The instruction set that gather-pool runs on."""
    try:
        from sidepool import _native
    except ImportError as e:
        return Finding("SIMD", "absent", f"the native core cannot be imported: {e}", "build it: make native")
    level, levels = _native.simd_level(), ", ".join(_native.simd_levels())
    if level == "scalar":
        return Finding(
            "SIMD",
            "limited",
            f"scalar on {platform.machine()}",
            "pooling is several times faster on a CPU with AVX2, AVX-512 or NEON",
        )
    return Finding("SIMD", "ok", f"{level} (can run: {levels})")


def transparent_huge_pages(setting: Path = Path("/sys/kernel/mm/transparent_hugepage/enabled")) -> Finding:
    """Whether table memory can get huge pages by madvise, which is how the row store asks for them."""
    try:
        chosen = setting.read_text().split("[")[1].split("]")[0]
    except (OSError, IndexError):
        return Finding(
            "huge pages", "absent", f"no {setting}", "use a kernel with transparent huge pages: random rows then miss the TLB less"
        )
    if chosen == "never":
        return Finding("huge pages", "limited", "transparent huge pages: never", f"as root: echo madvise > {setting}")
    return Finding("huge pages", "ok", f"transparent huge pages: {chosen}")


def reserved_huge_pages(meminfo: Path = Path("/proc/meminfo")) -> Finding:
    """Pages reserved for hugetlbfs, which a sidecar takes with `memory.huge_pages: hugetlb`; unused ones are lost to others."""
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
    total, free, size = (fields.get(f, "0").strip() for f in ("HugePages_Total", "HugePages_Free", "Hugepagesize"))
    return Finding("hugetlbfs", "ok", f"{total} pages of {size} reserved, {free} free (needed only for memory.huge_pages: hugetlb)")


def memlock() -> Finding:
    """How much memory may be pinned, which RDMA registration needs."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return Finding("memlock", "ok", "unlimited")
    todo = "only rdma needs more: ulimit -l unlimited, LimitMEMLOCK=infinity (systemd), --ulimit memlock=-1 (Docker)"
    return Finding("memlock", "limited", f"{soft >> 10} KiB", todo)


def lane_shm() -> Finding:
    """Makes a sealed memfd, as the shm lane does."""
    try:
        descriptor = os.memfd_create("sidepool-doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(descriptor, 4096)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        finally:
            os.close(descriptor)
    except OSError as e:
        return Finding(
            "lane shm",
            "absent",
            f"a sealed memfd cannot be made: {e}",
            "use the tcp lane, or a kernel and seccomp profile with memfd_create",
        )
    return Finding("lane shm", "ok", "sealed memfd works; for processes of one host or pod")


def lane_tcp() -> Finding:
    """Opens a listening socket on loopback."""
    try:
        with socket.create_server(("127.0.0.1", 0)):
            return Finding("lane tcp", "ok", "loopback sockets work")
    except OSError as e:
        return Finding("lane tcp", "absent", f"no loopback socket: {e}", "bring the loopback interface up")


def lane_grpc() -> Finding:
    """Looks for grpcio."""
    version = _version("grpcio")
    if version is None:
        return Finding("lane grpc", "absent", "grpcio is not installed", "pip install grpcio")
    return Finding("lane grpc", "ok", f"grpcio {version}")


def rdma_lane() -> Finding:
    """Whether this build has the rdma lane, and the library that it loads when it is used."""
    return _optional_part("lane rdma", "libibverbs", "rdma_unavailable")


def grpc_load() -> Finding:
    """Whether this build can put load on gRPC servers, and the library that it loads for that."""
    return _optional_part("gRPC load", "libnghttp2", "grpc_load_unavailable")


def _optional_part(name: str, library: str, ask: str) -> Finding:
    """A part of the native core that a build, or a machine without its library, may lack; `ask` says why."""
    try:
        from sidepool import _native
    except ImportError as e:
        return Finding(name, "absent", f"the native core cannot be imported: {e}", "build it: make native")
    found, _, todo = getattr(_native, ask)().partition("; ")
    return Finding(name, "absent" if found else "ok", found or f"built in; {library} loads", todo)


def rdma(root: Path = SYS, dev: Path = DEV, library: str = "libibverbs.so.1") -> list[Finding]:
    """Looks for verbs devices and the library that drives them; then every port."""
    devices = rdma_devices(root)
    try:
        ctypes.CDLL(library)
        loads = True
    except OSError:
        loads = False
    says = f"{library} {'loads' if loads else 'is not installed'}"
    if not devices:
        todo = "use the shm lane within a host, the tcp lane between hosts; for a card that should be here, see docs/rdma.md"
        return [Finding("RDMA", "absent", f"no device in {root}/class/infiniband; {says}", todo)]
    todo = "" if loads else "install rdma-core's libraries: apt-get install libibverbs1 ibverbs-providers"
    summary = Finding("RDMA", "ok" if loads else "limited", f"{', '.join(device.name for device in devices)}; {says}", todo)
    return [summary, *(finding for device in devices for finding in _rdma_ports(device, dev))]


def _rdma_ports(device: Device, dev: Path) -> Iterator[Finding]:
    """A finding for each port: link, packet size, addresses and, where pyverbs can be asked, limits."""
    todo, limits = [], None
    if device.verbs is None:
        todo.append("load the kernel's user interface: modprobe ib_uverbs")
    elif not os.access(dev / device.verbs, os.R_OK | os.W_OK):
        todo.append(f"hand {dev / device.verbs} to this process: --device {dev} (Docker), an RDMA device plugin (Kubernetes)")
    else:
        try:
            limits = verbs_limits(device)
        except ImportError:
            pass  # limits are told where they can be
        except OSError as e:
            todo.append(f"the device cannot be opened: {e}")
    gpu_memory = _gpu_memory(device) if not todo else "unknown"
    for port in device.ports:
        mtu_bytes = limits.active_mtus_bytes[port.number] if limits else port.mtu_bytes
        advice = "; ".join([*todo, *_port_advice(port, mtu_bytes)])
        told = [port.link_layer, port.state, port.rate, f"MTU {mtu_bytes or 'unknown'}", _addresses(port)]
        told.append("NUMA node unknown" if device.numa_node is None else f"NUMA node {device.numa_node}")
        told.append(_limits(limits) if limits else "limits unknown without pyverbs")
        told.append(f"registration of GPU memory (dma-buf): {gpu_memory}")
        yield Finding(f"{device.name}/{port.number}", "limited" if advice else "ok", ", ".join(told), advice)


def _gpu_memory(device: Device) -> str:
    """Whether the device's driver can register memory that another device exports."""
    try:
        from sidepool import _native

        refusal = _native.rdma_dmabuf_refusal(device.name)
    except ImportError:
        return "unknown without the native core"
    except _native.NativeError as e:
        return f"unknown: {e.args[1]}"
    return f"no ({refusal})" if refusal else "yes"


def _limits(limits: VerbsLimits) -> str:
    queues = f"{limits.queue_pairs} queue pairs of {limits.requests_per_queue} requests"
    return f"at most {queues}, {limits.registrations} registrations"


def _port_advice(port: Port, mtu_bytes: int | None) -> Iterator[str]:
    interfaces = " ".join(port.interfaces) or "its network interface"
    if port.state != "ACTIVE":
        ethernet = f"ip link set {interfaces} up; look at the cable and the switch's port"
        yield ethernet if port.link_layer == "Ethernet" else "look at the cable, and for a subnet manager (opensm)"
    if port.link_layer != "Ethernet":
        return
    if not any(gid.routable for gid in port.gids):
        yield f"give {interfaces} an IP address: that makes a RoCE v2 GID"
    if mtu_bytes is not None and mtu_bytes < MTUS_BYTES[-1]:
        wanted = MTUS_BYTES[-1] + ROCE_HEADER_BYTES
        yield f"set an MTU of {wanted} or more on {interfaces} and the switch: packets carry {mtu_bytes} of {MTUS_BYTES[-1]} bytes"


def _addresses(port: Port) -> str:
    """The GIDs that rankers and sidecars would use; how many others."""
    if port.link_layer != "Ethernet":
        return f"LID {port.lid:#x}"
    best = [gid for gid in port.gids if gid.routable] or [gid for gid in port.gids if gid.type == ROCE_V2]
    told = [f"{gid.type} GID {gid.index} {gid} on {gid.interface}" for gid in best[:SHOWN_GIDS]]
    if len(port.gids) > len(told):
        told.append(f"{len(port.gids) - len(told)} other GIDs")
    return ", ".join(told) or "no GID"


def torch() -> Finding:
    """Imports torch and asks for CUDA devices."""
    version = _version("torch")
    if version is None:
        return Finding(
            "torch", "absent", "not installed", "pip install torch; partitioning and the ranker need it, sidecars do not"
        )
    import torch as module

    if not module.cuda.is_available():
        built = module.version.cuda
        why = "this is a CPU build" if built is None else f"built for CUDA {built}, but no usable GPU or driver"
        return Finding("torch", "limited", f"{module.__version__}, CPU only", f"{why}; the dense half then runs on the CPU")
    names = ", ".join(module.cuda.get_device_name(i) for i in range(module.cuda.device_count()))
    return Finding("torch", "ok", f"{module.__version__}, {names}")


def triton() -> Finding:
    """Looks for the wheel that carries Triton, and for a tritonserver on PATH."""
    from sidepool.bench.triton_server import WHEEL, missing

    reason, on_path = missing(), shutil.which("tritonserver")
    if reason is None:
        return Finding("Triton", "ok", f"{WHEEL} {_version(WHEEL)} carries a server for this Python")
    if on_path:
        return Finding(
            "Triton", "limited", f"{on_path}; {reason}", "models can be served by it; the demo and the tests need the wheel"
        )
    return Finding("Triton", "absent", reason, f"pip install {WHEEL} (make venv does)")


def lookahead() -> Finding:
    """Measures, as a sidecar does at its start, how far ahead rows of some sizes are best fetched. Takes about 0.1 s."""
    try:
        from sidepool import _native
    except ImportError as e:
        return Finding("lookahead", "absent", f"the native core cannot be imported: {e}", "build it: make native")
    rows = _native.measure_lookahead([size // 4 for size in LOOKAHEAD_ROW_BYTES])
    found = ", ".join(f"{n} of {size} bytes" for size, n in zip(LOOKAHEAD_ROW_BYTES, rows, strict=True))
    return Finding("lookahead", "ok", f"rows fetched ahead: {found}")


def cores() -> Finding:
    """Cores this process may use."""
    return Finding("cores", "ok", f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} usable")


def numa(directory: Path = Path("/sys/devices/system/node"), allowed: frozenset[int] | None = None) -> Finding:
    """NUMA nodes, and whether memory can be placed on them: asks for one page on the first."""
    from sidepool.sidecar.numa import usable_nodes

    nodes = usable_nodes(directory, allowed)
    if not nodes:
        return Finding("NUMA", "ok", f"no nodes in {directory}; nothing is placed")
    found = "; ".join(f"node {node.number}: {len(node.cpus)} usable cores" for node in nodes)
    refusal = _refused_placement(nodes[0].number)
    if refusal and len(nodes) > 1:
        todo = "the kernel or a seccomp profile forbids mbind (Docker: --cap-add SYS_NICE); rows then lie where the kernel likes"
        return Finding("NUMA", "limited", f"{found}; placement refused: {refusal}", todo)
    return Finding("NUMA", "ok", found)


def _refused_placement(node: int) -> str:
    """Why rows cannot be put on `node`; empty where they can."""
    import numpy as np

    from sidepool import _native

    tables = _native.TableSet(1, 1, 0)
    tables.set_memory("transparent", [node])
    tables.add_table_array(0, np.zeros((1, 1), np.float32), "error", 0)
    return os.strerror(tables.placement_error) if tables.placement_error else ""


def shared_memory(mount: Path = Path("/dev/shm")) -> Finding:
    """Size of /dev/shm, where Triton's Python backend keeps every tensor in flight."""
    try:
        usage = shutil.disk_usage(mount)
    except OSError as e:
        return Finding("/dev/shm", "absent", str(e), "mount a tmpfs there: Triton's Python backend cannot start without it")
    found = f"{usage.total >> 20} MiB, {usage.free >> 20} MiB free"
    if usage.free < WANTED_SHM_BYTES:
        return Finding(
            "/dev/shm",
            "limited",
            found,
            "give Triton's Python backend 1 GiB: --shm-size=1g (Docker), an emptyDir with medium: Memory (Kubernetes)",
        )
    return Finding("/dev/shm", "ok", found)


CHECKS: tuple[Callable[[], Finding | list[Finding]], ...] = (
    simd,
    transparent_huge_pages,
    reserved_huge_pages,
    memlock,
    lane_shm,
    lane_tcp,
    lane_grpc,
    rdma_lane,
    rdma,
    grpc_load,
    torch,
    triton,
    lookahead,
    cores,
    numa,
    shared_memory,
)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _print(findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.text import Text

    colours = {"ok": "green", "limited": "yellow", "absent": "red"}
    console = Console(soft_wrap=True)
    width = max(len(f.name) for f in findings) + 1
    for f in findings:
        console.print(Text.assemble((f"{f.state:<8}", colours[f.state]), (f"{f.name:<{width}}", "bold"), f.found))
        if f.todo:
            console.print(Text(f"{'':<{8 + width}}-> {f.todo}", style="dim"))
