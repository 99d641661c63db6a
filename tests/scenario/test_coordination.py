"""Sidecars, clients and `sidepool plan apply` around a real etcd: who is there, what is in place, and nothing lost without etcd."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from changing_world import Deployment, Load, deployed
from etcd_server import PREFIX, EtcdServer, etcd_server
from sidecar_process import PATIENCE_S, RunningSidecar

from sidepool.bench.triton_server import free_ports
from sidepool.client import EmbeddingClient
from sidepool.wire.control_pb2 import PrepareRequest
from sidepool.wire.control_pb2_grpc import SidecarStub
from sidepool.wire.etcd_members import EtcdMembers
from sidepool.wire.plan import load_plan, pack_plan

LEASE_S = 2


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EtcdServer]:
    with etcd_server(tmp_path / "etcd") as running:
        yield running


@pytest.fixture
def deployment(server: EtcdServer, tmp_path: Path) -> Iterator[Deployment]:
    """Two sidecars that know etcd, whose plan is in it."""
    settings = {"coordination": {"etcd": [server.endpoint], "prefix": PREFIX, "lease_s": LEASE_S}}
    (tmp_path / "world").mkdir()
    with deployed(tmp_path / "world", **settings) as running:
        with closing(server.settings().plan_source()) as source:
            source.publish(load_plan(running.plan))
        yield running


def wait_for(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def listed(server: EtcdServer) -> dict[str, dict[str, Any]]:
    names = [key.removeprefix(f"{PREFIX}/sidecars/") for key in server.keys_below() if "/sidecars/" in key]
    return {name: json.loads(value) for name in names if (value := server.value(f"/sidecars/{name}"))}


def test_sidecars_are_listed_as_long_as_they_are_there(server: EtcdServer, deployment: Deployment) -> None:
    wait_for(lambda: set(listed(server)) == {"left", "right"})
    assert listed(server)["left"] == {
        "version": 1,
        "name": "left",
        "address": deployment.addresses["left"],
        "state": "serving",
        "epochs": [3],
    }
    with closing(EtcdMembers(server.settings().connect(), PREFIX)) as members:
        wait_for(lambda: members.address("right") == deployment.addresses["right"])
        right = deployment.running["right"]
        right.send(signal.SIGTERM)
        assert right.wait() == 0
        assert "right" not in listed(server), "it went with its process"
        deployment.kill("left")
        wait_for(lambda: members.address("left") is None)  # its lease runs out
        deployment.start("left")
        wait_for(lambda: members.address("left") == deployment.addresses["left"])
        server.kill()
        server.lose_everything()
        assert members.address("left") == deployment.addresses["left"], "nobody is given up because etcd is away"
        server.start()
        wait_for(lambda: "left" in listed(server))


def test_a_name_that_a_live_sidecar_has_is_not_taken(server: EtcdServer, deployment: Deployment, tmp_path: Path) -> None:
    wait_for(lambda: set(listed(server)) == {"left", "right"})
    config = yaml.safe_load(deployment.config("left").read_text())
    config["listen"]["grpc"] = f"127.0.0.1:{free_ports(1)[0]}"
    second = deployment.config("left").with_name("second.yaml")
    second.write_text(yaml.safe_dump(config))
    other = deployment.running["second"] = RunningSidecar(second)
    assert "which another sidecar has, at" in other.wait_for("not listed in etcd")["reason"]
    assert listed(server)["left"]["address"] == deployment.addresses["left"]


@pytest.mark.slow
def test_lookups_go_on_whatever_becomes_of_etcd_and_follow_it_once_it_is_back(server: EtcdServer, deployment: Deployment) -> None:
    source = server.settings().plan_source(deployment.plan)
    with EmbeddingClient.connect(source, lane="tcp") as client:
        load = Load(client, deployment.world)
        try:
            load.until_epoch(3)
            with server.frozen():
                time.sleep(LEASE_S + 1)
            server.kill()
            time.sleep(1)
            server.start()
            wait_for(lambda: set(listed(server)) == {"left", "right"})
            plan = deployment.spread(4, ("right", "left"))
            etcd = ["--etcd", server.endpoint, "--prefix", PREFIX]
            ran = deployment.apply("apply", plan, *etcd)
            assert ran.returncode == 0, ran.stderr
            load.until_epoch(4)
            assert load_plan(deployment.plan).epoch == 4, "the file, which holds at a start without etcd, too"
            wait_for(lambda: listed(server)["left"]["epochs"] == [4])  # the old one is gone after previous_epoch_s
            server.kill()
            server.lose_everything()
            before = list(load.looked)
            wait_for(lambda: all(now > then + 100 for now, then in zip(load.looked, before, strict=True)))
            with EmbeddingClient.connect(server.settings().plan_source(deployment.plan), lane="tcp") as started_without:
                assert started_without.plan.epoch == 4
        finally:
            load.stop()
    assert load.problems == []
    assert load.asked == {("left", "right"), ("right", "left")}


@pytest.mark.slow
def test_a_sidecar_that_hears_of_a_plan_in_place_lets_the_old_one_go_by_itself(server: EtcdServer, deployment: Deployment) -> None:
    """As where the tool ends between the plan's change and its word to the sidecars."""
    new = load_plan(deployment.spread(4, ("right", "left")))
    with closing(server.settings().plan_source()) as source:
        old = source.read()
        for name in ("left", "right"):
            request = PrepareRequest(plan=pack_plan(new), present=pack_plan(old))
            with grpc.insecure_channel(deployment.addresses[name]) as channel:
                SidecarStub(channel).Prepare(request, timeout=PATIENCE_S)
        for name in ("left", "right"):
            deployment.running[name].wait_for("prepared")
        wait_for(lambda: listed(server)["left"]["epochs"] == [4, 3])
        source.replace(old, new)
    for name in ("left", "right"):
        assert deployment.running[name].wait_for("retired")["plan_epoch"] == 3


def test_a_sidecar_that_moved_is_found_where_it_is_listed(server: EtcdServer, deployment: Deployment) -> None:
    with (
        closing(EtcdMembers(server.settings().connect(), PREFIX)) as members,
        EmbeddingClient.connect(deployment.plan, lane="tcp", address_of=members.address) as client,
    ):
        left = deployment.running["left"]
        left.send(signal.SIGTERM)
        assert left.wait() == 0
        left.close()
        config = yaml.safe_load(deployment.config("left").read_text())
        config["listen"]["grpc"] = elsewhere = f"127.0.0.1:{free_ports(1)[0]}"
        deployment.config("left").write_text(yaml.safe_dump(config))
        deployment.start("left")
        wait_for(lambda: members.address("left") == elsewhere)
        wait_for(lambda: answers(client, deployment))


def answers(client: EmbeddingClient, deployment: Deployment) -> bool:
    load = Load(client, deployment.world)
    time.sleep(0.2)
    load.stop()
    return not load.problems
