"""A plan that uses everything a plan can say, its shards on two sidecars, and what torch makes of a lookup in it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from safetensors.numpy import save_file

from sidepool.wire.checksum import crc32c
from sidepool.wire.plan import (
    Feature,
    OnMissingShard,
    OutOfRange,
    Plan,
    Pooling,
    RowFormat,
    Shard,
    SidecarAddress,
    Table,
    save_plan,
)
from sidepool.wire.sharding import PlacedShard
from sidepool.wire.shards import ShardFile, ShardManifest, save_manifest

SIDECARS = ("left", "right")
# Ports that nothing listens on until a test puts real ones in.
NOWHERE = ("127.0.0.1:1", "127.0.0.1:2")

TABLES = (
    Table(name="plain", rows=100, dim=16),
    Table(name="half", rows=40, dim=9, row_format=RowFormat.FP16),
    Table(name="zeroing", rows=10, dim=1, out_of_range=OutOfRange.ZERO),
    Table(name="defaulting", rows=12, dim=33, out_of_range=OutOfRange.DEFAULT_ROW, default_row=7),
    Table(name="hashing", rows=11, dim=4, out_of_range=OutOfRange.HASH),
    Table(name="wide", rows=6, dim=130),
)
FEATURES = (
    Feature(name="summed", table="plain"),
    Feature(name="shared", table="plain", pooling=Pooling.MEAN),
    Feature(name="largest", table="half", pooling=Pooling.MAX, padding_index=0),
    Feature(name="watched", table="plain", pooling=Pooling.NONE, padding_index=5),
    Feature(name="scaled", table="half", weighted=True, padding_index=3),
    Feature(name="averaged", table="wide", pooling=Pooling.MEAN, weighted=True),
    Feature(name="zeroed", table="zeroing"),
    Feature(name="defaulted", table="defaulting", pooling=Pooling.MEAN, padding_index=7),
    Feature(name="hashed", table="hashing", padding_index=10),
    Feature(name="read", table="hashing", pooling=Pooling.NONE),
)
HELD_BY = {"plain": "left", "half": "right", "zeroing": "left", "defaulting": "right", "hashing": "right", "wide": "left"}
WHOLE = tuple(Shard(table=t.name, sidecar=HELD_BY[t.name], rows=(0, t.rows), columns=(0, t.dim)) for t in TABLES)


@dataclass(frozen=True)
class World:
    """Files under `directory`: `plan.yaml`, and per sidecar `<name>/sidecar.yaml` and `<name>/shards/`."""

    directory: Path
    plan: Plan
    rows: dict[str, NDArray[Any]]

    @property
    def shards(self) -> list[Path]:
        return [self.directory / name / "shards" for name in SIDECARS]

    def config(self, sidecar: str) -> Path:
        return self.directory / sidecar / "sidecar.yaml"

    def at(self, *addresses: str) -> Plan:
        """The plan with its sidecars at `addresses`."""
        sidecars = tuple(SidecarAddress(name=n, address=a) for n, a in zip(SIDECARS, addresses, strict=True))
        return Plan.model_validate({**self.plan.model_dump(), "sidecars": sidecars}, strict=False)


@dataclass(frozen=True)
class Bags:
    """One part of a lookup, in the jagged layout."""

    values: NDArray[np.int64]
    lengths: NDArray[np.int32]
    weights: NDArray[np.float32]

    @property
    def part(self) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.float32]]:
        return self.values, self.lengths.reshape(-1), self.weights


def write_world(
    directory: Path,
    *,
    epoch: int = 3,
    on_missing_shard: OnMissingShard = OnMissingShard.FAIL,
    ports: tuple[int, int] = (0, 0),
    engines: int = 1,
    settings: dict[str, Any] | None = None,
    shards: tuple[Shard, ...] = WHOLE,
    more: tuple[Table, ...] = (),
) -> World:
    """Write plan, shards and sidecar configurations; `ports` of the control planes, 0 for any; `settings` on top.

    more: tables beside the usual ones, whole on the first sidecar, each with a feature of its name.
    """
    random = np.random.default_rng(epoch)
    shards += tuple(Shard(table=t.name, sidecar=SIDECARS[0], rows=(0, t.rows), columns=(0, t.dim)) for t in more)
    rows = {
        t.name: random.standard_normal((t.rows, t.dim)).astype(np.float16 if t.row_format is RowFormat.FP16 else np.float32)
        for t in TABLES + more
    }
    plan = Plan(
        epoch=epoch,
        model="everything",
        on_missing_shard=on_missing_shard,
        tables=TABLES + more,
        features=FEATURES + tuple(Feature(name=t.name, table=t.name) for t in more),
        sidecars=tuple(SidecarAddress(name=n, address=a) for n, a in zip(SIDECARS, NOWHERE, strict=True)),
        shards=shards,
    )
    save_plan(plan, directory / "plan.yaml")
    for sidecar, port in zip(SIDECARS, ports, strict=True):
        _write_sidecar(directory / sidecar, sidecar, plan, rows, port, {"engines": engines, **(settings or {})})
    return World(directory, plan, rows)


def _write_sidecar(
    directory: Path, sidecar: str, plan: Plan, rows: dict[str, NDArray[Any]], port: int, extra: dict[str, Any]
) -> None:
    shards = directory / "shards"
    shards.mkdir(parents=True)
    files = []
    for index, shard in plan.held_by(plan.sidecar_index[sidecar]):
        table, held = plan.tables[index], cut(rows[plan.tables[index].name], shard)
        file = f"{table.name}-{shard.number}.safetensors"
        save_file({table.name: held}, shards / file)
        files.append(ShardFile.of(table, shard.rows, shard.columns, file, crc32c(held.tobytes())))
    save_manifest(ShardManifest(sidecar=sidecar, plan_fingerprint=plan.fingerprint, shards=tuple(files)), shards)
    listen = {"grpc": f"127.0.0.1:{port}", **extra.get("listen", {})}
    settings = {"name": sidecar, "plan": "../plan.yaml", "shards": "shards", **extra, "listen": listen}
    (directory / "sidecar.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")


def cut(rows: NDArray[Any], shard: PlacedShard) -> NDArray[Any]:
    """The rows and columns of a shard, contiguous."""
    return np.ascontiguousarray(rows[slice(*shard.rows), slice(*shard.columns)])


def random_bags(plan: Plan, batch: int, *, seed: int, longest: int = 6, stray: bool = True) -> Bags:
    """Bags of 0 to `longest` ids; `stray` puts ids outside the tables that allow them into every third place."""
    random = np.random.default_rng(seed)
    lengths = random.integers(0, longest + 1, (len(plan.features), batch), dtype=np.int32)
    values = []
    for table, bags in zip(plan.feature_tables, lengths, strict=True):
        ids = random.integers(0, table.rows, bags.sum())
        if stray and table.out_of_range is not OutOfRange.ERROR:
            ids[::3] = random.choice([-1, -(1 << 63), table.rows, (1 << 63) - 1], ids[::3].size)
        values.append(ids)
    joined = np.concatenate(values).astype(np.int64)
    return Bags(joined, lengths, random.standard_normal(joined.size).astype(np.float32))


def expected(plan: Plan, rows: dict[str, NDArray[Any]], bags: Bags) -> tuple[NDArray[np.float32], dict[str, NDArray[np.float32]]]:
    """What a lookup must give: pooled `[batch, Σ dim]` and the sequences, by torch's embedding_bag."""
    pooled, sequences, at = [], {}, 0
    for feature, table, lengths in zip(plan.features, plan.feature_tables, bags.lengths, strict=True):
        count = int(lengths.sum())
        ids = bags.values[at : at + count]
        found = _rows_of(table, rows[table.name].astype(np.float32), ids)
        weights = bags.weights[at : at + count]
        at += count
        if feature.pooling is Pooling.NONE:
            sequences[feature.name] = found
            continue
        if feature.weighted:
            found = found * weights[:, None]
        # Every id has its row already, so the bags index the found rows one after another; one more row is the padding, and
        # keeps torch from refusing an empty table.
        weight = torch.from_numpy(np.concatenate([found, np.zeros((1, table.dim), np.float32)]))
        offsets = torch.from_numpy(np.cumsum(lengths, dtype=np.int64) - lengths)
        positions = torch.arange(count)
        if feature.padding_index is not None:
            positions[torch.from_numpy(ids == feature.padding_index)] = count
        bags_of = torch.nn.functional.embedding_bag(positions, weight, offsets, mode=str(feature.pooling), padding_idx=count)
        pooled.append(bags_of.numpy())
    return np.concatenate(pooled, axis=1), sequences


def _rows_of(table: Table, rows: NDArray[np.float32], ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """The rows that ids stand for, as the table's policy says."""
    found = np.zeros((ids.size, table.dim), np.float32)
    for i, value in enumerate(ids.tolist()):
        if 0 <= value < table.rows:
            found[i] = rows[value]
        elif table.out_of_range is OutOfRange.DEFAULT_ROW:
            found[i] = rows[table.default_row]
        elif table.out_of_range is OutOfRange.HASH:
            found[i] = rows[splitmix64(value) % table.rows]
        elif table.out_of_range is OutOfRange.ERROR:
            raise ValueError(f"id {value} has no row")
    return found


def splitmix64(value: int) -> int:
    """SplitMix64's output for the state `value` (Steele, Lea, Flood, OOPSLA 2014)."""
    mask = (1 << 64) - 1
    h = (value + 0x9E3779B97F4A7C15) & mask
    h = ((h ^ (h >> 30)) * 0xBF58476D1CE4E5B9) & mask
    h = ((h ^ (h >> 27)) * 0x94D049BB133111EB) & mask
    return h ^ (h >> 31)
