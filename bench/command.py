"""`sidepool bench NAME`: side-by-side benchmarks. Each is a module with `add_arguments(parser)` and `run(args)`."""

from __future__ import annotations

import argparse
import importlib

# name -> (module, one line for --help)
BENCHES = {
    "lane": ("sidepool.bench.lane", "what a lane adds to pooling, beside grpcio and bare ping-pongs of the same bytes"),
    "soak": ("sidepool.bench.soak", "many clients at full load for minutes: values verified, memory and descriptors watched"),
    "start": ("sidepool.bench.start", "how soon a sidecar over page-cached shards is ready, and what memory it takes"),
    "pool": ("sidepool.bench.pool", "gather and pool, beside FBGEMM, torch embedding_bag and the speed of reading the same rows"),
    "serve": ("sidepool.bench.serve", "latency and throughput through Triton, beside the monolithic model"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One subcommand per benchmark."""
    benches = parser.add_subparsers(dest="bench", required=True, metavar="NAME")
    for name, (module, summary) in BENCHES.items():
        bench = benches.add_parser(name, help=summary, description=f"sidepool bench {name}: {summary}.")
        loaded = importlib.import_module(module)
        loaded.add_arguments(bench)
        bench.set_defaults(run_bench=loaded.run)


def run(args: argparse.Namespace) -> int:
    """Run the chosen benchmark."""
    return int(args.run_bench(args))
