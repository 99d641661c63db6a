"""Shards written anew for another plan hold the same rows, bit for bit, however they are cut."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lookup_world import SIDECARS, expected, random_bags, write_world

from sidepool.__main__ import main
from sidepool.client import EmbeddingClient
from sidepool.partition.reshard import reshard
from sidepool.partition.shard_writer import write_shard
from sidepool.wire.errors import PlanError, ShardCorrupt
from sidepool.wire.plan import Feature, Plan, RowFormat, Shard, SidecarAddress, Table, load_plan
from sidepool.wire.shards import ShardManifest, save_manifest


def plan_of(tables: tuple[Table, ...], shards: list[Shard], epoch: int) -> Plan:
    sidecars = tuple(SidecarAddress(name=n, address=f"127.0.0.1:{i + 1}") for i, n in enumerate(SIDECARS))
    features = tuple(Feature(name=t.name, table=t.name) for t in tables)
    return Plan(epoch=epoch, model="m", tables=tables, features=features, sidecars=sidecars, shards=tuple(shards))


def test_every_row_format_survives_being_cut_and_joined(tmp_path: Path) -> None:
    tables = tuple(Table(name=f"{f}", rows=37, dim=11, row_format=f) for f in RowFormat)
    whole = plan_of(tables, [Shard(table=t.name, sidecar="left", rows=(0, 37), columns=(0, 11)) for t in tables], 1)
    pieces = [
        Shard(table=t.name, sidecar=SIDECARS[(i + j) % 2], rows=rows, columns=columns)
        for i, rows in enumerate([(0, 5), (5, 36), (36, 37)])
        for j, columns in enumerate([(0, 4), (4, 11)])
        for t in tables
    ]
    copies = [s.model_copy(update={"sidecar": SIDECARS[1 - SIDECARS.index(s.sidecar)]}) for s in pieces[::2]]
    cut = plan_of(tables, pieces + copies, 2)
    again = whole.model_copy(update={"epoch": 3})
    old = tmp_path / "old"
    old.mkdir()
    weight = torch.randn(37, 11, generator=torch.Generator().manual_seed(1))
    files = tuple(write_shard(old, f"{t.name}.safetensors", t, lambda a, b: weight[a:b])[0] for t in tables)
    save_manifest(ShardManifest(sidecar="left", plan_fingerprint=whole.fingerprint, shards=files), old)
    reshard(whole, old, cut, tmp_path / "cut")
    reshard(cut, tmp_path / "cut", again, tmp_path / "again")
    joined = sorted((tmp_path / "again/sidecars/left/shards").glob("*.safetensors"))
    assert [path.read_bytes() for path in joined] == [(old / file.file).read_bytes() for file in files]

    ids, lengths = np.arange(37 * len(tables)) % 37, np.ones((len(tables), 37), np.int32)
    with (
        EmbeddingClient.connect(cut, lane="local", shards_dir=tmp_path / "cut") as ours,
        EmbeddingClient.connect(again, lane="local", shards_dir=tmp_path / "again/sidecars") as plain,
    ):
        np.testing.assert_array_equal(ours.lookup(ids, lengths).out, plain.lookup(ids, lengths).out)


def test_the_command_places_tables_on_an_inventory_and_writes_what_serves_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "old").mkdir()
    world = write_world(tmp_path / "old")
    cards = [{"name": "eth0", "gbps": 10, "numa": 0}]
    nodes = [
        {"name": f"n{i}", "address": f"127.0.0.1:{7000 + i}", "memory_bytes": 5000, "cores": 2, "nics": cards} for i in range(4)
    ]
    gpus = [{"name": "g", "gpus": [{"name": "0", "numa": 0}], "nics": cards}]
    (tmp_path / "nodes.yaml").write_text(yaml.safe_dump({"cpu_nodes": nodes, "gpu_nodes": gpus}), encoding="utf-8")
    words = [str(world.directory), "--inventory", str(tmp_path / "nodes.yaml"), "--write", str(tmp_path / "new"), "--print"]
    assert main(["plan", *words, "--strategy", "capacity_balanced"]) == 0
    assert "expected latency: p50" in capsys.readouterr().out
    plan = load_plan(tmp_path / "new/plan.yaml")
    assert plan.rows_cut(plan.table_index["plain"])  # 6,400 bytes fit nowhere whole
    config = yaml.safe_load((tmp_path / "new/sidecars/n0/sidecar.yaml").read_text(encoding="utf-8"))
    assert config["memory"] == {"numa": 0}
    rankers = yaml.safe_load((tmp_path / "new/rankers.yaml").read_text(encoding="utf-8"))
    assert rankers == {"g": [{"gpu": "0", "nic": "eth0", "numa": 0}]}
    bags = random_bags(plan, 5, seed=1)
    with EmbeddingClient.connect(plan, lane="local", shards_dir=tmp_path / "new") as client:
        np.testing.assert_allclose(client.lookup(*bags.part).out, expected(plan, world.rows, bags)[0], rtol=1e-5, atol=1e-5)
    assert main(["plan", *words]) == 2  # the place is taken
    assert "not empty" in capsys.readouterr().err


def test_other_tables_and_missing_shards_are_refused(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    world = write_world(tmp_path / "old")
    other = world.plan.model_copy(update={"tables": world.plan.tables[:1]})
    with pytest.raises(PlanError, match="tables: found others in the new plan"):
        reshard(world.plan, world.directory, other, tmp_path / "new")
    with pytest.raises(ShardCorrupt, match="table 'half': found no shard with rows"):
        reshard(world.plan, world.directory / "left", world.plan, tmp_path / "new")
    assert not (tmp_path / "new").exists()
