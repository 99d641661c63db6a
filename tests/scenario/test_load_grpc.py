"""The load generator on gRPC servers: what it sends, and every way to fail counted as what it is, with the run ending in time."""

from __future__ import annotations

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest
from sidecar_process import wait_until_stopped
from tritonclient.grpc import service_pb2

from sidepool import _native
from sidepool.bench.load import LoadResult, make_schedule, run_load
from sidepool.bench.load.arrivals import constant, poisson
from sidepool.bench.load.null_server import PATH, compile_null_server, null_server
from sidepool.bench.load.target import NOT_SENT, OK, UNANSWERED
from sidepool.bench.load.triton import GrpcTarget, TritonTarget
from sidepool.wire.errors import TransportError

RATE, SECONDS, DRAIN_S = 400.0, 0.5, 1.0
# Between what a connection takes, about 30 kB, and what it takes with all requests outstanding, about 150 kB.
LIMIT_BYTES = 80_000


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    reason = _native.grpc_load_unavailable()
    if reason:
        pytest.skip(reason)
    return compile_null_server(tmp_path_factory.mktemp("null"))


def load(address: str, *, seconds: float = SECONDS, bodies: tuple[int, ...] = (40, 90_000), **limits: int) -> LoadResult:
    """Small and large requests in turn: the large ones need several frames and windows."""
    target = GrpcTarget(address, PATH, [bytes(n) for n in bodies], **limits)
    schedule = make_schedule(constant(RATE, seconds, 0), len(bodies), 0, seconds=seconds)
    return run_load(target, schedule, drain_s=DRAIN_S, slo_ms=1000.0)


def test_every_request_is_answered_once_and_later_than_it_was_due(program: Path) -> None:
    with null_server(program, 70_000) as (address, _):
        result = load(address, connections=3)
    assert (result.status == OK).all()
    assert (result.sent_ns >= result.schedule.due_ns).all()
    assert (result.done_ns > result.sent_ns).all()
    assert result.errors == {}
    assert result.attainment == 1.0
    assert result.as_json()["scheduled"] == len(result.schedule)


@pytest.mark.parametrize(
    ("fault", "name", "example"),
    [
        ("length", "malformed reply", "not one whole uncompressed message"),
        ("status", "malformed reply", "no valid gRPC status"),
        ("http", "malformed reply", "HTTP status 503"),
        ("bytes", "malformed reply", "not HTTP/2"),
        ("reset", "connection lost", "reset the call"),
        ("overloaded", "UNAVAILABLE [OVERLOADED]", "[OVERLOADED] no credit!"),
        ("silent", "unanswered", "no answer by the end"),
    ],
)
def test_what_a_server_does_wrong_is_counted_by_name(program: Path, fault: str, name: str, example: str) -> None:
    begin = time.monotonic()
    with null_server(program, 100, fault=fault) as (address, _):
        result = load(address)
    # After a connection ended, requests may find none for a moment; but nothing counts as answered.
    assert result.errors.keys() <= {name, "connection lost"}
    assert result.errors[name] > 0
    assert example in result.examples[name]
    assert sum(result.errors.values()) == len(result.schedule)
    assert result.latency_ns.size == 0
    assert result.goodput_qps == 0.0
    assert time.monotonic() - begin < SECONDS + DRAIN_S + 5


def test_a_cut_connection_loses_what_was_outstanding_and_is_made_again(program: Path) -> None:
    with null_server(program, 100, fault="cut") as (address, _):
        result = load(address)
    assert result.totals["reconnects"] > 0
    assert result.latency_ns.size > 0
    assert result.errors.keys() == {"connection lost"}


def test_a_killed_server_costs_what_was_due_after_it_and_the_run_ends(program: Path) -> None:
    with null_server(program, 100) as (address, pid):
        threading.Timer(0.3, os.kill, (pid, signal.SIGKILL)).start()
        result = load(address, seconds=2.0)
    assert result.errors.keys() == {"connection lost"}
    lost = result.status != OK
    assert 0 < lost.sum() < lost.size
    assert lost[np.flatnonzero(lost)[0] :].all()


def test_a_port_without_a_server_is_an_error_at_once() -> None:
    with pytest.raises(TransportError, match="no HTTP/2 server answers there"):
        load("127.0.0.1:1")


def test_latencies_of_a_stalled_server_run_from_when_requests_were_due(program: Path) -> None:
    stall_s, seconds = 0.6, 1.2
    stalled: list[int] = []

    def stall(pid: int) -> None:
        os.kill(pid, signal.SIGSTOP)
        wait_until_stopped(pid)
        stalled.append(time.monotonic_ns())
        time.sleep(stall_s)
        stalled.append(time.monotonic_ns())
        os.kill(pid, signal.SIGCONT)

    with null_server(program, 100) as (address, pid):
        timer = threading.Timer(0.3, stall, (pid,))
        timer.start()
        result = load(address, seconds=seconds)
        timer.join()
    assert (result.status == OK).all()
    due_ns = result.schedule.due_ns + result.totals["start_ns"]
    within = (due_ns > stalled[0]) & (due_ns < stalled[1])
    # The load went on at its rate, and each request waited for what was left of the stall.
    assert within.sum() > 0.5 * RATE * stall_s
    waited_ns = (result.done_ns - result.schedule.due_ns)[within]
    assert (waited_ns >= stalled[1] - due_ns[within]).all()
    assert result.percentile_ms(90) > 1e3 * stall_s / 4


def test_requests_beyond_the_memory_limit_are_counted_and_never_sent(program: Path) -> None:
    with null_server(program, 100, fault="silent") as (address, _):
        result = load(address, memory_bytes=LIMIT_BYTES)
    assert set(np.unique(result.status)) == {NOT_SENT, UNANSWERED}
    assert 20 < (result.status == UNANSWERED).sum() < 190
    assert result.totals["most_bytes"] <= LIMIT_BYTES
    assert "memory limit" in result.examples["not sent"]


def test_each_request_carries_the_deadline_that_it_has_from_when_it_was_due() -> None:
    heard: dict[int, list[int]] = {}

    def answer(request: service_pb2.ModelInferRequest, context: grpc.ServicerContext) -> service_pb2.ModelInferResponse:
        assert request.parameters["timeout"].int64_param == 500_000
        np.testing.assert_array_equal(np.frombuffer(request.raw_input_contents[0], np.int64), np.arange(5000))
        heard.setdefault(len(request.model_name), []).append(request.parameters["deadline_unix_us"].int64_param)
        return service_pb2.ModelInferResponse(model_name=request.model_name)

    handler = grpc.unary_unary_rpc_method_handler(
        answer, service_pb2.ModelInferRequest.FromString, service_pb2.ModelInferResponse.SerializeToString
    )
    server = grpc.server(ThreadPoolExecutor(1))
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("inference.GRPCInferenceService", {"ModelInfer": handler}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        # Names of such lengths that the deadline lies before, across and behind the end of an HTTP/2 frame of 16,384 bytes.
        for name in (8, 16_300, 16_310, 16_314, 16_316, 16_318, 16_330, 20_000):
            target = TritonTarget(f"127.0.0.1:{port}", "m" * name, [{"ids": np.arange(5000)}], deadline_ms=500)
            due_ns = constant(100.0, 0.1, 0)
            began_us = time.time_ns() // 1000
            result = run_load(target, make_schedule(due_ns, 1, 0))
            assert result.errors == {}
            deadlines_us = np.sort(heard[name][1:])  # the first is asked before the load
            starts_us = deadlines_us - 500_000 - due_ns // 1000
            assert np.ptp(starts_us) <= 1
            assert began_us < starts_us[0] < time.time_ns() // 1000
    finally:
        server.stop(None).wait()


def test_ctrl_c_ends_a_run_at_once(program: Path) -> None:
    with null_server(program, 100) as (address, _):
        target = GrpcTarget(address, PATH, [b""])
        schedule = make_schedule(poisson(10.0, 60.0, 0), 1, 0, seconds=60.0)
        views: list[LoadResult] = []

        def interrupt(result: LoadResult) -> None:
            views.append(result)
            raise KeyboardInterrupt

        begin = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            run_load(target, schedule, view=interrupt)
    assert time.monotonic() - begin < 10
    assert views[0].latency_ns.size <= len(schedule)
