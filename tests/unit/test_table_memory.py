"""Tables take their own bytes of memory and little more, also while they are promoted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sidepool import _native

MIB = 1 << 20
# What is promised for a sidecar, without the constant that its code and buffers may take.
FACTOR = 1.10

# In a process of its own, whose memory nobody else changes. /proc/self/clear_refs resets the high-water mark (man 5 proc).
PROGRAM = """
import sys
import numpy as np
from sidepool import _native

count, rows, directory = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]

def resident(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))

tables = _native.TableSet(1, count, count)
for i in range(count):
    tables.add_table_file(i, f"{directory}/{i}", 8, rows, 64, "fp32", "error", 0)
    tables.add_feature(i, i, "sum", False)
tables.seal()
before = resident("VmRSS")
ids, out = np.arange(rows), np.empty((1, 64), np.float32)
for i in range(count):  # every page is resident when promotion begins
    assert _native.pool(tables, i, ids, np.array([rows], np.int32), None, out)[0] == 0
open("/proc/self/clear_refs", "w").write("5")
assert tables.promote() == tables.bytes
print(resident("VmHWM") - before, resident("VmRSS") - before, tables.bytes)
each = np.empty((rows, 64), np.float32)
for i in range(count):  # every row once: nothing was lost between two slices
    assert _native.pool(tables, i, ids, np.ones(rows, np.int32), None, each)[0] == 0
    assert (each == ids[:, None]).all()
"""


def test_ids_past_2_31_reach_their_rows(tmp_path: Path) -> None:
    rows, dim = (1 << 31) + 5, 3
    file = tmp_path / "rows"
    with file.open("wb") as sparse:  # 26 GB of which the disk holds a page
        sparse.truncate(rows * dim * 4)
        sparse.seek((rows - 1) * dim * 4)
        sparse.write(np.array([1, 2, 3], np.float32).tobytes())
    tables = _native.TableSet(1, 1, 1)
    tables.add_table_file(0, str(file), 0, rows, dim, "fp32", "error", 0)
    tables.add_feature(0, 0, "sum", False)
    tables.seal()
    client = _native.LookupClient(
        epoch=1, sidecars=1, spin_us=0, degrade=False, rows=np.array([rows]), dims=np.array([dim], np.int32), poolings=["sum"],
        weighted=[False], out_of_range=["error"], sidecar_of_feature=np.zeros(1, np.int32),
    )  # fmt: skip
    client.attach_local(0, tables)
    verdicts, timings = np.zeros((2, 5), np.int64), np.zeros((2, 6), np.int64)
    out = np.full((3, dim), -1, np.float32)
    parts = [(np.array([[rows - 1], [rows // 2]]), None, None), (np.array([[rows]]), None, None)]
    assert client.lookup(parts, out, [], 60 * 10**9, 0, b"", verdicts, timings) == (0, -1)
    client.close()
    assert out.tolist() == [[1, 2, 3], [0, 0, 0], [0, 0, 0]]
    assert verdicts[:, [0, 4]].tolist() == [[0, 0], [1, rows]]


@pytest.mark.parametrize(("count", "megabytes"), [(1, 256), (50, 2.1)])
def test_promotion_never_holds_the_rows_twice(tmp_path: Path, count: int, megabytes: float) -> None:
    rows = int(megabytes * MIB) // 256
    for i in range(count):
        (tmp_path / str(i)).write_bytes(bytes(8) + np.repeat(np.arange(rows, dtype=np.float32), 64).tobytes())
    command = [sys.executable, "-c", PROGRAM, str(count), str(rows), str(tmp_path)]
    peak, settled, table_bytes = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    slice_bytes = 64 * MIB  # of the file, given back only when it has been copied
    assert settled <= FACTOR * table_bytes
    assert peak <= FACTOR * table_bytes + slice_bytes
