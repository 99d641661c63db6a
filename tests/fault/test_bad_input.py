"""Bad files, bad configurations and odd requests: each has its clear error or its documented behaviour, and what comes next works.

Refused requests over every lane are in tests/contract, those through Triton in tests/scenario/test_triton_wrong_inputs.py;
here is what needs a sidecar's files to be wrong, or a lookup of an unusual size.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from sidecar_process import ready, started
from small_artifact import SmallArtifact, write_small_artifact

from sidepool.client import EmbeddingClient
from sidepool.client.lanes import Lane
from sidepool.wire.checksum import crc32c
from sidepool.wire.errors import LookupRejected
from sidepool.wire.plan import load_plan, save_plan
from sidepool.wire.shards import MANIFEST_FILE

PATIENT_MS = 60_000.0


@pytest.fixture
def artifact(tmp_path: Path) -> SmallArtifact:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    return write_small_artifact(tmp_path, address=address)


def truncate(artifact: SmallArtifact) -> None:
    file = artifact.shard_file("users")
    file.write_bytes(file.read_bytes()[:-100])


def flip_a_bit(artifact: SmallArtifact) -> None:
    file = artifact.shard_file("users")
    data = bytearray(file.read_bytes())
    data[-7] ^= 4
    file.write_bytes(data)


def write_doubles(artifact: SmallArtifact) -> None:
    save_file({"users": artifact.rows["users"].astype(np.float64)}, artifact.shard_file("users"))


def claim_a_huge_header(artifact: SmallArtifact) -> None:
    file = artifact.shard_file("users")
    file.write_bytes((1 << 62).to_bytes(8, "little") + file.read_bytes()[8:])


def remove_the_manifest(artifact: SmallArtifact) -> None:
    (artifact.shards / MANIFEST_FILE).unlink()


def resize_a_table_in_the_plan(artifact: SmallArtifact) -> None:
    path = artifact.directory / "plan.yaml"
    path.write_text(path.read_text().replace("rows: 50", "rows: 60").replace("- 50", "- 60"))


def serve_another_epoch(artifact: SmallArtifact) -> None:
    path = artifact.directory / "plan.yaml"
    save_plan(load_plan(path).model_copy(update={"epoch": 5}), path)


def misspell_a_key(artifact: SmallArtifact) -> None:
    artifact.write_config(spin_usec=5)


def misspell_a_key_of_the_plan(artifact: SmallArtifact) -> None:
    path = artifact.directory / "plan.yaml"
    path.write_text(path.read_text() + "epochs: 3\n")


def write_no_yaml(artifact: SmallArtifact) -> None:
    artifact.config.write_text("name: [sc0\n")


@pytest.mark.parametrize(
    ("damage", "code", "said"),
    [
        (truncate, "SHARD", ["users.safetensors", "tensor 'users'", "truncated"]),
        (flip_a_bit, "SHARD", ["users.safetensors", "tensor 'users'", "CRC-32C"]),
        (write_doubles, "SHARD", ["tensor 'users'", "dtype: found 'F64'; allowed: 'F32'"]),
        (claim_a_huge_header, "SHARD", ["tensor 'users'", "header of 4611686018427387904 bytes"]),
        (remove_the_manifest, "SHARD", [MANIFEST_FILE, "cannot be read"]),
        (resize_a_table_in_the_plan, "PLAN", ["shards of plan", "the plan given"]),
        (serve_another_epoch, "PLAN", ["shards of plan", "the plan given"]),
        (misspell_a_key, "CONFIG", ["sidecar.yaml", "spin_usec: unknown key; allowed here: version, name"]),
        (misspell_a_key_of_the_plan, "PLAN", ["plan.yaml", "epochs: unknown key"]),
        (write_no_yaml, "CONFIG", ["sidecar.yaml", "not valid YAML"]),
    ],
)
def test_a_sidecar_with_wrong_files_says_what_is_wrong_and_starts_once_they_are_right(
    artifact: SmallArtifact, damage: Callable[[SmallArtifact], None], code: str, said: list[str]
) -> None:
    whole = {path: path.read_bytes() for path in artifact.directory.rglob("*") if path.is_file()}
    damage(artifact)
    with started(artifact.config) as sidecar:
        assert sidecar.wait() == 2
        last = sidecar.stderr[-1]
    assert last.startswith(f"sidepool sidecar: error: [{code}] ")
    assert [words for words in said if words not in last] == [], last
    for path, data in whole.items():
        path.write_bytes(data)
    with ready(artifact.config), EmbeddingClient.connect(artifact.plan) as client:
        np.testing.assert_array_equal(client.lookup([3], [1, 0], deadline_ms=PATIENT_MS).out[0, :8], artifact.rows["users"][3])


def test_rows_that_are_nan_or_infinite_are_served_as_they_are(artifact: SmallArtifact) -> None:
    """They are the model's own values: a checksum guards against damage, not against a training that went wrong."""
    rows = artifact.rows["users"].copy()
    rows[3], rows[4] = np.nan, np.inf
    save_file({"users": rows}, artifact.shard_file("users"))
    manifest = artifact.shards / MANIFEST_FILE
    entries = json.loads(manifest.read_text())
    for entry in entries["shards"]:
        if entry["table"] == "users":
            entry["crc32c"] = crc32c(rows)
    manifest.write_text(json.dumps(entries))
    with ready(artifact.config), EmbeddingClient.connect(artifact.plan) as client:
        found = client.lookup([3, 4, 5], [1, 1, 1, 0, 0, 0], deadline_ms=PATIENT_MS).out[:, :8]
    np.testing.assert_array_equal(found, rows[3:6])


@pytest.mark.parametrize("lane", ["shm", "tcp", "grpc"])
def test_a_million_rows_in_one_lookup_travel_in_chunks(artifact: SmallArtifact, lane: Lane) -> None:
    rows = 1_000_000
    samples = 50_000
    ids = np.random.default_rng(1).integers(0, 30, rows)
    lengths = np.full((2, samples), rows // (2 * samples), np.int32)
    with ready(artifact.config), EmbeddingClient.connect(artifact.plan, lane=lane) as client:
        result = client.lookup_parts([(ids, lengths.reshape(-1), None)], deadline_ms=PATIENT_MS)
        assert result.errors == [None]
        assert result.timings.chunks > 1
        users, items = ids.reshape(2, samples, -1)
        wanted = [artifact.rows["users"][users].sum(axis=1), artifact.rows["items"].astype(np.float32)[items].mean(axis=1)]
        np.testing.assert_allclose(result.out, np.concatenate(wanted, axis=1), rtol=1e-4, atol=1e-4)
        assert client.lookup([3], [1, 0], deadline_ms=PATIENT_MS).out.shape == (1, 12)


@pytest.mark.parametrize("lane", ["shm", "tcp", "grpc"])
def test_a_bag_that_fills_more_than_a_slot_is_refused_by_name(artifact: SmallArtifact, lane: Lane) -> None:
    """A bag is not divided among frames: what fits is bounded by `request_slot_bytes`, and said so."""
    with ready(artifact.config), EmbeddingClient.connect(artifact.plan, lane=lane) as client:
        part = (np.zeros(1_000_000, np.int64), np.array([1_000_000, 0], np.int32), None)
        error = client.lookup_parts([part], deadline_ms=PATIENT_MS).errors[0]
        assert isinstance(error, LookupRejected)
        assert str(error) == "bag 0: needs 8000000 bytes, more than a slot of the lane holds"
        assert client.lookup([3], [1, 0], deadline_ms=PATIENT_MS).out.shape == (1, 12)
