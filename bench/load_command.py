"""`sidepool load`: an open-loop load on Triton, on sidecars, or in this process."""

from __future__ import annotations

import argparse
from pathlib import Path

# Distinct requests: their sizes have the distribution's tail, and their rows do not all stay in a core's cache.
REQUESTS = 256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `sidepool load`."""
    what = parser.add_argument_group("what is loaded")
    what.add_argument("--artifact", type=Path, required=True, metavar="DIR", help="what sidepool partition wrote; requests fit it")
    what.add_argument("--triton", metavar="HOST:PORT", help="a Triton's gRPC port; without it, see --target")
    what.add_argument("--model", metavar="NAME", help="the model in Triton (default: the artifact's)")
    what.add_argument(
        "--target",
        choices=("triton", "sidecars", "lookups", "pipeline"),
        help="sidecars: lookups over --lane; lookups: on the shards, here; pipeline: the model, here",
    )
    what.add_argument("--lane", choices=("auto", "shm", "tcp", "rdma", "grpc"), default="auto", help="to sidecars (default: auto)")
    what.add_argument("--shared-memory", action="store_true", help="Triton: inputs and outputs in system shared memory")
    what.add_argument("--connections", type=int, default=1, metavar="N", help="Triton: HTTP/2 connections (default: 1)")
    what.add_argument("--callers", type=int, metavar="N", help="other targets: calls under way at most (default: 64; pipeline: 1)")
    when = parser.add_argument_group("when")
    when.add_argument(
        "--arrivals",
        default="poisson",
        metavar="KIND",
        help="poisson (default), constant, diurnal, bursty, or a file of timestamps",
    )
    when.add_argument("--rate", type=float, default=100.0, metavar="QPS", help="mean requests per second (default: 100)")
    when.add_argument("--seconds", type=float, default=10.0, metavar="S", help="(default: 10)")
    when.add_argument("--warmup", type=float, default=1.0, metavar="S", help="the first of --seconds, not reported (default: 1)")
    asked = parser.add_argument_group("what is asked")
    asked.add_argument("--sizes", default="128", metavar="KIND", help="samples: N (default: 128), mlperf, lognormal, a file")
    asked.add_argument("--ids", default="calibrated", metavar="KIND", help="calibrated (default), zipf, uniform, or criteo:FILE")
    asked.add_argument("--ids-per-bag", type=int, default=1, metavar="N", help="of jagged features (default: 1)")
    asked.add_argument("--requests", type=int, default=REQUESTS, metavar="N", help=f"distinct ones (default: {REQUESTS})")
    asked.add_argument("--deadline-ms", type=float, metavar="MS", help="every request's own; Triton is told as its timeout")
    asked.add_argument("--seed", type=int, default=0)
    told = parser.add_argument_group("what is reported")
    told.add_argument("--slo-ms", type=float, metavar="MS", help="the latency limit that goodput is about")
    told.add_argument("--json", type=Path, metavar="FILE")
    told.add_argument("--plot", type=Path, metavar="PNG")
    mlperf = parser.add_argument_group("MLPerf")
    mlperf.add_argument("--mlperf", choices=("server", "offline"), help="let MLPerf LoadGen drive Triton; files in --mlperf-dir")
    mlperf.add_argument("--mlperf-dir", type=Path, default=Path("build/mlperf"), metavar="DIR")


def run(args: argparse.Namespace) -> int:
    """Put the load on and report; raises `SidepoolError`. Exit status 1: nothing was answered, or LoadGen calls it invalid."""
    from sidepool.bench.load.session import Session

    return Session(args).run()
