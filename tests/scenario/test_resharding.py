"""A deployment changes its plan under load: a sidecar is added, shards move and are cut, a sidecar leaves. Nobody notices."""

from __future__ import annotations

import signal
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from changing_world import Load
from lookup_world import SIDECARS, write_world
from sidecar_process import ready, started

from sidepool.client import EmbeddingClient
from sidepool.partition.reshard import reshard
from sidepool.wire.errors import PlanError
from sidepool.wire.plan import Plan, Shard, SidecarAddress


def spread(plan: Plan, addresses: dict[str, str], epoch: int) -> Plan:
    """Every table cut by rows over all sidecars named, as far as it has rows."""
    names = list(addresses)
    shards = []
    for table in plan.tables:
        edges = sorted({table.rows * i // len(names) for i in range(len(names) + 1)})
        shards += [
            Shard(table=table.name, sidecar=names[i], rows=(a, b), columns=(0, table.dim))
            for i, (a, b) in enumerate(pairwise(edges))
        ]
    sidecars = tuple(SidecarAddress(name=n, address=a) for n, a in addresses.items())
    return plan.model_copy(update={"epoch": epoch, "sidecars": sidecars, "shards": tuple(shards)})


def fresh(plan: Plan) -> Plan:
    """Without what the copied model has computed already."""
    return Plan.model_validate_json(plan.model_dump_json())


def move(config: Path, new: Path, name: str) -> None:
    """Point a sidecar's configuration at its new plan and shards."""
    settings = yaml.safe_load(config.read_text(encoding="utf-8"))
    settings |= {"plan": str(new / "plan.yaml"), "shards": str(new / "sidecars" / name / "shards")}
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")


def test_a_sidecar_is_added_shards_move_and_a_sidecar_leaves_without_one_failed_lookup(tmp_path: Path) -> None:
    world = write_world(tmp_path, settings={"previous_epoch_s": 2.0})
    with ready(world.config(SIDECARS[0])) as (left, at_left), ready(world.config(SIDECARS[1])) as (right, at_right):
        first = world.at(at_left["grpc"], at_right["grpc"])
        # The third gets a free port of its own, which its address in the plan must name.
        addresses = {SIDECARS[0]: at_left["grpc"], SIDECARS[1]: at_right["grpc"], "third": "127.0.0.1:1"}
        second = fresh(spread(first, addresses, epoch=first.epoch + 1))
        reshard(world.plan, tmp_path, second, tmp_path / "second")
        third_config = tmp_path / "second/sidecars/third/sidecar.yaml"
        settings = yaml.safe_load(third_config.read_text(encoding="utf-8"))
        third_config.write_text(yaml.safe_dump(settings | {"listen": {"grpc": "127.0.0.1:0"}}), encoding="utf-8")
        with EmbeddingClient.connect(first, lane="tcp") as old, started(third_config) as third:
            load = Load(old, world)
            try:
                at_third = third.wait_for("ready")
                for sidecar, name in ((left, SIDECARS[0]), (right, SIDECARS[1])):
                    move(world.config(name), tmp_path / "second", name)
                    sidecar.send(signal.SIGHUP)
                    sidecar.wait_for("reloaded")
                    load.go_on()  # under the old plan, on a sidecar that serves the new one
                here = fresh(spread(first, addresses | {"third": at_third["grpc"]}, epoch=second.epoch))
                with EmbeddingClient.connect(here, lane="tcp") as new:
                    load.client = new
                    load.go_on()
                    old.close()
                    left.wait_for("retired")
                    right.wait_for("retired")
                    with pytest.raises(PlanError, match=rf"plan_epoch: found {first.epoch}; allowed: {here.epoch}"):
                        EmbeddingClient.connect(first, lane="tcp")
                    last = fresh(spread(first, {SIDECARS[0]: at_left["grpc"], "third": at_third["grpc"]}, epoch=here.epoch + 1))
                    reshard(second, tmp_path / "second", last, tmp_path / "last")
                    for sidecar, config, name in ((left, world.config(SIDECARS[0]), SIDECARS[0]), (third, third_config, "third")):
                        move(config, tmp_path / "last", name)
                        sidecar.send(signal.SIGHUP)
                        sidecar.wait_for("reloaded")
                    with EmbeddingClient.connect(last, lane="tcp") as remaining:
                        load.client = remaining
                        load.go_on()
                        new.close()
                        right.send(signal.SIGTERM)
                        assert right.wait() == 0
                        load.go_on()
                        load.stop()
            finally:
                load.stop()
    assert load.problems == []
    assert min(load.looked) > 10
