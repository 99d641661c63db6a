"""A sidecar serves exactly what the plan places on it, and nothing whose bytes changed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from small_artifact import OTHER_SIDECAR, SIDECAR, write_small_artifact

from sidepool import _native
from sidepool.sidecar.shards import LoadCancelled, load_tables
from sidepool.wire import shard_reader
from sidepool.wire.errors import PlanError, ShardCorrupt


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_the_tables_of_this_sidecar_are_pooled_as_numpy_pools_them(tmp_path: Path) -> None:
    artifact = write_small_artifact(tmp_path)
    tables = load_tables(artifact.plan, SIDECAR, artifact.shards)
    ids, lengths = np.array([3, 49, 7, 0], dtype=np.int64), np.array([3, 1], dtype=np.int32)
    pooled = np.empty((2, 8), dtype=np.float32)
    status, *_ = _native.pool(tables, 0, ids, lengths, None, pooled)
    users = artifact.rows["users"]
    assert status == 0
    np.testing.assert_allclose(pooled, [users[ids[:3]].sum(axis=0), users[0]], rtol=1e-6)
    assert (tables.epoch, tables.bytes) == (1, 50 * 8 * 4 + 30 * 4 * 2)


def test_progress_counts_every_byte_once(tmp_path: Path) -> None:
    artifact = write_small_artifact(tmp_path)
    steps: list[tuple[int, int]] = []
    load_tables(artifact.plan, SIDECAR, artifact.shards, progress=lambda done, total: steps.append((done, total)))
    total = 50 * 8 * 4 + 30 * 4 * 2
    assert [t for _, t in steps] == [total] * 2
    assert sorted({done for done, _ in steps}) == [d for d, _ in steps]
    assert steps[-1] == (total, total)


def test_progress_is_reported_within_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_reader, "CHECKSUM_SLICE_BYTES", 100)
    artifact = write_small_artifact(tmp_path)
    steps: list[int] = []
    load_tables(artifact.plan, SIDECAR, artifact.shards, progress=lambda done, total: steps.append(done))
    # 1,600 bytes of users in 16 slices, 240 bytes of items in 3, counted in whatever order the threads read them.
    assert len(steps) == 19
    assert steps == sorted(set(steps))
    assert steps[-1] == 50 * 8 * 4 + 30 * 4 * 2


def test_a_load_stops_within_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_reader, "CHECKSUM_SLICE_BYTES", 100)
    artifact = write_small_artifact(tmp_path)
    steps: list[int] = []
    with pytest.raises(LoadCancelled):
        load_tables(
            artifact.plan,
            SIDECAR,
            artifact.shards,
            progress=lambda done, total: steps.append(done),
            cancelled=lambda: len(steps) >= 2,
        )
    assert 2 <= len(steps) < 19


def test_a_changed_byte_is_found_and_named(tmp_path: Path) -> None:
    artifact = write_small_artifact(tmp_path)
    flip_last_byte(artifact.shard_file("items"))
    with pytest.raises(ShardCorrupt, match=r"items\.safetensors: tensor 'items': CRC-32C"):
        load_tables(artifact.plan, SIDECAR, artifact.shards)


def test_without_verification_bytes_are_taken_as_they_are(tmp_path: Path) -> None:
    artifact = write_small_artifact(tmp_path)
    flip_last_byte(artifact.shard_file("items"))
    assert load_tables(artifact.plan, SIDECAR, artifact.shards, verify=False).bytes > 0


@pytest.mark.parametrize("verify", [True, False])
def test_a_missing_file_is_named_whether_verified_or_not(tmp_path: Path, verify: bool) -> None:
    artifact = write_small_artifact(tmp_path)
    artifact.shard_file("users").unlink()
    with pytest.raises(ShardCorrupt, match=r"users\.safetensors: tensor 'users': cannot be read"):
        load_tables(artifact.plan, SIDECAR, artifact.shards, verify=verify)


def test_a_truncated_file_is_refused_before_it_is_mapped(tmp_path: Path) -> None:
    artifact = write_small_artifact(tmp_path)
    file = artifact.shard_file("users")
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ShardCorrupt, match="tensor 'users': found a file of"):
        load_tables(artifact.plan, SIDECAR, artifact.shards, verify=False)


def test_the_shards_of_another_sidecar_are_refused(tmp_path: Path) -> None:
    artifact = write_small_artifact(tmp_path)
    with pytest.raises(PlanError, match=r"shards of sidecar 'sc0'; allowed: 'sc1'"):
        load_tables(artifact.plan, OTHER_SIDECAR, artifact.shards)


def test_a_name_that_the_plan_does_not_know_is_refused(tmp_path: Path) -> None:
    artifact = write_small_artifact(tmp_path)
    with pytest.raises(PlanError, match=r"'sc9' is not in the plan; allowed: one of \['sc0', 'sc1'\]"):
        load_tables(artifact.plan, "sc9", artifact.shards)


def test_shards_written_for_another_plan_are_refused(tmp_path: Path) -> None:
    artifact = write_small_artifact(tmp_path)
    other = write_small_artifact(tmp_path / "other", epoch=2).plan
    with pytest.raises(PlanError, match="shards of plan"):
        load_tables(other, SIDECAR, artifact.shards)


def test_a_load_that_is_called_off_stops(tmp_path: Path) -> None:
    artifact = write_small_artifact(tmp_path)
    with pytest.raises(LoadCancelled):
        load_tables(artifact.plan, SIDECAR, artifact.shards, cancelled=lambda: True)
