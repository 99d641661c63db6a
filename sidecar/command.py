"""`sidepool sidecar`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from sidepool.sidecar import logs
from sidepool.sidecar.config import load_sidecar_config, schema
from sidepool.sidecar.control import server_credentials
from sidepool.sidecar.loader import load
from sidepool.sidecar.process import SidecarProcess


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", type=Path, metavar="FILE", help="the sidecar's configuration (docs/sidecar.md)")
    what.add_argument("--print-schema", action="store_true", help="print the JSON Schema of the configuration and exit")
    parser.add_argument("--check", action="store_true", help="check the configuration, the plan and the shards, then exit")
    parser.add_argument("--ready-file", type=Path, metavar="FILE", help="also write the ready line to FILE; removed at exit")


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status. Raises `ConfigError`, `PlanError` or `ShardCorrupt`."""
    if args.print_schema:
        print(json.dumps(schema(), indent=2))
    elif args.check:
        config = load_sidecar_config(args.config)
        logs.start_logging(config.log_level)
        if config.tls is not None:
            server_credentials(config.tls)
        load(config)
        print(f"{args.config}: sidecar {config.name!r} can start")
    else:
        SidecarProcess(args.config, args.ready_file).run()
    return 0
