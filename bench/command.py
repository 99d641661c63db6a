"""`sidepool bench NAME`: side-by-side benchmarks. Each is a module with `add_arguments(parser)` and `run(args)`."""

from __future__ import annotations

import argparse
import importlib
from functools import partial
from typing import Any, NoReturn

# name -> (module, one line for --help)
BENCHES = {
    "lane": ("sidepool.bench.lane", "what a lane adds to pooling, beside grpcio and bare ping-pongs of the same bytes"),
    "rdma": ("sidepool.bench.rdma", "the rdma lane beside a bare C exchange of the same bytes; engines; credits under load"),
    "incast": ("sidepool.bench.incast", "many sidecars answering one ranker at once: receive window and deadlines against neither"),
    "plan": ("sidepool.bench.plan", "network bytes of pooling at sidecars and ranker, expected latency of strategies, failover"),
    "soak": ("sidepool.bench.soak", "many clients at full load for minutes: values verified, memory and descriptors watched"),
    "start": ("sidepool.bench.start", "how soon a sidecar over page-cached shards is ready, and what memory it takes"),
    "programs": ("sidepool.bench.programs", "attention over a history in the sidecar, beside rows that travel to the ranker"),
    "checkpoint": ("sidepool.bench.checkpoint", "time and memory of partitioning a checkpoint, also one larger than memory"),
    "pool": ("sidepool.bench.pool", "gather and pool, beside FBGEMM, torch embedding_bag and the speed of reading the same rows"),
    "load": ("sidepool.bench.load_null", "the load generator itself: one core of it on a gRPC server that does nothing"),
    "slo": ("sidepool.bench.slo", "eight models within their latency limits: monolithic, disaggregated, disaggregated and tuned"),
    "serve": ("sidepool.bench.serve", "latency and throughput through Triton, beside the monolithic model"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One subcommand per benchmark."""
    benches = parser.add_subparsers(dest="bench", required=True, metavar="NAME")
    for name, (module, summary) in BENCHES.items():
        bench = benches.add_parser(name, help=summary, description=f"sidepool bench {name}: {summary}.")
        try:
            loaded = importlib.import_module(module)
        except ModuleNotFoundError as e:
            # FBGEMM has no wheels for some machines: the other benchmarks run there all the same.
            package = (e.name or "").partition(".")[0]
            if package == "sidepool":
                raise
            bench.parse_known_args = partial(_refuse, bench, package)  # type: ignore[method-assign]
            continue
        loaded.add_arguments(bench)
        bench.set_defaults(run_bench=loaded.run)


def _refuse(bench: argparse.ArgumentParser, package: str, *_: Any) -> NoReturn:
    bench.error(f"needs the package {package}, which is not installed (requirements.txt says where it can be)")


def run(args: argparse.Namespace) -> int:
    """Run the chosen benchmark."""
    return int(args.run_bench(args))
