"""The cut for people: `cut.txt` and `cut.html`. The same input gives the same bytes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from sidepool.partition.cut_drawing import page
from sidepool.partition.cut_groups import Group, groups_of
from sidepool.partition.decision import Alternative, Decision
from sidepool.partition.exporting import source_line
from sidepool.partition.profiles import find_link, find_processor

# Operators that are named one by one; a longer list is counted.
NAMED = 12


@dataclass(frozen=True)
class CutReport:
    """A decided cut; `text` and `html` say what it is and why."""

    decision: Decision
    programs: tuple[str, ...] = ()
    """What sidecars run behind lookups, one line each."""

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """What is placed, operators that are alike taken together."""
        return groups_of(self.decision)

    @property
    def alternatives(self) -> tuple[Alternative, ...]:
        """The chosen cut first."""
        return (self.decision.chosen, *self.decision.others, self.decision.unrestricted)

    @property
    def kept(self) -> list[str]:
        """Lookups that stay in the dense program by choice."""
        return [f"{x.node.name} ({source_line(x.node)}): cheaper there, and gpu_table_bytes allows it" for x in self.decision.kept]

    @cached_property
    def json(self) -> dict[str, Any]:
        """Costs as plain data, in nanoseconds of the objective."""
        options = self.decision.model.options
        return {
            "objective": options.objective,
            "cpu": options.cpu,
            "gpu": options.gpu,
            "link": options.link,
            "batches": {str(b): share for b, share in options.batches.items()},
            "proved": self.decision.proved,
            "bound_ns": self.decision.bound_ns,
            "alternatives": [
                {"name": a.name, "cost_ns": a.cost_ns, "cpu_ns": a.cpu_ns, "gpu_ns": a.gpu_ns, "link_ns": a.link_ns,
                 "link_bytes": a.link_bytes, "gpu_table_bytes": a.gpu_table_bytes, "note": a.note} for a in self.alternatives
            ],
        }  # fmt: skip

    @cached_property
    def basis(self) -> list[str]:
        """What the costs rest on, one line each."""
        options = self.decision.model.options
        cpu, gpu, link = find_processor("cpu", options.cpu), find_processor("gpu", options.gpu), find_link(options.link)
        weights = ", ".join(f"{name} x {w:.3g}" for name, w in zip(("CPU side", "GPU side", "link"), options.weights, strict=True))
        return [
            f"objective {options.objective}: {weights}",
            "samples per lookup: " + ", ".join(f"{b}: {share:.0%}" for b, share in options.batches.items())
            + "; ids per bag: as in the example inputs",
            f"CPU {options.cpu}: {cpu.flops_per_s / 1e12:.3g} TFLOP/s, {cpu.bytes_per_s / 1e9:.4g} GB/s, gather "
            f"{cpu.gather_bytes_per_s / 1e9:.4g} GB/s ({cpu.source})",
            f"GPU {options.gpu}: {gpu.flops_per_s / 1e12:.3g} TFLOP/s, {gpu.bytes_per_s / 1e9:.4g} GB/s, "
            f"{gpu.launch_ns / 1e3:.3g} us per operator ({gpu.source})",
            f"link {options.link}: {link.bytes_per_s / 1e9:.4g} GB/s, {link.round_trip_ns / 1e3:.3g} us there and back "
            f"({link.source})",
            f"tables allowed on the GPU side: {options.gpu_table_bytes} bytes; all sidecars are counted as one machine",
        ]  # fmt: skip

    @cached_property
    def verdict(self) -> list[str]:
        """What was found, one line each."""
        decision = self.decision
        chosen, unrestricted = decision.chosen, decision.unrestricted
        proof = "no cut that can be executed today is cheaper" if decision.proved else (
            f"not proved the cheapest: none is below {_us(decision.bound_ns)} us"
        )  # fmt: skip
        lines = [f"{len(decision.lookups)} lookups in sidecars, {len(decision.kept)} kept on the GPU side; {proof}"]
        lines += [f"sidecars run {line}" for line in self.programs]
        saving = chosen.cost_ns - unrestricted.cost_ns
        if decision.would_move and saving > 0:
            names = [decision.model.items[i].node.name for i in decision.would_move]
            more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            lines.append(
                f"would save {_us(saving)} us if sidecars ran any operator (they run lookups, pooling, and what reduces "
                f"unpooled rows): {', '.join(names[:NAMED])}{more}"
            )
        return lines

    @cached_property
    def text(self) -> str:
        """`cut.txt`."""
        rows = [["way", "cost us", "CPU us", "GPU us", "link us", "link bytes", "tables on GPU", ""]]
        rows += [alternative_row(a) for a in self.alternatives]
        operators = [["side", "operator", "count", "CPU us", "GPU us", "FLOPs", "result bytes", "pinned because"]]
        operators += [
            [g.side, g.label, str(g.count), _us(g.cpu_ns), _us(g.gpu_ns), f"{g.flops:.4g}", f"{g.result_bytes:.0f}", g.pinned]
            for g in self.groups
        ]
        lines = [*self.verdict, "", *self.basis, "", *_table(rows), "", *_table(operators)]
        return "\n".join(lines) + "\n"

    @cached_property
    def html(self) -> str:
        """`cut.html`: no scripts, nothing loaded from elsewhere."""
        return page(self.verdict, self.basis, [alternative_row(a) for a in self.alternatives], self.groups)


def alternative_row(found: Alternative) -> list[str]:
    """Cells: name, cost, its three parts, bytes over the link, bytes of tables on the GPU side, note."""
    times = [_us(t) for t in (found.cost_ns, found.cpu_ns, found.gpu_ns, found.link_ns)]
    return [found.name, *times, f"{found.link_bytes:.0f}", str(found.gpu_table_bytes), found.note]


def _us(ns: float) -> str:
    return f"{ns / 1e3:.2f}"


def _table(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
