"""A sidecar as its operators meet it: a process with ports, signals, logs and a control plane."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families
from sidecar_process import PATIENCE_S, ready, started
from small_artifact import SmallArtifact, write_small_artifact

from sidepool import _native
from sidepool.sidecar.numa import usable_nodes
from sidepool.wire import control_pb2

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture
def artifact(tmp_path: Path) -> SmallArtifact:
    return write_small_artifact(tmp_path)


def connect_request(artifact: SmallArtifact, **changes: Any) -> control_pb2.ConnectRequest:
    plan = artifact.plan
    fields = {"lane": "tcp", "plan_epoch": plan.epoch, "plan_fingerprint": plan.fingerprint, "wire_version": _native.WIRE_VERSION}
    return control_pb2.ConnectRequest(**{**fields, **changes})


def refused(call: Any, request: Any) -> tuple[grpc.StatusCode, str, str]:
    """`(status, sidepool's code, message)` of a call that must fail."""
    with pytest.raises(grpc.RpcError) as caught:
        call(request, timeout=PATIENCE_S)
    codes = [str(entry.value) for entry in caught.value.trailing_metadata() if entry.key == "sidepool-code"]
    return caught.value.code(), "".join(codes), caught.value.details() or ""


def samples(address: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample that the Prometheus endpoint shows, by name and labels."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=PATIENCE_S) as reply:
        families = list(text_string_to_metric_families(reply.read().decode()))
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def test_a_sidecar_becomes_healthy_and_describes_what_it_holds(artifact: SmallArtifact) -> None:
    with ready(artifact.config) as (sidecar, line):
        for service in ("", "sidepool.v1.Sidecar", "ctr"):
            assert sidecar.health(service) == SERVING
        described = sidecar.control.Describe(control_pb2.DescribeRequest(), timeout=PATIENCE_S)
        assert (described.name, described.state, described.plan_epoch) == ("sc0", "serving", 1)
        assert described.plan_fingerprint == artifact.plan.fingerprint
        assert [(t.name, t.rows, t.dim, t.row_format, t.bytes) for t in described.tables] == [
            ("users", 50, 8, "fp32", 1600),
            ("items", 30, 4, "fp16", 240),
        ]
        assert all(4 <= t.rows_ahead <= 128 for t in described.tables)
        assert list(described.lanes) == ["grpc", "shm", "tcp"]
        assert line["pid"] == sidecar.process.pid


def test_while_loading_the_control_plane_answers_and_lookups_are_refused_as_retryable(artifact: SmallArtifact) -> None:
    manifest = artifact.shards / "shards.json"
    text = manifest.read_text()
    manifest.unlink()
    os.mkfifo(manifest)  # loading waits here until someone writes
    with started(artifact.config) as sidecar:
        sidecar.connect(sidecar.wait_for("control plane listening")["grpc"])
        with manifest.open("w") as pipe:  # returns when the sidecar has begun to read, the plan being known by then
            assert [sidecar.health(service) for service in ("", "sidepool.v1.Sidecar", "ctr")] == [NOT_SERVING] * 3
            assert sidecar.control.Describe(control_pb2.DescribeRequest(), timeout=PATIENCE_S).state == "loading"
            for call, request in (
                (sidecar.control.Connect, connect_request(artifact)),
                (sidecar.control.Lookup, control_pb2.LookupFrame(frame=b"x")),
            ):
                status, code, message = refused(call, request)
                assert (status, code) == (grpc.StatusCode.UNAVAILABLE, "OVERLOADED")
                assert "still loading" in message
            watch = health_pb2_grpc.HealthStub(sidecar.channel).Watch(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
            assert next(watch).status == NOT_SERVING
            manifest.unlink()
            manifest.write_text(text)
            pipe.write(text)
        sidecar.wait_for("ready")
        assert next(watch).status == SERVING
        watch.cancel()


def test_a_stop_signal_while_loading_ends_the_process(artifact: SmallArtifact) -> None:
    manifest = artifact.shards / "shards.json"
    text = manifest.read_text()
    manifest.unlink()
    os.mkfifo(manifest)
    with started(artifact.config) as sidecar:
        with manifest.open("w") as pipe:
            sidecar.send(signal.SIGTERM)
            sidecar.wait_for("asked to stop")
            manifest.unlink()
            manifest.write_text(text)
            pipe.write(text)
        assert sidecar.wait() == 0
        assert not any('"ready"' in line for line in sidecar.stderr)


def test_a_wildcard_address_is_given_to_rankers_as_the_plan_has_it(artifact: SmallArtifact) -> None:
    artifact.write_config(listen={"tcp": "0.0.0.0:0"})
    with ready(artifact.config) as (sidecar, _):
        address = sidecar.control.Connect(connect_request(artifact), timeout=PATIENCE_S).address
    assert address.startswith("127.0.0.1:")
    assert not address.endswith(":0")


def test_a_health_watcher_sees_the_drain_coming(artifact: SmallArtifact) -> None:
    with ready(artifact.config) as (sidecar, _):
        stub = health_pb2_grpc.HealthStub(sidecar.channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(service="ctr"), timeout=PATIENCE_S)
        assert next(watch).status == SERVING
        assert sidecar.control.Drain(control_pb2.DrainRequest(timeout_s=5), timeout=PATIENCE_S).drained
        assert next(watch).status == NOT_SERVING
        assert sidecar.health() == NOT_SERVING
        status, code, message = refused(sidecar.control.Connect, connect_request(artifact))
        assert (status, code) == (grpc.StatusCode.UNAVAILABLE, "OVERLOADED")
        assert "draining" in message
        watch.cancel()


def test_an_unknown_health_service_is_not_found(artifact: SmallArtifact) -> None:
    with ready(artifact.config) as (sidecar, _), pytest.raises(grpc.RpcError) as caught:
        sidecar.health("someone.else")
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


def test_reflection_lists_the_services(artifact: SmallArtifact) -> None:
    with ready(artifact.config) as (sidecar, _):
        stub = reflection_pb2_grpc.ServerReflectionStub(sidecar.channel)
        question = reflection_pb2.ServerReflectionRequest(list_services="")
        answer = next(stub.ServerReflectionInfo(iter([question]), timeout=PATIENCE_S))
    names = {service.name for service in answer.list_services_response.service}
    assert names == {"sidepool.v1.Sidecar", "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}


def test_connect_grants_at_most_the_configured_slots(artifact: SmallArtifact) -> None:
    artifact.write_config(slots=4, request_slot_bytes=65536, response_slot_bytes=131072)
    with ready(artifact.config) as (sidecar, line):
        for wanted, granted in ((0, 4), (2, 2), (99, 4)):
            reply = sidecar.control.Connect(connect_request(artifact, slots=wanted), timeout=PATIENCE_S)
            assert (reply.slots, reply.request_bytes, reply.response_bytes) == (granted, 65536, 131072)
            assert (len(reply.token), reply.address) == (16, line["tcp"])
        assert sidecar.control.Connect(connect_request(artifact, lane="shm"), timeout=PATIENCE_S).address == line["unix"]
        over_grpc = sidecar.control.Connect(connect_request(artifact, lane="grpc"), timeout=PATIENCE_S)
        assert (over_grpc.token, over_grpc.address, over_grpc.slots) == (b"", line["grpc"], 4)


@pytest.mark.parametrize(
    ("changes", "code", "complaint"),
    [
        ({"lane": "rdma"}, "CONFIG", "lane: found 'rdma'; allowed: grpc, shm, tcp"),
        ({"wire_version": 999}, "CONFIG", "wire_version: found 999; allowed: "),
        ({"client": "x" * 129}, "CONFIG", "client: found 129 characters; allowed: at most 128"),
        ({"plan_epoch": 2}, "PLAN", "plan_epoch: found 2; allowed: 1"),
        ({"plan_fingerprint": "f" * 64}, "PLAN", "plan_fingerprint: found 'ffff"),
    ],
)
def test_connect_refuses_a_peer_it_could_not_answer(
    artifact: SmallArtifact, changes: dict[str, Any], code: str, complaint: str
) -> None:
    with ready(artifact.config) as (sidecar, _):
        status, found, message = refused(sidecar.control.Connect, connect_request(artifact, **changes))
        assert (status, found) == (grpc.StatusCode.FAILED_PRECONDITION, code)
        assert message.startswith(complaint)


def test_lanes_that_are_off_are_not_offered(artifact: SmallArtifact) -> None:
    artifact.write_config(listen={"tcp": None, "metrics": None})
    with ready(artifact.config) as (sidecar, line):
        assert (line["tcp"], line["metrics"]) == (None, None)
        _, _, message = refused(sidecar.control.Connect, connect_request(artifact))
        assert message == "lane: found 'tcp'; allowed: grpc, shm"


@pytest.mark.parametrize("garbage", [b"", b"x", bytes(128), os.urandom(4096)])
def test_lookup_with_garbage_is_refused_and_the_sidecar_lives(artifact: SmallArtifact, garbage: bytes) -> None:
    with ready(artifact.config) as (sidecar, _):
        status, code, message = refused(sidecar.control.Lookup, control_pb2.LookupFrame(frame=garbage))
        assert (status, code) == (grpc.StatusCode.INVALID_ARGUMENT, "FRAME")
        assert message.startswith(f"frame: found {len(garbage)} bytes that are no request frame")
        assert sidecar.health() == SERVING


def test_a_message_larger_than_a_slot_is_refused_unread(artifact: SmallArtifact) -> None:
    artifact.write_config(request_slot_bytes=65536)
    with ready(artifact.config) as (sidecar, _):
        status, _, message = refused(sidecar.control.Lookup, control_pb2.LookupFrame(frame=bytes(4 << 20)))
        assert status == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "larger than max" in message
        assert sidecar.health() == SERVING


def test_metrics_and_stats_show_the_same_counters(artifact: SmallArtifact) -> None:
    with ready(artifact.config) as (sidecar, line):
        refused(sidecar.control.Lookup, control_pb2.LookupFrame(frame=b"garbage"))
        stats = json.loads(sidecar.control.Stats(control_pb2.StatsRequest(), timeout=PATIENCE_S).json)
        shown = samples(line["metrics"])
    assert (stats["name"], stats["state"], stats["stats"]["epoch"]) == ("sc0", "serving", 1)
    assert stats["stats"]["statuses"]["FRAME"] == 1
    assert shown["sidepool_sidecar_subrequests_total", (("code", "FRAME"),)] == 1
    assert shown["sidepool_sidecar_table_bytes", (("table", "users"),)] == 1600
    assert shown["sidepool_sidecar_resident_bytes", ()] == 1840
    assert shown["sidepool_sidecar_table_rows_total", (("table", "items"),)] == 0
    assert shown["sidepool_sidecar_plan_epoch", ()] == 1
    assert shown["sidepool_sidecar_state", (("state", "serving"),)] == 1
    assert shown["sidepool_sidecar_queue_seconds_bucket", (("le", "+Inf"),)] == shown["sidepool_sidecar_queue_seconds_count", ()]
    assert ("sidepool_sidecar_engine_served_total", (("engine", "0"),)) in shown


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_ends_the_process_without_a_trace(artifact: SmallArtifact, number: signal.Signals) -> None:
    ready_file = artifact.directory / "ready.json"
    with ready(artifact.config, "--ready-file", str(ready_file)) as (sidecar, line):
        assert json.loads(ready_file.read_text())["unix"] == line["unix"]
        place = Path(line["unix"])
        assert stat.S_IMODE(place.parent.stat().st_mode) == 0o700
        assert stat.S_IMODE(place.stat().st_mode) == 0o600
        sidecar.send(number)
        assert sidecar.wait() == 0
        assert json.loads(sidecar.stderr[-1])["event"] == "stopped"
    assert not place.exists()
    assert not place.parent.exists()
    assert not ready_file.exists()


def test_what_a_killed_sidecar_left_behind_is_removed_by_the_next(artifact: SmallArtifact) -> None:
    with ready(artifact.config) as (sidecar, line):
        abandoned = Path(line["unix"]).parent
        sidecar.send(signal.SIGKILL)
        sidecar.wait()
    assert abandoned.exists()
    with ready(artifact.config) as (first, line), ready(artifact.config):
        assert not abandoned.exists()
        assert Path(line["unix"]).exists(), "a living sidecar's directory must stay"
        assert first.process.poll() is None


def test_the_socket_of_a_dead_sidecar_is_replaced_and_that_of_a_living_one_is_not(artifact: SmallArtifact) -> None:
    artifact.write_config(listen={"unix": "lane.sock"})
    with ready(artifact.config) as (dead, _):
        dead.send(signal.SIGKILL)
        dead.wait()
    assert (artifact.directory / "lane.sock").is_socket()
    with ready(artifact.config), started(artifact.config) as second:
        assert second.wait() == 2
        assert "listen.unix: found" in second.stderr[-1]
        assert (artifact.directory / "lane.sock").is_socket()


def test_a_file_in_the_place_of_the_socket_is_not_removed(artifact: SmallArtifact) -> None:
    (artifact.directory / "notes.txt").write_text("keep me")
    artifact.write_config(listen={"unix": "notes.txt"})
    with started(artifact.config) as sidecar:
        assert sidecar.wait() == 2
        assert "a file that is no socket" in sidecar.stderr[-1]
    assert (artifact.directory / "notes.txt").read_text() == "keep me"


@pytest.mark.parametrize("field", ["grpc", "tcp", "metrics"])
def test_a_taken_port_is_an_error_that_names_it(artifact: SmallArtifact, field: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        endpoint = f"127.0.0.1:{taken.getsockname()[1]}"
        artifact.write_config(listen={field: endpoint})
        with started(artifact.config) as sidecar:
            assert sidecar.wait() == 2
            last = sidecar.stderr[-1]
    assert last.startswith("sidepool sidecar: error: ")
    assert f"listen.{field}: found '{endpoint}'" in last


def test_a_corrupt_shard_stops_the_start_with_file_and_tensor(artifact: SmallArtifact) -> None:
    file = artifact.shard_file("users")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    for options in ((), ("--check",)):
        with started(artifact.config, *options) as sidecar:
            assert sidecar.wait() == 2
            assert sidecar.stderr[-1].startswith("sidepool sidecar: error: ")
            assert f"{file}: tensor 'users': CRC-32C" in sidecar.stderr[-1]


def test_check_looks_for_the_files_of_tls(artifact: SmallArtifact) -> None:
    artifact.write_config(tls={"cert": "absent.pem", "key": "absent.pem"})
    with started(artifact.config, "--check") as sidecar:
        assert sidecar.wait() == 2
        assert "tls.key: found" in sidecar.stderr[-1]


def test_check_finds_nothing_wrong_with_a_good_configuration(artifact: SmallArtifact) -> None:
    with started(artifact.config, "--check") as sidecar:
        assert sidecar.wait() == 0


def test_a_reload_publishes_a_new_plan_and_renames_the_model(artifact: SmallArtifact) -> None:
    artifact.write_config(previous_epoch_s=0)
    with ready(artifact.config) as (sidecar, _):
        renewed = write_small_artifact(artifact.directory, epoch=2, model="ctr-v2", seed=1)
        sidecar.send(signal.SIGHUP)
        assert sidecar.wait_for("reloaded")["plan_epoch"] == 2
        described = sidecar.control.Describe(control_pb2.DescribeRequest(), timeout=PATIENCE_S)
        assert (described.plan_epoch, described.plan_fingerprint) == (2, renewed.plan.fingerprint)
        assert sidecar.health("ctr-v2") == SERVING
        assert sidecar.health("ctr") == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        assert refused(sidecar.control.Connect, connect_request(artifact))[2].startswith("plan_epoch: found 1; allowed: 2")


def break_config(artifact: SmallArtifact) -> None:
    artifact.write_config(slotz=1)


def break_shard(artifact: SmallArtifact) -> None:
    write_small_artifact(artifact.directory, epoch=2)
    artifact.shard_file("items").unlink()


def break_epoch(artifact: SmallArtifact) -> None:
    write_small_artifact(artifact.directory, epoch=1, model="other")


@pytest.mark.parametrize(
    ("damage", "code", "reason"),
    [
        (break_config, "CONFIG", "slotz: unknown key"),
        (break_shard, "SHARD", "cannot be read"),
        (break_epoch, "PLAN", "epoch: found 1"),
    ],
)
def test_a_reload_that_fails_changes_nothing(artifact: SmallArtifact, damage: Any, code: str, reason: str) -> None:
    with ready(artifact.config) as (sidecar, _):
        damage(artifact)
        sidecar.send(signal.SIGHUP)
        line = sidecar.wait_for("reload refused")
        assert line["code"] == code
        assert reason in line["reason"]
        assert sidecar.health("ctr") == SERVING
        assert sidecar.control.Connect(connect_request(artifact), timeout=PATIENCE_S).token


def test_a_reload_applies_the_log_level_and_says_what_needs_a_restart(artifact: SmallArtifact) -> None:
    with ready(artifact.config) as (sidecar, _):
        artifact.write_config(log_level="error", engines=2)
        sidecar.send(signal.SIGHUP)
        assert sidecar.wait_for("these settings change only with a restart")["settings"] == ["engines"]
        sidecar.control.Connect(connect_request(artifact), timeout=PATIENCE_S)
        sidecar.send(signal.SIGTERM)
        assert sidecar.wait() == 0
        assert not any('"lane admitted"' in line for line in sidecar.stderr)


def test_engines_and_rows_go_on_the_node_and_the_lookahead_is_what_the_configuration_says(artifact: SmallArtifact) -> None:
    nodes = usable_nodes()
    if not nodes:
        pytest.skip("needs a kernel that tells of NUMA nodes")
    node = nodes[-1]
    artifact.write_config(memory={"numa": node.number, "huge_pages": "off"}, pool={"lookahead_bytes": 64}, engines=2)
    with ready(artifact.config) as (sidecar, _):
        described = sidecar.control.Describe(control_pb2.DescribeRequest(), timeout=PATIENCE_S)
        assert {t.rows_ahead for t in described.tables} == {4}
        placed = f"prefer:{node.number} "
        policies = Path(f"/proc/{sidecar.process.pid}/numa_maps")
        deadline = time.monotonic() + PATIENCE_S
        # Rows are copied while serving.
        while placed not in policies.read_text() and not any("NUMA nodes" in line for line in sidecar.stderr):
            assert time.monotonic() < deadline
    artifact.write_config(memory={"numa": 1023})
    with started(artifact.config) as sidecar:
        assert sidecar.wait() == 2
        assert "memory.numa: found 1023; allowed: 'auto', 'off' or a node" in sidecar.stderr[-1]


def test_the_control_plane_checks_certificates_both_ways(artifact: SmallArtifact) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command to make certificates")
    key, cert = artifact.directory / "key.pem", artifact.directory / "cert.pem"
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    names = ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)]
    subprocess.run([*make, *names], check=True, capture_output=True)
    artifact.write_config(tls={"cert": "cert.pem", "key": "key.pem", "client_ca": "cert.pem"})
    with started(artifact.config) as sidecar:
        address = sidecar.wait_for("ready")["grpc"]
        known = grpc.ssl_channel_credentials(cert.read_bytes(), key.read_bytes(), cert.read_bytes())
        nameless = grpc.ssl_channel_credentials(cert.read_bytes())
        with grpc.secure_channel(address, known) as channel:
            assert check_health(channel) == SERVING
        with grpc.secure_channel(address, nameless) as channel, pytest.raises(grpc.RpcError) as caught:
            check_health(channel)
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE


def check_health(channel: grpc.Channel) -> int:
    status: int = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S).status
    return status


def test_the_schema_is_printed(artifact: SmallArtifact) -> None:
    command = [sys.executable, "-m", "sidepool", "sidecar", "--print-schema"]
    printed = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert printed["required"] == ["name", "plan", "shards"]
