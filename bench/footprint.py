"""What a process holds, read from /proc: memory and descriptors."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

_KINDS = {"VmRSS": "rss", "RssAnon": "anonymous", "RssFile": "file", "RssShmem": "shared"}


@dataclass(frozen=True)
class Footprint:
    """Resident bytes by kind, and open descriptors by what they refer to."""

    rss: int
    anonymous: int
    file: int
    shared: int
    descriptors: int
    sockets: int
    lane_files: int
    """memfds of shm lanes, held as descriptors or mapped."""


def footprint(pid: int) -> Footprint:
    """What process `pid` holds now; raises `ProcessLookupError` or `FileNotFoundError` when it is gone."""
    process = Path(f"/proc/{pid}")
    memory = dict.fromkeys(_KINDS.values(), 0)
    for line in (process / "status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in _KINDS:
            memory[_KINDS[name]] = int(value.split()[0]) << 10
    targets = []
    for descriptor in (process / "fd").iterdir():
        try:
            targets.append(os.readlink(descriptor))
        except FileNotFoundError:
            continue  # closed meanwhile
    mapped = sum("memfd:sidepool-lane" in line for line in (process / "maps").read_text().splitlines())
    return Footprint(
        **memory,
        descriptors=len(targets),
        sockets=sum(target.startswith("socket:") for target in targets),
        lane_files=mapped + sum("memfd:sidepool-lane" in target for target in targets),
    )
