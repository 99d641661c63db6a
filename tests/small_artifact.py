"""A small plan with its shards and a `sidecar.yaml`, for tests that need files to serve."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from safetensors.numpy import save_file

from sidepool.wire.checksum import crc32c
from sidepool.wire.plan import Feature, Plan, Pooling, RowFormat, Shard, SidecarAddress, Table, save_plan
from sidepool.wire.shards import ShardFile, ShardManifest, save_manifest

SIDECAR = "sc0"
OTHER_SIDECAR = "sc1"


@dataclass(frozen=True)
class SmallArtifact:
    """`users` (fp32) and `items` (fp16) lie on sidecar `sc0`; `ads`, unless left out, on `sc1`, whose shards are not written."""

    directory: Path
    plan: Plan
    rows: dict[str, NDArray[Any]]

    @property
    def config(self) -> Path:
        return self.directory / "sidecar.yaml"

    @property
    def shards(self) -> Path:
        return self.directory / "shards"

    def shard_file(self, table: str) -> Path:
        return self.shards / f"{table}.safetensors"

    def write_config(self, **changes: Any) -> None:
        """Write `sidecar.yaml`; a change of `listen` is merged into its keys."""
        listen = {"grpc": "127.0.0.1:0", **changes.pop("listen", {})}
        settings = {"name": SIDECAR, "plan": "plan.yaml", "shards": "shards", "listen": listen, "drain_timeout_s": 5, **changes}
        self.config.write_text(yaml.safe_dump(settings), encoding="utf-8")


def write_small_artifact(
    directory: Path, *, epoch: int = 1, model: str = "ctr", seed: int = 0, address: str | None = None
) -> SmallArtifact:
    """Write plan, shards and configuration into `directory` (replacing what is there).

    With an `address`, `sc0` listens there and holds every table, so that a client can be served by it alone.
    """
    random = np.random.default_rng(seed)
    rows: dict[str, NDArray[Any]] = {
        "users": random.standard_normal((50, 8), dtype=np.float32),
        "items": random.standard_normal((30, 4), dtype=np.float32).astype(np.float16),
    }
    formats = {"users": RowFormat.FP32, "items": RowFormat.FP16}
    held = tuple(Table(name=n, rows=r.shape[0], dim=r.shape[1], row_format=formats[n]) for n, r in rows.items())
    tables = held if address else (*held, Table(name="ads", rows=10, dim=2))
    features = [
        Feature(name="user", table="users"),
        Feature(name="ad", table="ads"),
        Feature(name="item", table="items", pooling=Pooling.MEAN),
    ]
    plan = Plan(
        epoch=epoch,
        model=model,
        tables=tables,
        features=tuple(f for f in features if f.table in {t.name for t in tables}),
        sidecars=tuple(
            SidecarAddress(name=name, address=where)
            for name, where in ((SIDECAR, address or "127.0.0.1:1"), (OTHER_SIDECAR, "127.0.0.1:2"))
            if name == SIDECAR or not address
        ),
        shards=tuple(
            Shard(table=t.name, sidecar=OTHER_SIDECAR if t.name == "ads" else SIDECAR, rows=(0, t.rows), columns=(0, t.dim))
            for t in tables
        ),
    )
    artifact = SmallArtifact(directory, plan, rows)
    artifact.shards.mkdir(parents=True, exist_ok=True)
    save_plan(plan, directory / "plan.yaml")
    files = []
    for table in held:
        data = rows[table.name]
        save_file({table.name: data}, artifact.shard_file(table.name))
        file = artifact.shard_file(table.name).name
        files.append(ShardFile.of(table, (0, table.rows), (0, table.dim), file, crc32c(data.tobytes())))
    save_manifest(ShardManifest(sidecar=SIDECAR, plan_fingerprint=plan.fingerprint, shards=tuple(files)), artifact.shards)
    artifact.write_config(listen={"grpc": address or "127.0.0.1:0"})
    return artifact
