"""A change of plans that is killed, cut off, or fed wrong bytes goes on or is undone; what was served is served throughout."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest
from changing_world import LARGE, SLOWLY, Deployment, deployed
from lookup_world import SIDECARS, expected, random_bags
from sidecar_process import PATIENCE_S
from tampering_proxy import TamperingProxy

from sidepool.client import EmbeddingClient
from sidepool.wire.control_pb2 import FetchRequest, MoveReply, PrepareRequest, ProgressRequest
from sidepool.wire.control_pb2_grpc import SidecarStub
from sidepool.wire.plan import load_plan, pack_plan, save_plan

RATE = ("--bytes-per-s", str(SLOWLY))
ALL = ("left", "right", "third")
WAITING = "waiting for a plan"


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Deployment]:
    with deployed(tmp_path) as found:
        yield found


def assert_served(deployment: Deployment, epoch: int) -> None:
    """Whoever connects now gets that plan, and what torch gets."""
    with EmbeddingClient.connect(deployment.plan, lane="tcp") as client:
        assert client.plan.epoch == epoch
        bags = random_bags(client.plan, 8, seed=epoch)
        wanted, _ = expected(client.plan, deployment.world.rows, bags)
        np.testing.assert_allclose(client.lookup(*bags.part, deadline_ms=PATIENCE_S * 1e3).out, wanted, rtol=1e-5, atol=1e-5)


@contextmanager
def control(deployment: Deployment, name: str) -> Iterator[SidecarStub]:
    with grpc.insecure_channel(deployment.addresses[name]) as channel:
        yield SidecarStub(channel)  # type: ignore[no-untyped-call]


def progress(deployment: Deployment, name: str) -> MoveReply:
    with control(deployment, name) as stub:
        reply: MoveReply = stub.Progress(ProgressRequest(), timeout=PATIENCE_S)
    return reply


@contextmanager
def applying(deployment: Deployment, plan: Path, *, until_bytes: int) -> Iterator[subprocess.Popen[str]]:
    """`plan apply` in the middle: the third sidecar has got some of its bytes."""
    command = [sys.executable, "-m", "sidepool", *deployment.command("apply", plan, *RATE)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        until = time.monotonic() + PATIENCE_S
        while progress(deployment, "third").done_bytes < until_bytes:
            assert time.monotonic() < until
            assert process.poll() is None
            time.sleep(0.02)
        yield process
    finally:
        process.kill()
        process.communicate()


def killed_tool(deployment: Deployment, *, until_bytes: int) -> Path:
    """Kill `plan apply` in the middle; returns the plan that brings the third sidecar in."""
    deployment.start("third", WAITING)
    plan = deployment.spread(4, ALL)
    with applying(deployment, plan, until_bytes=until_bytes) as process:
        process.kill()
        process.wait()
    return plan


def rows_sent(deployment: Deployment, last_row: int) -> list[int]:
    """Where each call for the rows of the large table that end at `last_row` began, by the log of the one that holds them."""
    lines = "".join(deployment.running["left"].stderr)
    return [int(first) for first in re.findall(rf"table 'large' rows \[(\d+), {last_row}\]", lines)]


def test_a_killed_tool_is_run_again_and_goes_on(deployment: Deployment) -> None:
    plan = killed_tool(deployment, until_bytes=1_200_000)
    assert_served(deployment, 3)
    for _ in range(2):  # once more after the end changes nothing
        ran = deployment.apply("apply", plan)
        assert ran.returncode == 0, ran.stderr
    assert_served(deployment, 4)
    assert len(rows_sent(deployment, LARGE.rows)) == 1  # the sidecars never stopped


def test_a_killed_receiver_goes_on_with_what_has_arrived(deployment: Deployment) -> None:
    deployment.start("third", WAITING)
    plan = deployment.spread(4, ALL)
    with applying(deployment, plan, until_bytes=1_200_000) as process:
        deployment.kill("third")
        assert_served(deployment, 3)
        deployment.start("third", WAITING).wait_for("prepared")
        assert process.wait(PATIENCE_S) == 0
    assert_served(deployment, 4)
    first, again = rows_sent(deployment, LARGE.rows)
    assert again - first >= 1_000_000 // LARGE.row_bytes
    deployment.kill("third")
    deployment.start("third")  # its configuration names no plan
    assert_served(deployment, 4)


def test_what_was_interrupted_is_undone_without_a_trace(deployment: Deployment) -> None:
    plan = killed_tool(deployment, until_bytes=500_000)
    assert deployment.brought("third") == ["shards.epoch-4.partial"]
    ran = deployment.apply("apply", plan, "--undo")
    assert ran.returncode == 0, ran.stderr
    assert [deployment.brought(name) for name in ALL] == [[], [], []]
    assert progress(deployment, "third") == MoveReply(name="third", phase="idle")
    assert_served(deployment, 3)
    assert deployment.apply("apply", plan).returncode == 0  # it was no obstacle
    assert_served(deployment, 4)
    refused = deployment.apply("apply", plan, "--undo")
    assert refused.returncode == 2
    assert "found 4, which is in place" in refused.stderr


def test_sidecars_that_are_killed_between_two_plans_come_back_with_both(deployment: Deployment) -> None:
    plan = deployment.spread(4, SIDECARS, shift=5)
    old, new = load_plan(deployment.plan), load_plan(plan)
    request = PrepareRequest(plan=pack_plan(new), present=pack_plan(old))
    for name in SIDECARS:
        with control(deployment, name) as stub:
            stub.Prepare(request, timeout=PATIENCE_S)
        deployment.running[name].wait_for("prepared")
    for name in SIDECARS:
        deployment.kill(name)
        if name == "right":
            with next((deployment.directory / "right/shards.epoch-4").glob("*.safetensors")).open("r+b") as file:
                file.seek(-1, os.SEEK_END)
                file.write(b"?")
        started = deployment.start(name)
        assert ("what was brought here cannot be loaded" in "".join(started.stderr)) == (name == "right")
    assert_served(deployment, 3)
    assert deployment.apply("apply", plan).returncode == 0
    assert_served(deployment, 4)
    assert deployment.apply("rollback").returncode == 0
    assert_served(deployment, 3)
    for name in SIDECARS:  # of what was rolled back nothing stays
        assert deployment.running[name].wait_for("retired")["plan_epoch"] == 4
        assert deployment.brought(name) == []
        deployment.kill(name)
        deployment.start(name)
    assert_served(deployment, 3)


@pytest.mark.parametrize("times", [1, 1000])
def test_wrong_bytes_are_noticed_and_fetched_again_or_the_change_is_undone(deployment: Deployment, times: int) -> None:
    plan = deployment.spread(4, SIDECARS)
    old = load_plan(deployment.plan)
    with TamperingProxy(deployment.addresses["left"], period=300_000, times=times) as proxy:
        sidecars = (old.sidecars[0].model_copy(update={"address": proxy.address}), old.sidecars[1])
        save_plan(old.model_copy(update={"sidecars": sidecars}), deployment.plan)
        ran = deployment.apply("apply", plan)
        assert proxy.tampered >= 1
    right = "".join(deployment.running["right"].stderr)
    assert "fetching again" in right
    if times == 1:
        assert ran.returncode == 0, ran.stderr
        assert_served(deployment, 4)
    else:
        assert ran.returncode == 2
        assert re.search(r"\[(SHARD|TRANSPORT)\] sidecar 'right': sidecar 'left' \(.*; undone", " ".join(ran.stderr.split()))
        save_plan(old, deployment.plan)
        assert [deployment.brought(name) for name in SIDECARS] == [[], []]
        assert_served(deployment, 3)


def test_a_rollback_comes_too_late_once_the_old_plan_is_gone(tmp_path: Path) -> None:
    with deployed(tmp_path, previous_epoch_s=0.1) as deployment:
        assert deployment.apply("apply", deployment.spread(4, SIDECARS)).returncode == 0
        for name in SIDECARS:
            assert deployment.running[name].wait_for("retired")["plan_epoch"] == 3
        ran = deployment.apply("rollback")
        assert ran.returncode == 2
        assert "found nothing but epoch 4" in ran.stderr
        assert_served(deployment, 4)


def test_what_cannot_be_applied_is_refused_by_name_and_changes_nothing(deployment: Deployment) -> None:
    plan = load_plan(deployment.spread(4, SIDECARS))
    nowhere = (plan.sidecars[0], plan.sidecars[1].model_copy(update={"address": "127.0.0.1:1"}))
    wrong = {
        r"model: found 'other'; allowed: 'everything'": {"model": "other"},
        r"features: found others; allowed: those of epoch 3": {"features": plan.features[1:]},
        r"epoch: found 2; allowed: above 3": {"epoch": 2},
        r"epoch: found 3, which already stands for another plan": {"epoch": 3},
        r"\[TRANSPORT\] sidecar 'right' \(127\.0\.0\.1:1\): .*; undone, but for what cannot be reached": {"sidecars": nowhere},
    }
    for complaint, change in wrong.items():
        save_plan(plan.model_copy(update=change), deployment.directory / "wrong.yaml")
        ran = deployment.apply("apply", deployment.directory / "wrong.yaml")
        assert ran.returncode == 2
        assert re.search(complaint, ran.stderr), ran.stderr
        assert [deployment.brought(name) for name in SIDECARS] == [[], []]
    assert_served(deployment, 3)


def refused(call: Callable[..., object], request: object) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as error:
        list(call(request, timeout=PATIENCE_S))  # type: ignore[call-overload]
    return error.value.code(), error.value.details()


def test_calls_that_make_no_sense_are_refused(deployment: Deployment) -> None:
    fingerprint = load_plan(deployment.plan).fingerprint
    part = {"plan_fingerprint": fingerprint, "table": "large", "rows": 10, "columns": 64}
    wrong: dict[str, FetchRequest | PrepareRequest] = {
        "plan_fingerprint: found 'x'": FetchRequest(**part | {"plan_fingerprint": "x"}),
        "found in no shard that is held": FetchRequest(**part | {"rows": LARGE.rows + 1}),
        "table 'nobody'": FetchRequest(**part | {"table": "nobody"}),
        "rows [0, 0]": FetchRequest(**part | {"rows": 0}),
        "rows [18446744073709551615, 18446744073709551625]": FetchRequest(**part | {"first_row": 2**64 - 1}),
        "bytes_per_s: found -1.0": FetchRequest(**part | {"bytes_per_s": -1}),
        "plan: found 5 bytes that are no plan": PrepareRequest(plan=b"bytes"),
    }
    with control(deployment, "left") as stub:
        for complaint, request in wrong.items():
            call = stub.Fetch if isinstance(request, FetchRequest) else stub.Prepare
            code, said = refused(call, request)
            assert code is grpc.StatusCode.FAILED_PRECONDITION
            assert complaint in said
        slow = [stub.Fetch(FetchRequest(**part | {"rows": LARGE.rows, "bytes_per_s": 4e6}), timeout=PATIENCE_S) for _ in range(2)]
        for stream in slow:
            next(stream)
        code, said = refused(stub.Fetch, FetchRequest(**part))
        assert (code, said) == (grpc.StatusCode.UNAVAILABLE, "sidecar 'left' sends to 2 others already")
        slow[0].cancel()
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until:  # its place is free as soon as the sidecar has noticed
            try:
                first, *_, last = stub.Fetch(FetchRequest(**part), timeout=PATIENCE_S)
                break
            except grpc.RpcError:
                time.sleep(0.05)
        assert first.rows == deployment.world.rows["large"][:10].tobytes()
        assert last.last
        slow[1].cancel()
