"""What the processor's packages took, where the kernel says so (RAPL). GPUs are not read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

RAPL = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Energy:
    """Counters of all packages at one moment, in microjoules; each wraps at `limits`."""

    counters: tuple[int, ...]
    limits: tuple[int, ...]

    def joules_until(self, later: Energy) -> float:
        """What was taken from here to `later`; a counter may have wrapped once."""
        pairs = zip(self.counters, later.counters, self.limits, strict=True)
        return sum((after - before) % (limit + 1) for before, after, limit in pairs) / 1e6


def read_energy(root: Path = RAPL) -> Energy | str:
    """The counters now, or why there are none."""
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
