"""Copies of tables lie where they are told to, and how far ahead rows are fetched changes nothing but speed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from sidepool import _native
from sidepool.sidecar.config import SidecarConfig
from sidepool.sidecar.loader import place_copies
from sidepool.sidecar.numa import usable_nodes
from sidepool.wire.config import decode
from sidepool.wire.errors import ConfigError

HUGE_PAGE = 2 << 20
POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
DIM = 64
# Five huge pages and a tail.
ROWS = (5 * HUGE_PAGE + 4096) // (DIM * 4)


def mapped_table(file: Path, rows: NDArray[np.float32]) -> _native.TableSet:
    rows.tofile(file)
    tables = _native.TableSet(1, 1, 1)
    tables.add_table_file(0, str(file), 0, rows.shape[0], rows.shape[1], "fp32", "error", 0)
    tables.add_feature(0, 0, "sum", False)
    tables.seal()
    return tables


def some_rows() -> NDArray[np.float32]:
    return np.random.default_rng(1).standard_normal((ROWS, DIM), dtype=np.float32)


def assert_holds(tables: _native.TableSet, rows: NDArray[np.float32]) -> None:
    ids = np.arange(len(rows), dtype=np.int64)
    out = np.empty_like(rows)
    assert _native.pool(tables, 0, ids, np.ones(len(rows), np.int32), None, out) == (0, 0, -1, 0)
    np.testing.assert_array_equal(out, rows)


def mappings(field: str) -> int:
    """The sum of a field over this process's mappings, in bytes."""
    return sum(int(kib) << 10 for kib in re.findall(rf"^{field}:\s+(\d+) kB", Path("/proc/self/smaps").read_text(), re.M))


@contextmanager
def free_huge_pages(count: int) -> Iterator[None]:
    """That many pages of the reserved pool free, as root can have them; skips where that cannot be."""
    total = POOL / "nr_hugepages"
    try:
        before = int(total.read_text())
        free = int((POOL / "free_hugepages").read_text()) - int((POOL / "resv_hugepages").read_text())
        total.write_text(str(before + count - free))
    except OSError as e:
        pytest.skip(f"huge pages cannot be reserved here: {e}")
    try:
        if int((POOL / "free_hugepages").read_text()) != count:
            pytest.skip("the kernel found too few huge pages")
        yield
    finally:
        total.write_text(str(before))


def test_reserved_huge_pages_hold_a_table_and_go_back(tmp_path: Path) -> None:
    rows = some_rows()
    with free_huge_pages(5):
        tables = mapped_table(tmp_path / "rows", rows)
        tables.set_memory("hugetlb", [])
        tables.reserve()
        assert int((POOL / "resv_hugepages").read_text()) == 5
        assert tables.promote() == rows.nbytes
        assert mappings("Private_Hugetlb") == 5 * HUGE_PAGE
        assert_holds(tables, rows)
        del tables
        assert int((POOL / "free_hugepages").read_text()) == 5


def test_too_few_reserved_pages_are_refused_with_what_to_do(tmp_path: Path) -> None:
    rows = some_rows()
    with free_huge_pages(2):
        total = int((POOL / "nr_hugepages").read_text())
        tables = mapped_table(tmp_path / "rows", rows)
        tables.set_memory("hugetlb", [])
        with pytest.raises(_native.NativeError) as caught:
            tables.reserve()
        assert caught.value.args[1] == (
            f"hugetlb: needed {5 * HUGE_PAGE} bytes (5 huge pages of 2 MiB), available {2 * HUGE_PAGE} bytes (2); "
            f"as root: sysctl vm.nr_hugepages={total + 3}"
        )
        assert_holds(tables, rows)


def test_a_sidecar_without_enough_reserved_pages_says_which_setting_wants_them(tmp_path: Path) -> None:
    memory = {"huge_pages": "hugetlb", "numa": "off"}
    config = decode({"name": "sc0", "plan": "-", "shards": "-", "memory": memory}, SidecarConfig, where="test")
    with free_huge_pages(0), pytest.raises(ConfigError, match=r"^memory\.huge_pages: hugetlb: needed .* sysctl vm\.nr_hugepages="):
        place_copies(mapped_table(tmp_path / "rows", some_rows()), config)


def test_small_pages_are_had_by_asking_for_them(tmp_path: Path) -> None:
    rows = some_rows()
    before = mappings("AnonHugePages")
    tables = mapped_table(tmp_path / "rows", rows)
    tables.set_memory("off", [])
    assert tables.promote() == rows.nbytes
    assert mappings("AnonHugePages") == before
    assert_holds(tables, rows)


@pytest.mark.parametrize("spread", [False, True])
def test_rows_are_put_on_nodes(tmp_path: Path, spread: bool) -> None:
    numbers = [node.number for node in usable_nodes()]
    if not numbers or (spread and len(numbers) < 2):
        pytest.skip("needs two NUMA nodes" if spread else "needs a kernel with NUMA")
    rows = some_rows()
    tables = mapped_table(tmp_path / "rows", rows)
    tables.set_memory("transparent", numbers if spread else numbers[:1])
    tables.promote()
    if tables.placement_error:
        pytest.skip("this container may not place memory")
    policy = "interleave:" if spread else f"prefer:{numbers[0]} "
    assert policy in Path("/proc/self/numa_maps").read_text()
    assert_holds(tables, rows)


def test_a_node_that_is_not_there_is_said_to_be_refused_and_the_rows_are_held(tmp_path: Path) -> None:
    rows = some_rows()
    tables = mapped_table(tmp_path / "rows", rows)
    tables.set_memory("transparent", [1023])
    tables.promote()
    assert tables.placement_error != 0
    assert_holds(tables, rows)


@pytest.mark.parametrize("node", [-1, 1024])
def test_a_number_that_no_node_can_have_is_an_error(node: int) -> None:
    with pytest.raises(_native.NativeError, match=f"nodes: found {node}; allowed: 0 to 1023"):
        _native.TableSet(1, 1, 0).set_memory("transparent", [node])


def test_the_lookahead_changes_no_bit_of_a_result() -> None:
    rng = np.random.default_rng(2)
    rows = rng.standard_normal((70_000, 256), dtype=np.float32)  # above what is measured for
    tables = _native.TableSet(1, 1, 1)
    tables.add_table_array(0, rows, "error", 0)
    tables.add_feature(0, 0, "sum", False)
    tables.seal()
    lengths = rng.integers(0, 30, 200, dtype=np.int32)
    ids = rng.integers(0, len(rows), lengths.sum())
    found, ahead = [], []
    for wanted in (64, 6 << 10, 12 << 10, 1 << 20, 0):
        tables.choose_lookahead(wanted)
        out = np.empty((200, 256), np.float32)
        assert _native.pool(tables, 0, ids, lengths, None, out)[0] == 0
        found.append(out.tobytes())
        ahead.append(tables.rows_ahead(0))
    assert len(set(found)) == 1
    assert ahead[:4] == [4, 6, 12, 128]
    assert ahead[4] in (6, 12, 20, 32), "one of the candidates for rows of 1 KiB"


def test_small_sets_keep_the_constant_lookahead() -> None:
    tables = _native.TableSet(1, 2, 0)
    tables.add_table_array(0, np.zeros((10, 64), np.float32), "error", 0)
    tables.choose_lookahead(0)
    assert [tables.rows_ahead(i) for i in (0, 1)] == [48, 0]
