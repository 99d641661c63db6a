"""What happens around requests through the real Triton: lost sidecars, metrics, wrong configuration, and stopping."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from etcd_server import PREFIX, etcd_server
from numpy.typing import NDArray
from served_dlrm import Served, served
from tritonclient.grpc import InferenceServerException

from sidepool.bench.deployment import DISAGGREGATED
from sidepool.bench.stage_table import between, snapshot
from sidepool.bench.traffic import Caller, infer_inputs
from sidepool.bench.triton_server import SHM, TritonServer, missing, processes_of_group
from sidepool.client import ScoreClient
from sidepool.probe import probe
from sidepool.wire.errors import DeadlineExceeded, TransportError
from sidepool.wire.plan import load_plan

pytestmark = pytest.mark.triton

# Reconnecting backs off for at most a few seconds.
PATIENCE_S = 30.0


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(jagged=False, directory=tmp_path_factory.mktemp("deployment")) as found:
        yield found


def test_a_lost_sidecar_fails_requests_as_retryable_until_it_is_back(running: Served) -> None:
    running.check_serving()
    sidecar = running.deployment.sidecars[1]
    sidecar.kill()
    for seed in range(3):
        assert "[TRANSPORT]" in running.refusal(running.request(4, seed))
    sidecar.start()
    sidecar.wait_ready()
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            running.check_serving()
            break
        except Exception:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
    for seed in range(20):
        running.check_serving(seed)


def test_the_stages_of_a_request_are_reported_as_metrics(running: Served) -> None:
    server = running.deployment.server
    before = snapshot(server, DISAGGREGATED)
    for seed in range(10):
        running.check_serving(seed)
    running.refusal(running.request(4), parameters={"deadline_ms": 0})
    after = snapshot(server, DISAGGREGATED)
    stages = between(before, after)
    assert after.metrics["executes",] - before.metrics.get(("executes",), 0.0) == 10
    assert after.metrics["samples",] - before.metrics.get(("samples",), 0.0) == 30
    assert after.metrics["errors", "DEADLINE"] - before.metrics.get(("errors", "DEADLINE"), 0.0) == 1
    assert stages.requests_per_execute == 1
    assert list(stages.sidecar_us) == ["sidecar-0", "sidecar-1"]
    assert all(us > 0 for us in (*stages.ranker_us.values(), *(s["pool"] for s in stages.sidecar_us.values())))
    # 3 samples x 26 ids of 8 bytes out, 3 x 26 vectors of 64 floats back, and frame headers.
    request, response = (sum(both[i] for both in stages.sidecar_bytes.values()) for i in (0, 1))
    assert 3 * 26 * 8 < request < 3 * 26 * 8 + 4096
    assert 3 * 26 * 256 < response < 3 * 26 * 256 + 4096


def test_an_expired_timeout_is_a_deadline_error(running: Served) -> None:
    # Triton's queue knows it first, if a request waits there at all.
    said = running.refusal(running.request(4), timeout=1)
    assert "[DEADLINE]" in said or "Request timeout expired" in said
    running.check_serving()


def test_moments_and_priorities_reach_the_ranker(running: Served) -> None:
    def ask(**parameters: int) -> NDArray[np.float32]:
        return running.infer(running.request(3, 5), parameters=parameters)

    now_us = time.time_ns() // 1000
    np.testing.assert_allclose(ask(deadline_unix_us=now_us + 60_000_000, lookup_priority=7), running.expected(3, 5), atol=1e-5)
    with pytest.raises(InferenceServerException, match=r"\[DEADLINE\] parameter deadline_unix_us: passed"):
        ask(deadline_unix_us=now_us - 1)
    with pytest.raises(InferenceServerException, match=r"\[REJECTED\] parameter lookup_priority: found 2147483648"):
        ask(lookup_priority=1 << 31)
    dense, ids = running.request(3, 5).values()
    with ScoreClient(running.deployment.server.grpc, DISAGGREGATED) as client:
        (scores,) = client.score({"dense": dense, "sparse": ids}, deadline_ms=60_000, priority=1).values()
        np.testing.assert_allclose(scores.reshape(-1), running.expected(3, 5), atol=1e-5)
        with pytest.raises(DeadlineExceeded):
            client.score({"dense": dense, "sparse": ids}, deadline_ms=0.002)


def test_cancelled_requests_leave_the_server_serving(running: Served) -> None:
    client = running.caller._client
    done: list[object] = []
    calls = [
        client.async_infer(DISAGGREGATED, infer_inputs(running.request(512)), lambda result, error: done.append(error))
        for _ in range(8)
    ]
    for call in calls:
        call.cancel()
    deadline = time.monotonic() + PATIENCE_S
    while len(done) < len(calls) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(done) == len(calls)
    running.check_serving()


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("lanes", "shm", "lanes: unknown key"),
        ("lane", "carrier pigeon", "carrier pigeon"),
        ("torch_threads", "many", "whole number"),
    ],
)
def test_a_wrong_parameter_stops_the_model_from_loading_and_is_named(
    running: Served, tmp_path: Path, key: str, value: str, said: str
) -> None:
    copy_model(running, tmp_path / "repository", **{key: value})
    with (
        pytest.raises(TransportError) as failed,
        TritonServer(tmp_path / "repository", work_dir=Path("build"), log=tmp_path / "triton.log"),
    ):
        pass
    assert said in str(failed.value) + (tmp_path / "triton.log").read_text()


def test_a_ranker_takes_its_plan_from_etcd(running: Served, tmp_path: Path) -> None:
    plan = load_plan(running.deployment.server.repository.parent / "plan.yaml")
    with etcd_server(tmp_path / "etcd") as etcd:
        with closing(etcd.settings().plan_source()) as source:
            source.publish(plan)
        copy_model(running, tmp_path / "repository", etcd=etcd.endpoint, etcd_prefix=PREFIX)
        (tmp_path / "repository" / DISAGGREGATED / "1" / "plan.yaml").unlink()
        with TritonServer(tmp_path / "repository", work_dir=Path("build"), log=tmp_path / "triton.log") as server:
            caller = Caller(server.grpc, DISAGGREGATED)
            with closing(caller):
                scores = caller.infer(infer_inputs(running.request(3, 7)))
                np.testing.assert_allclose(scores, running.expected(3, 7), atol=1e-5)
                etcd.kill()
                scores = caller.infer(infer_inputs(running.request(3, 8)))
                np.testing.assert_allclose(scores, running.expected(3, 8), atol=1e-5)


def test_a_server_leaves_nothing_behind_when_its_block_fails(running: Served, tmp_path: Path) -> None:
    server = TritonServer(running.deployment.server.repository, work_dir=Path("build"), log=tmp_path / "triton.log")
    groups = []

    def fail_inside() -> None:
        with server:
            groups.append(server.pid)
            assert len(processes_of_group(server.pid)) >= 2  # the server and its stubs
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail_inside()
    assert processes_of_group(groups[0]) == []
    assert list(SHM.glob(f"{server.shm_prefix}*")) == []


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["starting Triton", "sending rows"])
def test_an_interrupted_demo_leaves_nothing_behind(tmp_path: Path, moment: str) -> None:
    if missing() is not None:
        pytest.skip(f"no Triton: {missing()}")
    command = [
        sys.executable,
        "-u",
        "-m",
        "sidepool",
        "demo",
        "--variant",
        "single",
        "--train-seconds",
        "0",
        "--work-dir",
        str(tmp_path),
    ]
    demo = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert demo.stdout is not None
        said = ""
        while moment not in said:
            line = demo.stdout.readline()
            assert line, said
            said += line
        assert len(processes_naming(tmp_path)) >= 3  # the demo and two sidecars
        demo.send_signal(signal.SIGINT)
        rest = demo.stdout.read()
        assert demo.wait(60) == 130, said + rest
    finally:
        demo.kill()
        demo.wait()
        if demo.stdout is not None:
            demo.stdout.close()
    assert processes_naming(tmp_path) == []
    assert list(SHM.glob(f"sidepool_{demo.pid}_*")) == []


def processes_naming(path: Path) -> list[str]:
    """Command lines that hold `path`: everything the demo starts is told to work there."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = file.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue  # ended meanwhile
        if str(path) in words:
            found.append(words)
    return found


def test_the_probe_explains_what_it_was_asked_wrongly(running: Served) -> None:
    ran = subprocess.run(probe_command(running.deployment.server, "--timeout", "0"), capture_output=True, text=True)
    assert ran.returncode == 2
    assert "timeout: found 0.0; allowed: seconds above 0" in ran.stderr
    with pytest.raises(TransportError, match="127"):
        probe("127.0.0.1:1", DISAGGREGATED, PATIENCE_S)


def test_the_liveness_probe_fails_once_the_models_process_is_gone_and_not_before(running: Served) -> None:
    """The last test of the deployment: Triton does not start a model's process again."""
    server, sidecar = running.deployment.server, running.deployment.sidecars[1]
    running.check_serving()
    assert probe(server.http, DISAGGREGATED, PATIENCE_S) == f"{DISAGGREGATED}: scores"
    sidecar.kill()
    assert "[TRANSPORT]" in probe(server.http, DISAGGREGATED, PATIENCE_S), "a lost sidecar is no reason to restart Triton"
    sidecar.start()
    sidecar.wait_ready()
    with pytest.raises(TransportError, match="unknown model"):
        probe(server.http, "another", PATIENCE_S)
    for stub in stubs_of(server, DISAGGREGATED):
        os.kill(stub, signal.SIGKILL)
    server.get_json("/v2/health/ready")  # Triton itself notices nothing: this raises unless the answer is 200
    deadline = time.monotonic() + PATIENCE_S
    while True:
        ran = subprocess.run(probe_command(server, "--timeout", "5"), capture_output=True, text=True)
        if ran.returncode != 0 or time.monotonic() > deadline:
            break
    assert ran.returncode == 2
    assert "[TRANSPORT]" in ran.stderr


def copy_model(running: Served, repository: Path, **parameters: str) -> None:
    """A repository with the deployment's model, some of its parameters set anew."""
    source, model = running.deployment.server.repository / DISAGGREGATED, repository / DISAGGREGATED
    (model / "1").mkdir(parents=True)
    for file in (source / "1").iterdir():
        if file.is_file():
            (model / "1" / file.name).symlink_to(file)
    lines = (source / "config.pbtxt").read_text().splitlines()
    lines = [line for line in lines if not any(f'key: "{key}"' in line for key in parameters)]
    lines += [f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}' for key, value in parameters.items()]
    (model / "config.pbtxt").write_text("\n".join(lines) + "\n")


def probe_command(server: TritonServer, *options: str) -> list[str]:
    return [sys.executable, "-m", "sidepool", "probe", "--triton", server.http, "--model", DISAGGREGATED, *options]


def stubs_of(server: TritonServer, model: str) -> list[int]:
    """Processes in which Triton runs a model's Python."""
    found = []
    for pid in processes_of_group(server.pid):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
        if "triton_python_backend_stub" in words and f"/{model}/" in words:
            found.append(pid)
    assert found
    return found
