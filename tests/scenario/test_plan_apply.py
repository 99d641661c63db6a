"""`sidepool plan apply` under a minute of load: a sidecar is added, shards move, a sidecar leaves; every value is checked."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path

import grpc
import pytest
from changing_world import SLOWLY, Load, deployed
from lookup_world import SIDECARS
from sidecar_process import PATIENCE_S

from sidepool.client import EmbeddingClient
from sidepool.wire.control_pb2 import PrepareRequest
from sidepool.wire.control_pb2_grpc import SidecarStub
from sidepool.wire.plan import load_plan, pack_plan, save_plan

LOAD_S = 60.0


@pytest.mark.slow
def test_a_minute_of_lookups_notices_no_sidecar_that_comes_no_shard_that_moves_and_no_sidecar_that_leaves(tmp_path: Path) -> None:
    # Time for a client to follow on a machine that is busy with other things, too.
    settings = {"previous_epoch_s": 10.0}
    with deployed(tmp_path, **settings) as deployment, EmbeddingClient.connect(deployment.plan, lane="tcp") as client:
        load, ends = Load(client, deployment.world), time.monotonic() + LOAD_S
        try:
            deployment.start("third", "waiting for a plan")
            steps = [
                (4, ("left", "right", "third"), 0),
                (5, ("third", "left", "right"), 3),
                (6, ("third", "right"), 0),
            ]
            for epoch, names, shift in steps:
                ran = deployment.apply("apply", deployment.spread(epoch, names, shift=shift), "--bytes-per-s", str(SLOWLY))
                assert ran.returncode == 0, ran.stderr
                load.until_epoch(epoch)
                if epoch == 4:  # there and back
                    assert deployment.apply("rollback").returncode == 0
                    load.until_epoch(3)
                    assert deployment.apply("apply", deployment.spread(epoch, names)).returncode == 0
                    load.until_epoch(4)
            assert "'left' holds nothing of it: stop it" in ran.stdout
            for name in ("third", "right"):
                while deployment.running[name].wait_for("retired")["plan_epoch"] != 5:
                    pass
                assert deployment.brought(name) == ["shards.epoch-6"]
            deployment.running["left"].send(signal.SIGTERM)
            assert deployment.running["left"].wait() == 0
            while time.monotonic() < ends:
                assert load.problems == []
                time.sleep(0.1)
        finally:
            load.stop()
    assert load.problems == []
    assert load.asked == {("left", "right"), *(names for _, names, _ in steps)}
    assert min(load.looked) > 1000


def test_a_client_stays_with_the_old_plan_until_all_sidecars_of_the_new_one_are_ready(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with deployed(tmp_path) as deployment, EmbeddingClient.connect(deployment.plan, lane="tcp") as client:
        old, new = load_plan(deployment.plan), load_plan(deployment.spread(4, SIDECARS))
        load = Load(client, deployment.world)
        try:
            save_plan(new.model_copy(update={"model": "other"}), deployment.plan)
            said(caplog, "model: found 'other'")
            save_plan(new, deployment.plan)
            said(caplog, "sidecar 'left'.* plan_epoch: found 4; allowed: 3")
            request = PrepareRequest(plan=pack_plan(new), present=pack_plan(old))
            for name in SIDECARS:
                assert client.plan.epoch == 3
                with grpc.insecure_channel(deployment.addresses[name]) as channel:
                    SidecarStub(channel).Prepare(request, timeout=PATIENCE_S)  # type: ignore[no-untyped-call]
                deployment.running[name].wait_for("prepared")
            load.until_epoch(4)
        finally:
            load.stop()
    assert load.problems == []


def said(caplog: pytest.LogCaptureFixture, pattern: str) -> None:
    """Return once the log holds a message."""
    until = time.monotonic() + PATIENCE_S
    while not any(re.search(pattern, record.getMessage()) for record in caplog.records):
        assert time.monotonic() < until, caplog.text
        time.sleep(0.01)
