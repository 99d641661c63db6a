"""`sidepool profile`: what running sidecars counted between two moments, as an access profile."""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc

from sidepool.wire.access import AccessProfile, HotRow, TableAccess, save_access
from sidepool.wire.control_channel import ClientTls, fault_of
from sidepool.wire.control_pb2 import StatsRequest
from sidepool.wire.control_pb2_grpc import SidecarStub
from sidepool.wire.errors import PlanError
from sidepool.wire.plan import Plan, load_plan

TIMEOUT_S = 10.0
# Rows that take less than this of a table's ids are noise of the sample.
LEAST_SHARE = 0.001


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `sidepool profile`."""
    parser.add_argument("--plan", type=Path, required=True, metavar="FILE", help="the plan that the sidecars serve")
    parser.add_argument("--seconds", type=float, default=10.0, metavar="S", help="how long to watch (default: 10)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="where to write access.json")
    for file, what_for in (("ca", "authorities of the sidecars' certificates"), ("cert", "own certificate"), ("key", "its key")):
        parser.add_argument(f"--{file}", type=Path, metavar="FILE", help=f"{what_for} (PEM)")


def run(args: argparse.Namespace) -> int:
    """Watch and write; raises `TransportError` and `PlanError`."""
    plan, tls = load_plan(args.plan), ClientTls(args.ca, args.cert, args.key)
    before, began = _stats(plan, tls), time.monotonic()
    time.sleep(max(args.seconds, 0.0))
    after, ended = _stats(plan, tls), time.monotonic()
    save_access(access_profile(plan, before, after, ended - began), args.out)
    return 0


def access_profile(plan: Plan, before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]], seconds: float) -> AccessProfile:
    """Rates between two readings of all sidecars' stats, in plan order.

    Of a table cut by rows every shard sees a part of the bags; the busiest shard's count is a lower bound of theirs.
    """
    tables, most = [], 0.0
    first = [{e["table"]: e for e in stats["tables"]} for stats in before]
    last = [{e["table"]: e for e in stats["tables"]} for stats in after]
    for index, table in enumerate(plan.tables):
        rows, bags, lookups = 0.0, 0.0, 0.0
        top: dict[int, float] = defaultdict(float)
        for shard in plan.placed_shards[index]:
            at = plan.first_shard[index] + shard.number
            counts = dict.fromkeys(("rows", "bags", "lookups"), 0)
            for holder in shard.sidecars:
                for key in counts:
                    counts[key] += last[holder].get(at, {}).get(key, 0) - first[holder].get(at, {}).get(key, 0)
                for row, count in last[holder].get(at, {}).get("top_rows", ()):
                    top[shard.rows[0] + row] += count * shard.column_count / table.dim
            rows += counts["rows"] * shard.column_count / table.dim
            bags, lookups = max(bags, counts["bags"]), max(lookups, counts["lookups"])
        most = max(most, lookups / max(1, sum(f.table == table.name for f in plan.features)))
        sampled = sum(top.values()) or 1.0
        hot = sorted(((n / sampled, row) for row, n in top.items() if n / sampled >= LEAST_SHARE), reverse=True)
        hot_rows = tuple(HotRow(row=row, share=share) for share, row in hot)
        tables.append(TableAccess(table=table.name, bags_per_s=bags / seconds, rows_per_s=rows / seconds, hot_rows=hot_rows))
    return AccessProfile(model=plan.model, lookups_per_s=most / seconds, tables=tuple(tables))


def _stats(plan: Plan, tls: ClientTls) -> list[dict[str, Any]]:
    found = []
    for sidecar in plan.sidecars:
        with tls.channel(sidecar.address) as channel:
            try:
                reply = SidecarStub(channel).Stats(StatsRequest(), timeout=TIMEOUT_S)  # type: ignore[no-untyped-call]
            except grpc.RpcError as e:
                raise fault_of(e, f"sidecar {sidecar.name!r} ({sidecar.address})") from e
        stats = json.loads(reply.json)["stats"]
        if stats["epoch"] != plan.epoch:
            raise PlanError(f"sidecar {sidecar.name!r}: plan_epoch: found {stats['epoch']}; allowed: {plan.epoch} (the plan given)")
        found.append(stats)
    return found
