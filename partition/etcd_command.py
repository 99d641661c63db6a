"""`sidepool etcd`: put a deployment's plan into etcd, and see what is there."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sidepool.wire.config import decode
from sidepool.wire.coordination import Coordination
from sidepool.wire.errors import ConfigError, PlanError
from sidepool.wire.etcd_members import members_key, members_of
from sidepool.wire.plan import load_plan

ACTIONS = ("publish", "show")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `sidepool etcd`."""
    parser.add_argument(
        "action", choices=ACTIONS, help="publish: put a plan in the place of what is there. show: plan and sidecars"
    )
    parser.add_argument("plan", nargs="?", type=Path, metavar="PLAN", help="the plan to publish")
    add_etcd_arguments(parser)


def add_etcd_arguments(parser: argparse._ActionsContainer) -> None:
    """Declare how etcd is reached."""
    parser.add_argument("--etcd", action="append", metavar="HOST:PORT", help="an endpoint of etcd; repeatable")
    parser.add_argument("--prefix", metavar="/NAME", help="where the deployment's keys lie")
    for file, what_for in (("ca", "authorities of etcd's certificates"), ("cert", "own certificate"), ("key", "its key")):
        parser.add_argument(f"--etcd-{file}", type=Path, metavar="FILE", help=f"{what_for} (PEM)")


def coordination_of(args: argparse.Namespace) -> Coordination:
    """What the options say; raises `ConfigError`."""
    if not args.etcd or not args.prefix:
        raise ConfigError(f"etcd: found {args.etcd}, prefix {args.prefix}; allowed: --etcd HOST:PORT --prefix /NAME")
    files = {name: str(path) for name in ("ca", "cert", "key") if (path := getattr(args, f"etcd_{name}")) is not None}
    content: dict[str, Any] = {"etcd": list(args.etcd), "prefix": args.prefix, **({"tls": files} if files else {})}
    return decode(content, Coordination, where="etcd").relative_to(Path.cwd())


def run(args: argparse.Namespace) -> int:
    """Run one action; raises `ConfigError`, `PlanError`, `TransportError`."""
    if (args.action == "publish") != (args.plan is not None):
        raise ConfigError(
            f"{args.action}: found {args.plan or 'no plan'}; allowed: {'a plan' if args.action == 'publish' else 'none'}"
        )
    coordination = coordination_of(args)
    lines = _publish(coordination, args.plan) if args.action == "publish" else _show(coordination)
    print("\n".join(lines))
    return 0


def _publish(coordination: Coordination, path: Path) -> Sequence[str]:
    plan = load_plan(path)
    source = coordination.plan_source()
    try:
        before = source.publish(plan)
    finally:
        source.close()
    if before is not None and before.fingerprint == plan.fingerprint:
        return [f"{source.key}: epoch {plan.epoch} is there already"]
    return [f"{source.key}: epoch {plan.epoch}" + (f" in the place of {before.epoch}" if before is not None else "")]


def _show(coordination: Coordination) -> Sequence[str]:
    source, etcd = coordination.plan_source(), coordination.connect()
    try:
        try:
            plan = source.read()
            lines = [f"plan: {plan.model}, epoch {plan.epoch}, {plan.fingerprint[:16]}"]
            expected = [s.name for s in plan.sidecars]
        except PlanError as e:
            lines, expected = [f"plan: {e}"], []
        members = members_of(etcd.read(members_key(coordination.prefix), prefix=True))
    finally:
        source.close()
        etcd.close()
    for name in sorted({*expected, *members}):
        member = members.get(name)
        said = f"{member.address}, {member.state}, answers epochs {list(member.epochs)}" if member is not None else "is not there"
        lines.append(f"sidecar {name}: {said}" + ("" if name in expected else " (not in the plan)"))
    return lines
