"""NUMA nodes of this machine, and which of them engines and rows are put on."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sidepool.wire.errors import ConfigError

NODES = Path("/sys/devices/system/node")


@dataclass(frozen=True)
class Node:
    """A NUMA node with memory, and those of its CPUs that this process may use (at least one)."""

    number: int
    cpus: tuple[int, ...]


@dataclass(frozen=True)
class Placement:
    """Nodes that rows are spread over, and the CPUs of engine i: `cpus[i % len(cpus)]`. Empty: as the kernel likes."""

    nodes: tuple[int, ...] = ()
    cpus: tuple[tuple[int, ...], ...] = ()


def parse_list(text: str) -> list[int]:
    """The numbers of a kernel list such as `0-3,8`; raises `ValueError` on anything else."""
    numbers: list[int] = []
    for part in text.strip().split(","):
        first, dash, last = part.partition("-")
        if part:
            numbers += range(int(first), int(last if dash else first) + 1)
    return numbers


def usable_nodes(directory: Path = NODES, allowed: frozenset[int] | None = None) -> list[Node]:
    """Nodes with memory and a CPU out of `allowed` (default: this process's), by number; empty where the kernel tells of none.

    A node that cannot be read is passed over: a container may hide part of the tree.
    """
    cpus = frozenset(os.sched_getaffinity(0)) if allowed is None else allowed
    try:
        with_memory = frozenset(parse_list((directory / "has_memory").read_text()))
    except (OSError, ValueError):
        return []
    nodes = []
    for number in sorted(with_memory):
        try:
            ours = cpus.intersection(parse_list((directory / f"node{number}" / "cpulist").read_text()))
        except (OSError, ValueError):
            continue
        if ours:
            nodes.append(Node(number, tuple(sorted(ours))))
    return nodes


def place(choice: int | Literal["auto", "off"], nodes: list[Node]) -> Placement:
    """What `memory.numa` means on a machine with these nodes; `ConfigError` where it names another one."""
    if isinstance(choice, int):
        chosen = [node for node in nodes if node.number == choice]
        if not chosen:
            known = ", ".join(str(node.number) for node in nodes) or "none that this process can see"
            raise ConfigError(f"memory.numa: found {choice}; allowed: 'auto', 'off' or a node with memory and usable CPUs: {known}")
    elif choice == "off" or len(nodes) < 2:
        return Placement()
    else:
        chosen = nodes
    return Placement(tuple(node.number for node in chosen), tuple(node.cpus for node in chosen))
