"""`sidepool load` on every target of one deployment: a real Triton, its sidecars, and the same model in this process."""

from __future__ import annotations

import base64
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hdrh.histogram import HdrHistogram
from served_dlrm import Served, served
from sidecar_process import wait_until_stopped

from sidepool.__main__ import main
from sidepool.bench import criteo
from sidepool.bench.deployment import DISAGGREGATED
from sidepool.bench.load import LoadResult, make_schedule, run_load
from sidepool.bench.load.arrivals import constant
from sidepool.bench.load.mlperf import SUMMARY
from sidepool.bench.load.target import OK
from sidepool.bench.load.triton import TritonTarget

pytestmark = pytest.mark.triton
SHM = Path("/dev/shm")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(jagged=True, directory=tmp_path_factory.mktemp("load")) as running:
        yield running


@pytest.fixture
def load(model: Served, tmp_path: Path) -> Any:
    """Runs the command on the deployment; gives its exit status and its JSON."""

    def run(*options: str) -> tuple[int, dict[str, Any]]:
        out = tmp_path / "load.json"
        common = ["--artifact", str(model.deployment.directory), "--json", str(out), "--requests", "8", "--sizes", "4"]
        status = main(["load", *common, "--rate", "100", "--seconds", "1", "--warmup", "0.25", *options])
        return status, json.loads(out.read_text())

    return run


def check(found: dict[str, Any]) -> None:
    assert found["errors"] == {}
    assert found["answered_qps"] == found["offered_qps"] == pytest.approx(100, rel=0.35)
    latency = found["latency_ms"]
    assert 0 < latency["p50"] <= latency["p99"] <= latency["max"]
    histogram = HdrHistogram.decode(found["hdr"].encode())
    assert histogram.get_total_count() == found["scheduled"]
    # Half of what it holds on either side of the median, which may lie far from the nearest latency.
    median_us, below, above = latency["p50"] * 1e3, 0, 0
    for step in histogram.get_recorded_iterator():
        below += step.count_added_in_this_iter_step * (step.value_iterated_to <= 1.01 * median_us)
        above += step.count_added_in_this_iter_step * (step.value_iterated_to >= 0.99 * median_us)
    assert min(below, above) >= found["scheduled"] / 2
    assert base64.b64decode(found["hdr"])


def test_a_model_in_triton(load: Any, model: Served, tmp_path: Path) -> None:
    address = ["--triton", model.deployment.server.grpc]
    status, found = load(*address, "--plot", str(tmp_path / "load.png"), "--ids-per-bag", "3")
    assert status == 0
    check(found)
    assert (tmp_path / "load.png").read_bytes().startswith(b"\x89PNG")
    before = set(SHM.iterdir())
    status, found = load(*address, "--shared-memory", "--arrivals", "bursty", "--connections", "3")
    assert status == 0
    assert found["target"]["shared_memory"]
    assert found["errors"] == {}
    assert {path.name for path in set(SHM.iterdir()) - before if path.name.startswith("sidepool-")} == set()
    model.check_serving()


def test_real_rows_and_mlperf_sizes(load: Any, model: Served, tmp_path: Path) -> None:
    criteo.write_rows(criteo.generate_rows(50), tmp_path / "rows.tsv")
    # Time enough for a busy machine, which serves so many samples more slowly than they come.
    rows = ["--ids", f"criteo:{tmp_path / 'rows.tsv'}", "--sizes", "mlperf", "--arrivals", "constant", "--deadline-ms", "60000"]
    status, found = load("--triton", model.deployment.server.grpc, *rows)
    assert status == 0
    check(found)
    assert found["sizes"]["mean"] == pytest.approx(240, rel=0.1)


@pytest.mark.parametrize("target", ["sidecars", "lookups", "pipeline"])
def test_its_lookups_and_the_model_in_this_process(load: Any, target: str) -> None:
    status, found = load("--target", target, "--callers", "4", "--arrivals", "constant")
    assert status == 0
    check(found)


def test_what_the_ranker_refuses_is_counted_by_its_code(model: Served) -> None:
    good, bad = model.request(2), model.request(2)
    bad["sparse.values"] = bad["sparse.values"] + 10**9
    found = _run(TritonTarget(model.deployment.server.grpc, DISAGGREGATED, [good, bad]))
    assert list(found.errors) == ["INVALID_ARGUMENT [REJECTED]"]
    assert found.latency_ns.size == found.errors["INVALID_ARGUMENT [REJECTED]"] == len(found.schedule) // 2
    assert "outside its table" in found.examples["INVALID_ARGUMENT [REJECTED]"]


def test_a_deadline_that_cannot_be_met_is_counted_as_such(model: Served) -> None:
    target = TritonTarget(model.deployment.server.grpc, DISAGGREGATED, [model.request(2)], parameters={"deadline_ms": "1000"})
    assert _run(target).errors == {}
    with pytest.raises(Exception, match="DEADLINE"):
        TritonTarget(model.deployment.server.grpc, DISAGGREGATED, [model.request(2)], parameters={"deadline_ms": "0.000001"})


def test_a_stalled_triton_shows_the_latencies_of_scheduled_times(model: Served) -> None:
    pid, stall_s, stalled = model.deployment.server.pid, 1.0, list[int]()

    def stall() -> None:
        os.kill(pid, signal.SIGSTOP)
        wait_until_stopped(pid)
        stalled.append(time.monotonic_ns())
        time.sleep(stall_s)
        stalled.append(time.monotonic_ns())
        os.kill(pid, signal.SIGCONT)

    timer = threading.Timer(0.5, stall)
    timer.start()
    result = _run(TritonTarget(model.deployment.server.grpc, DISAGGREGATED, [model.request(2)]), seconds=2.5)
    timer.join()
    assert (result.status == OK).all()
    due_ns = result.schedule.due_ns + result.totals["start_ns"]
    within = (due_ns > stalled[0] + 20_000_000) & (due_ns < stalled[1])
    assert within.sum() > 0.5 * 100 * stall_s
    assert ((result.done_ns - result.schedule.due_ns)[within] >= stalled[1] - due_ns[within]).all()


@pytest.mark.parametrize("scenario", ["server", "offline"])
def test_mlperf_loadgen_drives_triton_and_leaves_its_files(model: Served, tmp_path: Path, scenario: str) -> None:
    files = tmp_path / "mlperf"
    options = ["--mlperf", scenario, "--mlperf-dir", str(files), "--rate", "50", "--seconds", "1", "--requests", "8"]
    command = ["load", "--artifact", str(model.deployment.directory), "--triton", model.deployment.server.grpc, *options]
    # On a busy machine 60 ms for 99 % of the requests may be missed, which LoadGen then says.
    assert main([*command, "--slo-ms", "5000"]) in (0, 1)
    summary = (files / SUMMARY).read_text()
    assert f"Scenario : {scenario.capitalize()}" in summary
    assert "Samples per second" in summary or "Completed samples per second" in summary
    assert (files / "mlperf_log_detail.txt").stat().st_size > 0


def _run(target: TritonTarget, *, seconds: float = 1.0) -> LoadResult:
    schedule = make_schedule(constant(100.0, seconds, 0), target.requests, 0, seconds=seconds)
    result = run_load(target, schedule)
    assert np.isin(result.status, (-1,)).sum() == 0
    return result
