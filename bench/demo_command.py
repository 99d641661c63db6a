"""`sidepool demo`."""

from __future__ import annotations

import argparse
from pathlib import Path

VARIANTS = ("single", "multi")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `sidepool demo`."""
    parser.add_argument(
        "--data", type=Path, metavar="FILE", help="Criteo rows (default: ../shared/data/criteo_7200.tsv, else generated)"
    )
    parser.add_argument("--variant", choices=(*VARIANTS, "both"), default="both", help="single ids, bags of ids, or both (default)")
    parser.add_argument("--work-dir", type=Path, default=Path("build/demo"), metavar="DIR", help="default: build/demo")
    parser.add_argument("--lane", choices=("shm", "tcp", "grpc"), default="shm", help="ranker to sidecars (default: shm)")
    parser.add_argument("--rows", type=int, metavar="N", help="send only the first N rows (default: all)")
    parser.add_argument(
        "--train-seconds", type=float, default=20.0, metavar="S", help="per variant; 0 trains nothing (default: 20)"
    )
    parser.add_argument(
        "--rounds", type=int, default=3, metavar="N", help="alternating rounds of the latency comparison (default: 3)"
    )
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> int:
    """Run the demo; raises `SidepoolError` where a step fails."""
    from sidepool.bench.demo import Demo

    variants = VARIANTS if args.variant == "both" else (args.variant,)
    Demo(args).run(variants)
    return 0
