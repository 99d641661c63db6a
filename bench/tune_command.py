"""`sidepool tune`: find the settings with which a model serves most within a latency limit."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from sidepool.wire.errors import ConfigError

# As `sidepool load`: sizes then have the distribution's tail.
REQUESTS = 256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `sidepool tune`."""
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="what sidepool partition wrote; it is not changed")
    parser.add_argument("--slo", required=True, metavar="pP=Nms", help="the limit, such as p95=100ms")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where files and report go (default: DIR-tuned beside the model)")
    parser.add_argument("--minutes", type=float, default=15.0, metavar="M", help="stop then; run again to go on (default: 15)")
    parser.add_argument("--sizes", default="lognormal", metavar="KIND", help="samples: lognormal (default), mlperf, N, a file")
    parser.add_argument("--ids", default="calibrated", metavar="KIND", help="calibrated (default), zipf or uniform")
    parser.add_argument("--ids-per-bag", type=int, default=1, metavar="N", help="of jagged features (default: 1)")
    parser.add_argument("--requests", type=int, default=REQUESTS, metavar="N", help=f"distinct ones (default: {REQUESTS})")
    parser.add_argument("--online", action="store_true", help="have the ranker go on adjusting split_samples while it serves")
    parser.add_argument("--quick", action="store_true", help="loads a quarter as long: for trying the command, not for settings")
    parser.add_argument("--work-dir", type=Path, default=Path("build/bench"), metavar="DIR", help="default: build/bench")
    parser.add_argument("--seed", type=int, default=0)


def limit_of(text: str) -> tuple[float, float]:
    """Percent and milliseconds of `p95=100ms`; raises `ConfigError`."""
    found = re.fullmatch(r"p(\d+(?:\.\d+)?)=(\d+(?:\.\d+)?)ms", text)
    if found is None or not 0 < float(found[1]) < 100 or not float(found[2]) > 0:
        raise ConfigError(f"--slo: found {text!r}; allowed: a percentile and milliseconds, such as p95=100ms")
    return float(found[1]), float(found[2])


def run(args: argparse.Namespace) -> int:
    """Climb, report, write; raises `SidepoolError`."""
    from sidepool.bench.tuning.session import tune

    return tune(args)
