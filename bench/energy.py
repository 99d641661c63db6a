"""What the processor's packages and the GPUs took, where the kernel (RAPL) and the driver (NVML) say so."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pynvml

RAPL = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Energy:
    """Counters of all packages, or of all GPUs, at one moment, in microjoules; each wraps at `limits`."""

    counters: tuple[int, ...]
    limits: tuple[int, ...]

    def joules_until(self, later: Energy) -> float:
        """What was taken from here to `later`; a counter may have wrapped once."""
        pairs = zip(self.counters, later.counters, self.limits, strict=True)
        return sum((after - before) % (limit + 1) for before, after, limit in pairs) / 1e6


def read_energy() -> dict[str, Energy | str]:
    """The counters now of `packages` and of `gpus`, or why there are none."""
    return {"packages": read_packages(), "gpus": read_gpus()}


def read_gpus() -> Energy | str:
    """Of every GPU since its driver was loaded."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as e:
        return f"no NVML: {e}"
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        counters = tuple(1000 * int(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) for handle in handles)
    except pynvml.NVMLError as e:
        return f"NVML cannot be read: {e}"
    finally:
        pynvml.nvmlShutdown()
    return Energy(counters, (2**64 - 1,) * len(counters)) if counters else "NVML names no GPU"


def read_packages(root: Path = RAPL) -> Energy | str:
    """Of every processor package."""
    packages = sorted(root.glob("intel-rapl:[0-9]*"))
    packages = [p for p in packages if p.name.count(":") == 1]
    if not packages:
        return f"no RAPL: {root} names no package (virtual machines usually have none)"
    try:
        counters = tuple(int((p / "energy_uj").read_text()) for p in packages)
        limits = tuple(int((p / "max_energy_range_uj").read_text()) for p in packages)
    except (OSError, ValueError) as e:
        return f"RAPL cannot be read: {e}"
    return Energy(counters, limits)
