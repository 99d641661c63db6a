"""The machines that a plan may use (`nodes.yaml`), and what they can do."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

from pydantic import Field

from sidepool.wire.config import FormatVersion, Frozen, load_yaml
from sidepool.wire.errors import ConfigError
from sidepool.wire.plan import Address, Name, SidecarAddress


class Nic(Frozen):
    """A network card and the NUMA node of its PCIe root (none: not said)."""

    name: Name
    gbps: Annotated[float, Field(gt=0, le=10_000)]
    numa: Annotated[int, Field(ge=0, le=1023)] | None = None


class CpuNode(Frozen):
    """A machine that runs one sidecar."""

    name: Name
    address: Address
    """Of its sidecar's control plane."""
    memory_bytes: Annotated[int, Field(gt=0, le=1 << 60)]
    """What tables may take."""
    cores: Annotated[int, Field(ge=1, le=4096)]
    nics: Annotated[tuple[Nic, ...], Field(min_length=1)]
    rack: Name = "rack-0"
    """Machines of a rack share an access switch."""
    pod: Name = "pod-0"
    """A service never spans pods."""
    cost: Annotated[float, Field(gt=0, le=1e15)] = 1.0

    @property
    def nic(self) -> Nic:
        """The one that its sidecar uses: the fastest."""
        return max(self.nics, key=lambda nic: nic.gbps)

    @property
    def bytes_per_s(self) -> float:
        return self.nic.gbps * 1e9 / 8

    @property
    def sidecar(self) -> SidecarAddress:
        return SidecarAddress(name=self.name, address=self.address, node=self.name)


class Gpu(Frozen):
    """A GPU and the NUMA node of its PCIe root (none: not said)."""

    name: Name
    numa: Annotated[int, Field(ge=0, le=1023)] | None = None


class GpuNode(Frozen):
    """A machine that runs rankers."""

    name: Name
    gpus: Annotated[tuple[Gpu, ...], Field(min_length=1)]
    nics: Annotated[tuple[Nic, ...], Field(min_length=1)]
    rack: Name = "rack-0"
    pod: Name = "pod-0"

    def nic_of(self, gpu: Gpu) -> Nic:
        """The fastest card on the GPU's own NUMA node, else the fastest."""
        near = [nic for nic in self.nics if gpu.numa is not None and nic.numa == gpu.numa]
        return max(near or self.nics, key=lambda nic: nic.gbps)


class Inventory(Frozen):
    """Everything there is."""

    version: FormatVersion = 1
    cpu_nodes: Annotated[tuple[CpuNode, ...], Field(min_length=1, max_length=4096)]
    gpu_nodes: tuple[GpuNode, ...] = ()


def load_inventory(path: Path) -> Inventory:
    """Read and check an inventory; raises `ConfigError`."""
    inventory = load_yaml(path, Inventory)
    for kind, field in (("cpu_nodes", "name"), ("cpu_nodes", "address"), ("gpu_nodes", "name")):
        counts = Counter(getattr(node, field) for node in getattr(inventory, kind))
        if twice := [value for value, n in counts.items() if n > 1]:
            raise ConfigError(f"{path}: {kind}: {field}: {twice[0]!r} appears more than once; allowed: a different one per node")
    return inventory
