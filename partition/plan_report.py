"""What a plan should cost, for people."""

from __future__ import annotations

from collections import Counter

from sidepool.partition.replan import Replanned
from sidepool.wire.sharding import sharding_of


def report(found: Replanned) -> str:
    """Bytes, rows, network and utilisation per sidecar, and the latency to expect."""
    plan, placement = found.plan, found.placement
    kinds = Counter(str(sharding_of(plan, i)) for i in range(len(plan.tables)))
    head = ["sidecar", "rack", "tables", "GB", "of memory", "rows/s", "MB/s", "cores busy", "card busy", "fan-out"]
    rows = [head]
    for i, (node, load) in enumerate(zip(placement.nodes, found.loads, strict=True)):
        names = {p.demand.table.name for p, holders in zip(placement.pieces, placement.holders, strict=True) if i in holders}
        rows.append(
            [
                node.name,
                node.rack,
                str(len(names)),
                f"{load.bytes / 1e9:.2f}",
                f"{100 * load.bytes / node.memory_bytes:.0f} %",
                f"{load.rows_per_s:.3g}",
                f"{load.network_bytes_per_s / 1e6:.1f}",
                f"{100 * load.cpu:.0f} %",
                f"{100 * load.network:.0f} %",
                f"{load.fan_out:.2f}",
            ]
        )
    widths = [max(len(row[c]) for row in rows) for c in range(len(head))]
    lines = ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    touched = sum(load.fan_out for load in found.loads)
    proof = f"; the busiest sidecar is at most {100 * (found.gap or 0):.1f} % above the least possible for these shards"
    tables, sidecars = f"{len(plan.tables)} tables", f"{len(plan.sidecars)} sidecars"
    return "\n".join(
        [
            f"plan {plan.model}, epoch {plan.epoch}: {tables} on {sidecars}, chosen: {found.chosen}"
            + ("" if found.gap is None else proof),
            "kinds: " + ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items())),
            *lines,
            f"sidecars touched per lookup: {touched:.2f}; expected latency: p50 {_ms(found.p50_ns)}, p99 {_ms(found.p99_ns)}",
        ]
    )


def _ms(ns: float) -> str:
    return "none (a sidecar has more to do than it can)" if ns == float("inf") else f"{ns / 1e6:.3f} ms"
