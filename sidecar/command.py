"""`sidepool sidecar`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from sidepool.sidecar import logs
from sidepool.sidecar.config import load_sidecar_config, schema
from sidepool.sidecar.control import server_credentials
from sidepool.sidecar.loader import load
from sidepool.sidecar.migrate import migrate
from sidepool.sidecar.process import SidecarProcess
from sidepool.wire.control_channel import ClientTls
from sidepool.wire.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("action", nargs="?", choices=("migrate",), help="move a lane of a running sidecar to another engine")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--config", type=Path, metavar="FILE", help="the sidecar's configuration (docs/sidecar.md)")
    what.add_argument("--print-schema", action="store_true", help="print the JSON Schema of the configuration and exit")
    parser.add_argument("--check", action="store_true", help="check the configuration, the plan and the shards, then exit")
    moving = parser.add_argument_group("migrate")
    moving.add_argument("--at", metavar="HOST:PORT", help="the sidecar's control plane")
    moving.add_argument("--lane", type=int, metavar="N", help="the lane's id, as Stats gives it")
    moving.add_argument("--to", type=int, metavar="ENGINE", help="the engine's number, from 0")
    for file, what_for in (("ca", "authorities of the sidecar's certificate"), ("cert", "own certificate"), ("key", "its key")):
        moving.add_argument(f"--{file}", type=Path, metavar="FILE", help=f"{what_for} (PEM)")
    parser.add_argument("--ready-file", type=Path, metavar="FILE", help="also write the ready line to FILE; removed at exit")


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status. Raises `ConfigError`, `PlanError` or `ShardCorrupt`."""
    if args.action == "migrate":
        missing = [f"--{name}" for name in ("at", "lane", "to") if getattr(args, name) is None]
        if missing or min(args.lane, args.to) < 0:
            found = f"no {', '.join(missing)}" if missing else "numbers below 0"
            raise ConfigError(f"migrate: found {found}; allowed: --at HOST:PORT --lane N --to ENGINE")
        migrate(args.at, args.lane, args.to, ClientTls(args.ca, args.cert, args.key))
        print(f"lane {args.lane} moves to engine {args.to}")
    elif args.config is None and not args.print_schema:
        raise ConfigError("sidecar: found neither --config nor --print-schema; allowed: one of them, or migrate")
    elif args.print_schema:
        print(json.dumps(schema(), indent=2))
    elif args.check:
        config = load_sidecar_config(args.config)
        logs.start_logging(config.log_level)
        if config.tls is not None:
            server_credentials(config.tls)
        if config.coordination is not None:
            config.coordination.connect().close()  # its files are read
        load(config)
        print(f"{args.config}: sidecar {config.name!r} can start")
    else:
        SidecarProcess(args.config, args.ready_file).run()
    return 0
