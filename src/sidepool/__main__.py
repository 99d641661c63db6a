"""The command `sidepool`. Commands are imported when they run, so that `--help` costs no torch."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from sidepool import __version__
from sidepool.wire.errors import SidepoolError

# name -> (module with add_arguments(parser) and run(args) -> exit status, one line for --help)
COMMANDS = {
    "partition": ("sidepool.partition.command", "turn a PyTorch model into a Triton model repository, a plan and shards"),
    "convert": ("sidepool.partition.convert", "turn tables of an HPS directory or a torch state dict into a plan and shards"),
    "plan": ("sidepool.partition.plan_command", "place the tables of a plan on an inventory of machines, and write its shards"),
    "profile": ("sidepool.sidecar.profile", "how often running sidecars' tables are asked, as the planner reads it"),
    "sidecar": ("sidepool.sidecar.command", "serve shards on a CPU node"),
    "etcd": ("sidepool.partition.etcd_command", "put a deployment's plan into etcd; show it, and the sidecars that are there"),
    "probe": ("sidepool.probe", "whether a model in Triton answers: one tiny inference, for Kubernetes"),
    "load": ("sidepool.bench.load_command", "an open-loop load on Triton, on sidecars or in this process; MLPerf LoadGen"),
    "demo": ("sidepool.bench.demo_command", "the whole way on this machine: partition, serve, compare scores, measure"),
    "tune": ("sidepool.bench.tune_command", "find the settings with which a model serves most within a latency limit"),
    "doctor": ("sidepool.doctor", "what this machine offers, and what to do about the rest"),
    "bench": ("sidepool.bench.command", "side-by-side benchmarks"),
}
INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status: 2 for an error that sidepool explains, 130 after Ctrl-C."""
    words = list(sys.argv[1:] if argv is None else argv)
    chosen = words[0] if words and words[0] in COMMANDS else None
    args = _parser(chosen).parse_args(words)
    try:
        return int(args.run(args))
    except SidepoolError as e:
        print(f"sidepool {args.command}: error: [{e.code}] {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"sidepool {args.command}: interrupted", file=sys.stderr)
        return INTERRUPTED


def _parser(chosen: str | None) -> argparse.ArgumentParser:
    """The parser of all commands; only the chosen one's module is imported and adds its arguments."""
    parser = argparse.ArgumentParser(prog="sidepool", description="Disaggregated recommendation serving for Triton.")
    parser.add_argument("--version", action="version", version=f"sidepool {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=f"sidepool {name}: {summary}.")
        if name == chosen:
            loaded = importlib.import_module(module)
            loaded.add_arguments(command)
            command.set_defaults(run=loaded.run)
    return parser


if __name__ == "__main__":
    sys.exit(main())
