"""The Criteo pipeline up to the lane, for where there is no torch: a partitioned DLRM, ids, and what torch pools."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import yaml
from rdma_devices import SMALL_SLOTS

from sidepool.bench.criteo import generate_rows, multi_hot_ids, read_rows
from sidepool.bench.models import dlrm
from sidepool.bench.triton_server import free_ports
from sidepool.partition import partition_model

REAL_ROWS = Path(__file__).parents[2] / "shared" / "data" / "criteo_7200.tsv"
SAMPLES, MAX_ROWS, SIDECARS = 512, 5000, 2
EXPECTED = "expected.npz"


def write_criteo(directory: Path) -> None:
    """Partition a multi-hot DLRM over two sidecars; beside it `EXPECTED`: ids, lengths, and what torch makes of them."""
    model, example_inputs = dlrm.multi_hot(MAX_ROWS, seed=5)
    addresses = [f"127.0.0.1:{port}" for port in free_ports(SIDECARS)]
    partition_model(model, example_inputs, directory, name="dlrm", sidecars=SIDECARS, addresses=addresses)
    for path in directory.glob("sidecars/*/sidecar.yaml"):
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        path.write_text(yaml.safe_dump(config | SMALL_SLOTS), encoding="utf-8")
    rows = read_rows(REAL_ROWS, SAMPLES) if REAL_ROWS.is_file() else generate_rows(SAMPLES)
    table_rows = dlrm.table_rows(MAX_ROWS)
    bags = multi_hot_ids(rows.ids(table_rows), table_rows)
    with torch.inference_mode():
        pooled = [table(torch.from_numpy(ids)).numpy() for table, ids in zip(model.tables, bags, strict=True)]
    np.savez(
        directory / EXPECTED,
        values=np.concatenate([ids.reshape(-1) for ids in bags]),
        lengths=np.array([[ids.shape[1]] * SAMPLES for ids in bags], np.int32),
        pooled=np.concatenate(pooled, axis=1),
    )
