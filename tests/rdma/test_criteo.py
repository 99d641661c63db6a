"""The Criteo pipeline without Triton: sidecar processes, rdma lanes over the cable, pooled vectors equal to torch's bit by bit."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from rdma_devices import RANKER_PATH, listen
from sidecar_process import PATIENCE_S, ready

from sidepool.client import EmbeddingClient

# What tests/criteo_artifact.py wrote, on the host: the guest has no time for torch.
ARTIFACT = os.environ.get("SIDEPOOL_CRITEO", "")


@pytest.mark.skipif(not ARTIFACT, reason="SIDEPOOL_CRITEO names no artifact; tests/test_rdma_guest.py makes one")
def test_pooled_vectors_of_criteo_rows_equal_torchs_bit_by_bit(tmp_path: Path) -> None:
    directory = tmp_path / "criteo"
    shutil.copytree(ARTIFACT, directory)
    configs = sorted(directory.glob("sidecars/*/sidecar.yaml"))
    for path in configs:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        config["listen"]["rdma"] = listen()
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
    expected = np.load(directory / "expected.npz")
    values, lengths, pooled = (expected[key] for key in ("values", "lengths", "pooled"))
    with (
        ready(configs[0]),
        ready(configs[1]),
        EmbeddingClient.connect(directory / "plan.yaml", lane="rdma", rdma=RANKER_PATH, connect_timeout_s=PATIENCE_S) as client,
    ):
        found = client.lookup(values, lengths, deadline_ms=1000 * PATIENCE_S)
        np.testing.assert_array_equal(found.out.view(np.int32), pooled.view(np.int32))
        assert [lane["kind"] for lane in client.stats()["lanes"]] == ["rdma", "rdma"]
