"""How much memory this process may still take."""

from __future__ import annotations

from pathlib import Path

MEMORY_FILE = Path("/proc/meminfo")
# cgroup v2, as containers see their own.
CGROUP = Path("/sys/fs/cgroup")


def available_memory_bytes() -> int:
    """What the kernel says is available, or what the container's limit leaves, whichever is less. File pages count as free."""
    fields = dict(line.split(":", 1) for line in MEMORY_FILE.read_text(encoding="utf-8").splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    try:
        limit = (CGROUP / "memory.max").read_text(encoding="utf-8").strip()
        if limit.isdigit():
            stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text(encoding="utf-8").splitlines())
            used = int((CGROUP / "memory.current").read_text(encoding="utf-8"))
            available = min(available, int(limit) - used + int(stat["active_file"]) + int(stat["inactive_file"]))
    except OSError:
        pass  # no limit of its own
    return available
