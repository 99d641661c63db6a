"""Which NUMA nodes a machine has, and what `memory.numa` makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sidepool.sidecar.numa import Node, Placement, parse_list, place, usable_nodes
from sidepool.wire.errors import ConfigError

TWO = [Node(0, (0, 1)), Node(1, (2, 3))]


def tree(directory: Path, cpus: dict[int, str], with_memory: str) -> Path:
    """What /sys/devices/system/node looks like, as far as it is read."""
    for number, text in cpus.items():
        (directory / f"node{number}").mkdir(parents=True)
        (directory / f"node{number}" / "cpulist").write_text(text + "\n")
    (directory / "has_memory").write_text(with_memory + "\n")
    return directory


@pytest.mark.parametrize(("text", "numbers"), [("0", [0]), ("0-3,8", [0, 1, 2, 3, 8]), ("0-1,4-5\n", [0, 1, 4, 5]), ("\n", [])])
def test_kernel_lists_are_read(text: str, numbers: list[int]) -> None:
    assert parse_list(text) == numbers


def test_nodes_have_memory_and_cpus_that_we_may_use(tmp_path: Path) -> None:
    # Node 2 has no memory, node 3 only memory (as CXL memory does), node 4 none of our CPUs.
    nodes = tree(tmp_path, {0: "0-3", 1: "4-7", 2: "8-9", 3: "", 4: "10-11"}, "0-1,3-4")
    assert usable_nodes(nodes, frozenset({1, 2, 5, 8})) == [Node(0, (1, 2)), Node(1, (5,))]


@pytest.mark.parametrize("damage", ["has_memory", "node0/cpulist"])
@pytest.mark.parametrize("text", [None, "0-", "zero"])
def test_a_tree_that_cannot_be_read_has_no_such_nodes(tmp_path: Path, damage: str, text: str | None) -> None:
    nodes = tree(tmp_path, {0: "0-3", 1: "4-7"}, "0-1")
    (nodes / damage).unlink()
    if text is not None:
        (nodes / damage).write_text(text)
    assert usable_nodes(nodes, frozenset(range(8))) == ([] if damage == "has_memory" else [Node(1, (4, 5, 6, 7))])


def test_this_machines_nodes_are_read() -> None:
    for node in usable_nodes():
        assert node.cpus


@pytest.mark.parametrize(
    ("choice", "nodes", "placement"),
    [
        ("auto", TWO, Placement((0, 1), ((0, 1), (2, 3)))),
        ("auto", TWO[:1], Placement()),
        ("auto", [], Placement()),
        ("off", TWO, Placement()),
        (1, TWO, Placement((1,), ((2, 3),))),
        (0, TWO[:1], Placement((0,), ((0, 1),))),
    ],
)
def test_engines_and_rows_are_placed(choice: Any, nodes: list[Node], placement: Placement) -> None:
    assert place(choice, nodes) == placement


@pytest.mark.parametrize(("nodes", "known"), [(TWO, "0, 1"), ([], "none that this process can see")])
def test_an_unknown_node_is_refused_with_those_there_are(nodes: list[Node], known: str) -> None:
    with pytest.raises(ConfigError, match=f"memory.numa: found 7; allowed: 'auto', 'off' or a node with memory .*: {known}"):
        place(7, nodes)
