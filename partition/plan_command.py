"""`sidepool plan`: place the tables of a plan anew on an inventory, and write its shards; change a running deployment."""

from __future__ import annotations

import argparse
from pathlib import Path

import yaml

from sidepool.partition import apply_command
from sidepool.partition.etcd_command import add_etcd_arguments
from sidepool.partition.helm_values import helm_values
from sidepool.partition.inventory import Inventory, load_inventory
from sidepool.partition.plan_report import report
from sidepool.partition.replan import STRATEGIES, assumed_access, replan
from sidepool.wire.access import load_access
from sidepool.wire.errors import ConfigError
from sidepool.wire.model import PLAN_FILE
from sidepool.wire.plan import load_plan, save_plan

RANKERS_FILE = "rankers.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `sidepool plan`."""
    parser.add_argument(
        "words",
        nargs="+",
        metavar="[apply|rollback] PLAN",
        help="a plan.yaml, or the directory with it and its shards. apply: change a running deployment to it. rollback (no plan): "
        "change it back",
    )
    parser.add_argument("--inventory", type=Path, metavar="FILE", help="the machines (docs/plan.md)")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="access.json of `sidepool profile` (default: all alike)")
    parser.add_argument("--strategy", choices=STRATEGIES, default="optimal", help="default: optimal")
    parser.add_argument("--objective", choices=("latency", "cost"), default="latency", help="p99, or the cheapest machines")
    parser.add_argument("--time-limit", type=float, default=30.0, metavar="S", help="for the search of optimal (default: 30)")
    parser.add_argument("--print", action="store_true", help="print what every sidecar holds and does, and the latency to expect")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write the new plan")
    parser.add_argument("--write", type=Path, metavar="DIR", help="where to write plan, shards and configurations; must not exist")
    parser.add_argument("--helm-values", type=Path, metavar="FILE", help="where to write values for the Helm chart")
    running = parser.add_argument_group("apply and rollback")
    running.add_argument(
        "--deployment",
        type=Path,
        action="append",
        metavar="PATH",
        help="plan file that rankers read, or the directory with it; repeatable",
    )
    add_etcd_arguments(running)
    running.add_argument("--bytes-per-s", type=float, default=0.0, metavar="N", help="per sidecar (default: its move_bytes_per_s)")
    running.add_argument("--undo", action="store_true", help="give up a change that was interrupted before its plan was in place")
    for file, what_for in (("ca", "authorities of the sidecars' certificates"), ("cert", "own certificate"), ("key", "its key")):
        running.add_argument(f"--{file}", type=Path, metavar="FILE", help=f"{what_for} (PEM)")


def run(args: argparse.Namespace) -> int:
    """Plan, or change a deployment; raises `ConfigError`, `PlanError`, `ShardCorrupt`, `TransportError`."""
    if args.words[0] in apply_command.ACTIONS:
        return apply_command.run(args.words[0], args.words[1:], args)
    if len(args.words) != 1 or args.inventory is None:
        raise ConfigError(
            f"plan: found {args.words}, inventory {args.inventory}; allowed: one plan, --inventory FILE; apply; rollback"
        )
    artifact = Path(args.words[0])
    if not args.time_limit > 0:
        raise ConfigError(f"time-limit: found {args.time_limit}; allowed: above 0")
    directory = artifact if artifact.is_dir() else None
    old = load_plan(directory / PLAN_FILE if directory else artifact)
    inventory = load_inventory(args.inventory)
    access = load_access(args.profile) if args.profile else assumed_access(old)
    found = replan(old, inventory, access, args.strategy, objective=args.objective, time_limit_s=args.time_limit)
    if args.print or not (args.out or args.write or args.helm_values):
        print(report(found))
    try:
        if args.helm_values:
            args.helm_values.write_text(yaml.safe_dump(helm_values(found.plan, inventory), sort_keys=False), encoding="utf-8")
        if args.out:
            save_plan(found.plan, args.out)
    except OSError as e:
        raise ConfigError(f"plan: cannot be written: {e}") from e
    if args.write:
        if directory is None:
            raise ConfigError(f"write: found the plan file {artifact} alone; allowed: the directory with its shards")
        from sidepool.partition.reshard import reshard  # torch, for those who write

        numa = {n.name: n.nic.numa for n in inventory.cpu_nodes if n.nic.numa is not None}
        reshard(old, directory, found.plan, args.write, numa)
        if inventory.gpu_nodes:
            (args.write / RANKERS_FILE).write_text(yaml.safe_dump(affinity(inventory), sort_keys=False), encoding="utf-8")
    return 0


def affinity(inventory: Inventory) -> dict[str, object]:
    """Which card and NUMA node the ranker of each GPU should use."""
    return {
        node.name: [{"gpu": gpu.name, "nic": node.nic_of(gpu).name, "numa": gpu.numa} for gpu in node.gpus]
        for node in inventory.gpu_nodes
    }
