"""`sidepool bench pool` measures what it says: the same lookups for everyone, and figures that follow from the times."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fbgemm import needs_fbgemm

from sidepool import _native
from sidepool.__main__ import main
from sidepool.bench import pool_cases
from sidepool.bench.pool_cases import Batch, Shape, encode, make_batches, make_traces
from sidepool.bench.pool_report import Case, summarise

SMALL = Shape("small", rows=300, dim=24, batch=4, ids=(1, 7, 3))


def table_set(rows: dict[int, np.ndarray]) -> _native.TableSet:
    tables = _native.TableSet(1, len(rows), len(rows))
    for t, content in rows.items():
        tables.add_table_array(t, content, "error", 0)
        tables.add_feature(t, t, "sum", False)
    tables.seal()
    return tables


@pytest.fixture
def rows() -> dict[int, np.ndarray]:
    random = np.random.default_rng(3)
    return {t: random.standard_normal((SMALL.rows, SMALL.dim), np.float32) for t in range(SMALL.tables)}


def pooled_by_numpy(batch: Batch, rows: dict[int, np.ndarray]) -> np.ndarray:
    bags = np.split(batch.values, np.cumsum(batch.lengths)[:-1])
    blocks = [[rows[t][bags[t * SMALL.batch + b]].sum(axis=0) for b in range(SMALL.batch)] for t in range(SMALL.tables)]
    return np.array(blocks, np.float32)


def test_prepared_frames_pool_what_numpy_pools(rows: dict[int, np.ndarray]) -> None:
    batches = make_batches(SMALL, make_traces("uniform", SMALL, 1))[:5]
    frames = _native.PreparedFrames(table_set(rows), encode(SMALL, batches, [0] * SMALL.tables)[0])
    assert len(frames) == 5
    for i, batch in enumerate(batches):
        assert frames.serve(i, 1) == 0
        # 4 bags x 24 floats are whole cache lines: no padding between the blocks.
        found = np.frombuffer(frames.payload(), np.float32).reshape(SMALL.tables, SMALL.batch, SMALL.dim)
        np.testing.assert_allclose(found, pooled_by_numpy(batch, rows), rtol=1e-5, atol=1e-5)


def test_halves_of_a_batch_add_up_to_it(rows: dict[int, np.ndarray]) -> None:
    batch = make_batches(SMALL, make_traces("uniform", SMALL, 1))[0]
    halves = encode(SMALL, [batch], [0, 1, 0])
    blocks = []
    for frames in halves:
        prepared = _native.PreparedFrames(table_set(rows), frames)
        prepared.serve(0, 1)
        blocks.append(np.frombuffer(prepared.payload(), np.float32).reshape(-1, SMALL.batch, SMALL.dim))
    found = np.stack([blocks[0][0], blocks[1][0], blocks[0][1]])
    np.testing.assert_allclose(found, pooled_by_numpy(batch, rows), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dim", [32, 25])  # rows of two whole cache lines, and rows that begin and end anywhere
def test_the_ceiling_reads_something_of_every_cache_line_of_every_row(dim: int) -> None:
    shape = Shape("lines", rows=64, dim=dim, batch=2, ids=(3, 5))
    random = np.random.default_rng(3)
    held = {t: random.standard_normal((64, dim), np.float32) for t in range(2)}
    batch = make_batches(shape, make_traces("uniform", shape, 1))[0]
    expected, at = 0, 0
    for t, ids in enumerate(shape.ids):
        for row in batch.values[at : at + ids * shape.batch]:
            content = held[t][row].view(np.uint8)
            expected ^= int(np.bitwise_xor.reduce(content[::64])) ^ (int(content[-1]) if dim % 16 else 0)
        at += ids * shape.batch
    frames = _native.PreparedFrames(table_set(held), encode(shape, [batch], [0, 0])[0])
    assert [frames.read_rows(0, 1, ahead) for ahead in (1, 128, 1 << 20)] == [expected] * 3


def test_prepared_frames_refuse_what_they_could_not_serve(rows: dict[int, np.ndarray]) -> None:
    tables = table_set(rows)
    with pytest.raises(_native.NativeError, match="not a request frame"):
        _native.PreparedFrames(tables, [b"nonsense"])
    wide = Shape("wide", rows=1000, dim=SMALL.dim, batch=1, ids=(1,) * 3)
    outside = Batch(np.array([0, 999, 0]), np.ones(3, np.int32))
    with pytest.raises(_native.NativeError, match="id 999 is outside its table"):
        _native.PreparedFrames(tables, encode(wide, [outside], [0] * 3)[0])
    more = Shape("more", rows=SMALL.rows, dim=SMALL.dim, batch=1, ids=(1,) * 4)
    fourth = Batch(np.zeros(4, np.int64), np.ones(4, np.int32))
    with pytest.raises(_native.NativeError, match="feature 3 is not held"):
        _native.PreparedFrames(tables, encode(more, [fourth], [0] * 4)[0])
    frames = _native.PreparedFrames(tables, [])
    with pytest.raises(IndexError):
        frames.serve(0, 1)


def test_batches_follow_the_traces_and_begin_again_at_their_end() -> None:
    batches = make_batches(SMALL, [np.arange(5), np.arange(10, 300), np.arange(7)])
    first = [batch.values[: SMALL.batch] for batch in batches[:3]]
    np.testing.assert_array_equal(np.concatenate(first), [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1])
    np.testing.assert_array_equal(batches[0].values[4:32], np.arange(10, 38))
    np.testing.assert_array_equal(batches[0].lengths, [1] * 4 + [7] * 4 + [3] * 4)


def case(threads: int, ours_us: float, fbgemm_us: float, torch_us: float | None = None) -> Case:
    return Case(SMALL, "uniform", "fp32", threads, ours_us, fbgemm_us, None, torch_us, ceiling_us=ours_us / 2)


def test_ratios_means_and_scaling_follow_from_the_times() -> None:
    summary = summarise([case(1, 10, 20), case(2, 5, 40, torch_us=15)])
    assert summary["fp32, 1 thread"] == {
        "vs_fbgemm": {"geometric_mean": 2, "worst": 2},
        "vs_ceiling": {"geometric_mean": 0.5, "worst": 0.5},
    }
    assert summary["fp32, 2 threads"]["vs_torch"] == {"geometric_mean": 3, "worst": 3}
    assert summary["two threads over one"] == {"geometric_mean": 2, "worst": 2}


@needs_fbgemm
def test_the_command_measures_everyone_and_writes_json_and_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sidepool.bench import pool

    shapes = (SMALL, Shape("other", rows=1000, dim=16, batch=2, ids=(2, 2)))
    monkeypatch.setattr(pool, "SHAPES", shapes)
    monkeypatch.setattr(pool_cases, "CYCLE_BYTES", 1 << 16)
    assert main(["bench", "pool", "--quick", "--json", str(tmp_path / "r.json"), "--plot", str(tmp_path / "r.png")]) == 0
    results = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert {"cpu", "commit", "seed", "null_us", "summary", "cases"} <= set(results)
    assert len(results["cases"]) == len(shapes) * len(pool.SPARSE_TYPES) * 2
    for found in results["cases"]:
        assert found["vs_fbgemm"] == pytest.approx(found["fbgemm_us"] / found["ours_us"], rel=0.05, abs=0.05)
        assert found["ceiling_us"] > 0
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


def test_without_fbgemm_the_other_benchmarks_are_there_and_this_one_says_what_it_needs() -> None:
    program = "import sys; sys.modules['fbgemm_gpu'] = None; from sidepool.__main__ import main; main(sys.argv[1:])"

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-W", "error", "-c", program, "bench", *words], capture_output=True, text=True)

    assert run("lane", "--help").returncode == 0
    refused = run("pool", "--quick")
    assert refused.returncode == 2
    assert "needs the package fbgemm_gpu, which is not installed" in refused.stderr
