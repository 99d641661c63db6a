"""Operators of a cut that are alike, taken together: 26 lookups into one concatenation are one box."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sidepool.partition.cut_model import Item
from sidepool.partition.decision import Decision
from sidepool.partition.sources import packet


@dataclass(frozen=True)
class Group:
    """Items of one kind, side, operator and shape with the same groups before them. Sums over `count` items."""

    side: str
    label: str
    needs: tuple[int, ...]
    """Groups before it."""
    depth: int
    """Groups on the longest way from an input."""
    count: int
    cpu_ns: float
    gpu_ns: float
    flops: float
    result_bytes: float
    sent_bytes: float
    """What of its results travels to the GPU side."""
    pinned: str


def groups_of(decision: Decision) -> tuple[Group, ...]:
    """Groups in graph order."""
    model, placement = decision.model, decision.chosen.placement
    sent = set(placement.sent(model.problem(today=True)))
    found: list[Group] = []
    by_key: dict[object, int] = {}
    of_item: dict[int, int] = {}
    used = _used(model.items, placement.cpu | placement.gpu)
    for i, item in enumerate(model.items):
        if i not in used:
            continue
        side = _side(item, i in placement.cpu, i in placement.gpu)
        needs = tuple(sorted({of_item[u] for u in (*item.needs, *item.index_needs) if u in of_item}))
        key = (side, _label(item), needs)
        one = Group(
            side, _label(item), needs, 1 + max((found[g].depth for g in needs), default=-1), 1, item.cpu_ns, item.gpu_ns,
            item.flops, item.result_bytes, item.result_bytes if i in sent else 0.0, item.pinned or "",
        )  # fmt: skip
        of_item[i] = by_key.setdefault(key, len(found))
        if of_item[i] == len(found):
            found.append(one)
        else:
            found[of_item[i]] = _sum(found[of_item[i]], one)
    return tuple(found)


def _used(items: Sequence[Item], placed: frozenset[int]) -> set[int]:
    """What is placed, and the inputs that it reads."""
    inputs = {u for i in placed for u in items[i].needs if items[u].kind == "input"}
    return inputs | placed


def _side(item: Item, on_cpu: bool, on_gpu: bool) -> str:
    if item.kind == "input":
        return "input"
    if item.kind == "index":
        return "ranker"
    return "both" if on_cpu and on_gpu else "CPU" if on_cpu else "GPU"


def _label(item: Item) -> str:
    if item.kind == "return":
        return "return"
    if item.kind == "input":
        return f"input {item.node.target if item.node.op == 'placeholder' else item.node.name}"
    if item.lookup is not None:
        return f"lookup {item.lookup.pooling} dim {item.lookup.dim}"
    value = item.node.meta.get("val")
    shape = list(getattr(value, "shape", ()))[1:]
    name = getattr(packet(item.node), "__name__", str(packet(item.node)))
    return f"{name} {'x'.join(map(str, shape))}".rstrip()


def _sum(a: Group, b: Group) -> Group:
    return replace(
        a, count=a.count + b.count, cpu_ns=a.cpu_ns + b.cpu_ns, gpu_ns=a.gpu_ns + b.gpu_ns, flops=a.flops + b.flops,
        result_bytes=a.result_bytes + b.result_bytes, sent_bytes=a.sent_bytes + b.sent_bytes,
    )  # fmt: skip
