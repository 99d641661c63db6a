"""Plans, shards and sidecar configurations for benchmarks that need no model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import yaml
from numpy.typing import NDArray
from safetensors.numpy import save_file

from sidepool.bench.triton_server import free_ports
from sidepool.wire.checksum import crc32c
from sidepool.wire.config import decode
from sidepool.wire.plan import Feature, Plan, Shard, SidecarAddress, Table, save_plan
from sidepool.wire.sharding import PlacedShard
from sidepool.wire.shards import ShardFile, ShardManifest, save_manifest


def make_plan(tables: int, rows: int, dim: int, sidecars: int, addresses: Sequence[str] = ()) -> Plan:
    """`tables` equal tables, looked up by one feature each, in turn on `sidecars` sidecars.

    addresses: theirs; default: loopback ports that are free now.
    """
    addresses = addresses or [f"127.0.0.1:{port}" for port in free_ports(sidecars)]
    names = [f"table{i}" for i in range(tables)]
    holders = [f"sidecar-{i}" for i in range(sidecars)]
    return Plan(
        epoch=1,
        model="bench",
        tables=tuple(Table(name=name, rows=rows, dim=dim) for name in names),
        features=tuple(Feature(name=name, table=name) for name in names),
        sidecars=tuple(SidecarAddress(name=name, address=at) for name, at in zip(holders, addresses, strict=True)),
        shards=tuple(
            Shard(table=name, sidecar=holders[i % sidecars], rows=(0, rows), columns=(0, dim)) for i, name in enumerate(names)
        ),
    )


def cut_plan(
    tables: int, rows: int, dim: int, *, sidecars: int, parts: int, copies: int = 1, addresses: Sequence[str] = ()
) -> Plan:
    """As `make_plan`, but with every table cut into `parts` row ranges, each on `copies` sidecars."""
    plan = make_plan(tables, rows, dim, sidecars, addresses)
    edges = [rows * i // parts for i in range(parts + 1)]
    shards = tuple(
        Shard(table=t.name, sidecar=plan.sidecars[(part + copy) % sidecars].name, rows=part_rows, columns=(0, dim))
        for t in plan.tables
        for part, part_rows in enumerate(pairwise(edges))
        for copy in range(copies)
    )
    content = plan.model_dump(mode="json", exclude_none=True) | {"shards": [s.model_dump(mode="json") for s in shards]}
    return decode(content, Plan, where="plan")


def write_sidecars(
    plan: Plan, directory: Path, rows_of: Callable[[int], NDArray[np.float32]], more: Mapping[str, object] | None = None
) -> list[Path]:
    """Write `plan.yaml` and every sidecar's files into `directory`; returns the configurations. `rows_of(i)` makes table i.

    more: settings of every sidecar.
    """
    save_plan(plan, directory / "plan.yaml")
    configs = []
    for sidecar in plan.sidecars:
        shards = directory / sidecar.name / "shards"
        shards.mkdir(parents=True)
        held = plan.held_by(plan.sidecar_index[sidecar.name])
        files = tuple(_write_shard(plan.tables[i], shard, rows_of(i), shards) for i, shard in held)
        save_manifest(ShardManifest(sidecar=sidecar.name, plan_fingerprint=plan.fingerprint, shards=files), shards)
        configs.append(shards.parent / "sidecar.yaml")
        settings = {
            "name": sidecar.name,
            "plan": "../plan.yaml",
            "shards": "shards",
            "listen": {"grpc": sidecar.address, "tcp": f"{sidecar.address.rpartition(':')[0]}:0"},
            **(more or {}),
        }
        configs[-1].write_text(yaml.safe_dump(settings), encoding="utf-8")
    return configs


def _write_shard(table: Table, shard: PlacedShard, rows: NDArray[np.float32], directory: Path) -> ShardFile:
    file = f"{table.name}-{shard.number}.safetensors"
    held = np.ascontiguousarray(rows[slice(*shard.rows), slice(*shard.columns)])
    save_file({table.name: held}, directory / file)
    return ShardFile.of(table, shard.rows, shard.columns, file, crc32c(held))
