"""`cut.html`: the graph of a cut as one SVG, coloured by side, with the costs of the alternatives as a table."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from sidepool.partition.cut_groups import Group

COLOURS = {"input": "#e6e6e6", "ranker": "#fbe7b2", "CPU": "#b9d8f4", "both": "#d9c7ef", "GPU": "#bfe5bf"}
MEANINGS = {
    "input": "input of the model",
    "ranker": "index program, on the ranker's CPU",
    "CPU": "sidecars",
    "both": "both sides",
    "GPU": "dense program",
}
# In pixels.
BOX_WIDTH, BOX_HEIGHT, GAP_X, GAP_Y = 230, 46, 90, 16
STYLE = (
    "body{font:14px system-ui,sans-serif;margin:2em;max-width:none}table{border-collapse:collapse;margin:1em 0}"
    "td,th{padding:.25em .8em;text-align:right;border-bottom:1px solid #ddd}td:first-child,th:first-child,td:last-child"
    "{text-align:left}tr.chosen{font-weight:bold}.key span{padding:.2em .6em;margin-right:.6em}svg{font:12px system-ui,sans-serif}"
)
HEAD = ("way", "cost µs", "CPU µs", "GPU µs", "link µs", "link bytes", "tables on GPU, bytes", "")


def page(verdict: Sequence[str], basis: Sequence[str], alternatives: Sequence[Sequence[str]], groups: Sequence[Group]) -> str:
    """A whole HTML page; the first alternative is the chosen one."""
    key = "".join(f'<span style="background:{COLOURS[side]}">{escape(what)}</span>' for side, what in MEANINGS.items())
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>cut</title><style>{STYLE}</style></head><body>\n'
        + "".join(f"<p>{escape(line)}</p>\n" for line in verdict)
        + _table(alternatives)
        + f'<p class="key">{key}</p>\n{_drawing(groups)}\n<ul>\n'
        + "".join(f"<li>{escape(line)}</li>\n" for line in basis)
        + "</ul>\n</body></html>\n"
    )


def _table(rows: Sequence[Sequence[str]]) -> str:
    head = "<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in HEAD) + "</tr>\n"
    body = ""
    for i, row in enumerate(rows):
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in row)
        body += f'<tr class="chosen">{cells}</tr>\n' if i == 0 else f"<tr>{cells}</tr>\n"
    return f"<table>\n{head}{body}</table>\n"


def _drawing(groups: Sequence[Group]) -> str:
    places = _places(groups)
    width = max((x for x, _ in places), default=0) + BOX_WIDTH + GAP_X
    height = max((y for _, y in places), default=0) + BOX_HEIGHT + GAP_Y
    edges = [_edge(groups, places, u, v) for v, group in enumerate(groups) for u in group.needs]
    boxes = [_box(group, place) for group, place in zip(groups, places, strict=True)]
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n' + "\n".join([*edges, *boxes]) + "\n</svg>"


def _places(groups: Sequence[Group]) -> list[tuple[int, int]]:
    """Top left corners: a column per depth, in graph order downwards."""
    rows: dict[int, int] = {}
    places = []
    for group in groups:
        row = rows.get(group.depth, 0)
        rows[group.depth] = row + 1
        places.append((10 + group.depth * (BOX_WIDTH + GAP_X), 10 + row * (BOX_HEIGHT + GAP_Y)))
    return places


def _edge(groups: Sequence[Group], places: Sequence[tuple[int, int]], u: int, v: int) -> str:
    (x1, y1), (x2, y2) = places[u], places[v]
    x1, y1, y2 = x1 + BOX_WIDTH, y1 + BOX_HEIGHT // 2, y2 + BOX_HEIGHT // 2
    travels = groups[u].sent_bytes > 0 and groups[v].side in ("GPU", "both")
    carried = groups[u].sent_bytes if travels else groups[u].result_bytes
    colour = "#c0392b" if travels else "#999"
    line = f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{colour}" stroke-width="{2 if travels else 1}"/>'
    if not carried:
        return line
    return (
        line + f'<text x="{(x1 + x2) // 2}" y="{(y1 + y2) // 2 - 3}" fill="{colour}" text-anchor="middle">{_bytes(carried)}</text>'
    )


def _box(group: Group, place: tuple[int, int]) -> str:
    x, y = place
    label = f"{group.count} of {group.label}" if group.count > 1 else group.label
    times = f"CPU {group.cpu_ns / 1e3:.1f} µs, GPU {group.gpu_ns / 1e3:.1f} µs"
    more = f"{label}: {times}, {group.flops:.4g} FLOPs, {_bytes(group.result_bytes)}" + (
        f"; {group.pinned}" if group.pinned else ""
    )
    short = label if len(label) <= 34 else label[:33] + "…"
    return (
        f'<g><title>{escape(more)}</title><rect x="{x}" y="{y}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="6" '
        f'fill="{COLOURS[group.side]}" stroke="#666"/><text x="{x + 8}" y="{y + 19}">{escape(short)}</text>'
        f'<text x="{x + 8}" y="{y + 37}" fill="#555">{times}</text></g>'
    )


def _bytes(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
