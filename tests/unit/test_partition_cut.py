"""The cut of real models: what is chosen, what it is compared with, and what a person is shown."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from artifact_oracle import ArtifactOracle
from torch import Tensor, nn
from torch.utils import flop_counter

from sidepool.bench.models.dlrm import multi_hot, single_id
from sidepool.partition import PartitionReport, calibrate, partition_model, programs
from sidepool.partition.capture import Captured, capture
from sidepool.partition.costs import Sizes, work_of
from sidepool.partition.cut_model import CutOptions
from sidepool.partition.decision import Decision, decide
from sidepool.partition.lookups import find_lookups
from sidepool.partition.profiles import Profiles, find_processor, save_profiles
from sidepool.partition.trials import trials
from sidepool.wire.errors import CutError

ROWS = 300
KEPT_BYTES = 20_000


@cache
def captured_dlrm(make: Any) -> Captured:
    return capture(*make(max_rows=ROWS))


def decided(make: Any, options: CutOptions) -> Decision:
    captured = captured_dlrm(make)
    lookups = find_lookups(captured).lookups
    return decide(captured, lookups, dict.fromkeys(lookups, 2.0), options)


def test_every_table_leaves_unless_the_gpu_side_may_hold_some(tmp_path: Path) -> None:
    model, example = single_id(max_rows=ROWS)
    report = partition_model(model, example, tmp_path / "out", name="m")
    assert len(report.plan.features) == 26
    assert report.cut.decision.kept == ()
    assert report.cut.decision.proved


def test_lookups_kept_on_the_gpu_side_fit_its_memory_and_compute_the_same(tmp_path: Path) -> None:
    model, example = single_id(max_rows=ROWS)
    allowed = 100_000
    report = partition_model(model, example, tmp_path / "out", name="m", gpu_table_bytes=allowed)
    decision = report.cut.decision
    assert decision.kept
    assert sum(x.weight.nbytes for x in decision.kept) == decision.chosen.gpu_table_bytes <= allowed
    assert len(decision.kept) + len(report.plan.features) == 26
    assert len([line for line in report.kept if "gpu_table_bytes allows it" in line]) == len(decision.kept)
    with torch.no_grad():
        torch.testing.assert_close(ArtifactOracle(tmp_path / "out")(*example)[0], model(*example))


def test_bags_of_varying_length_never_stay_since_their_ids_reach_sidecars_only() -> None:
    decision = decided(multi_hot, CutOptions(gpu_table_bytes=1 << 40))
    assert decision.kept == ()
    assert decision.proved


@pytest.mark.parametrize("make", [single_id, multi_hot])
@pytest.mark.parametrize("objective", ["latency", "throughput", "gpu_cost"])
def test_the_cut_is_never_worse_than_what_it_is_compared_with(make: Any, objective: Any) -> None:
    for link, allowed in itertools.product(("10g-tcp", "200g-roce"), (0, 1 << 40)):
        try:
            found = decided(make, CutOptions(link, objective, gpu_table_bytes=allowed, sidecars=2))
        except CutError as e:
            assert "nothing is left for sidecars" in str(e)  # noqa: PT017
            assert (make, allowed) == (single_id, 1 << 40)
            continue
        by_name = {a.name: a for a in found.others}
        assert set(by_name) == {"lookups only", "all on the CPU side", "all on the GPU side", "Prism-style colouring"}
        assert found.chosen.cost_ns <= by_name["lookups only"].cost_ns
        fitting = [a for a in found.others if not a.note]
        assert all(found.unrestricted.cost_ns <= a.cost_ns for a in (found.chosen, *fitting))
        assert all(a.cost_ns > 0 and a.gpu_table_bytes >= 0 for a in (found.chosen, *found.others))


def test_work_behind_lookups_that_would_be_cheaper_in_sidecars_is_named_not_done() -> None:
    found = decided(single_id, CutOptions(link="10g-tcp"))
    names = {found.model.items[i].node.name for i in found.would_move}
    assert {"stack", "bmm"} <= names
    assert found.would_move
    assert not found.chosen.placement.cpu & set(found.would_move)
    assert found.unrestricted.cost_ns < found.chosen.cost_ns


class Products(nn.Module):
    """Every kind of product."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.top = nn.Embedding(9, 8), nn.Linear(8, 16)
        self.conv, self.attention = nn.Conv1d(3, 5, 3), nn.Parameter(torch.rand(8, 8))

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.table(ids)
        mixed = rows @ self.attention
        attended = nn.functional.scaled_dot_product_attention(rows, mixed, rows)
        return self.top(self.conv(attended).sum(1)[:, :1] + attended.sum(1))


def test_flops_of_products_are_those_that_torch_counts() -> None:
    model, ids = Products().eval(), torch.randint(0, 9, (6, 3))
    captured = capture(model, ids)
    size = Sizes({}).of(6)
    products = {"linear", "matmul", "conv1d", "scaled_dot_product_attention"}
    found = {n.name: work_of(n, size) for n in captured.graph.nodes if n.op == "call_function"}
    ours = sum(w.flops for name, w in found.items() if name in products)
    with flop_counter.FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids)
    assert {name for name in found if name in products} == products
    assert ours == counter.get_total_flops()
    gather = found["embedding"]
    assert (gather.gathered_bytes, gather.streamed_bytes) == (6 * 3 * 8 * 4, 6 * 3 * 8 * 4 + 6 * 3 * 8)  # not the whole table


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> PartitionReport:
    return partition_model(*single_id(max_rows=50), tmp_path_factory.mktemp("cut") / "out", name="m", gpu_table_bytes=KEPT_BYTES)


def test_the_same_input_gives_the_same_bytes_in_another_process(report: PartitionReport, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from sidepool.bench.models.dlrm import single_id\n"
        "from sidepool.partition import partition_model\n"
        f"partition_model(*single_id(max_rows=50), sys.argv[1], name='m', gpu_table_bytes={KEPT_BYTES})\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "out")]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": "7"})
    files = sorted(path.relative_to(report.out_dir) for path in report.out_dir.rglob("*") if path.is_file())
    assert len(files) > 30
    assert sorted(path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*") if path.is_file()) == files
    for file in files:
        assert (tmp_path / "out" / file).read_bytes() == (report.out_dir / file).read_bytes(), file


class Page(HTMLParser):
    """Refuses elements that are closed wrongly, and whatever loads something."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "img", "iframe", "object", "embed")
        assert not {name for name, _ in attrs} & {"src", "href", "xlink:href", "onload", "onclick"}
        if tag not in ("meta", "br", "hr"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in ("meta", "br", "hr"):
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_needs_nothing_but_itself_and_shows_what_the_text_says(report: PartitionReport) -> None:
    html = (report.out_dir / "cut.html").read_text(encoding="utf-8")
    Page().feed(html)
    assert "<script" not in html
    assert set(re.findall(r"https?://[^\"' <]+", html)) == {"http://www.w3.org/2000/svg"}
    drawing = ElementTree.fromstring(re.search(r"<svg.*</svg>", html, re.S)[0])  # type: ignore[index]
    boxes = drawing.findall("{*}g")
    assert len(boxes) == len(report.cut.groups)
    assert sum(g.count for g in report.cut.groups if g.label.startswith("lookup")) == 26
    assert (report.out_dir / "cut.txt").read_text(encoding="utf-8") == report.explain()
    for alternative in report.cut.alternatives:
        assert alternative.name in html
        assert f"{alternative.cost_ns / 1e3:.2f}" in html
        assert alternative.name in report.explain()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"link": "1t-roce"}, "link: found '1t-roce'; allowed: shm, 10g-tcp"),
        ({"objective": "speed"}, "objective: found 'speed'; allowed: latency, throughput, gpu_cost"),
        ({"cpu": "z80"}, "cpu: found 'z80'; allowed: epyc-9654, .*or a .yaml file"),
        ({"gpu": "absent.yaml"}, "absent.yaml: cannot be read"),
        ({"gpu_table_bytes": -1}, "gpu_table_bytes: found -1; allowed: 0 or more"),
        ({"gpu_table_bytes": 1 << 40}, "nothing is left for sidecars"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(tmp_path: Path, options: Any, match: str) -> None:
    with pytest.raises(CutError, match=match):
        partition_model(*single_id(max_rows=50), tmp_path / "out", name="m", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_calibrated_file_is_a_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "SECONDS", 0.01)
    save_profiles(calibrate.calibrate(), tmp_path / "here.yaml")
    found = find_processor("cpu", str(tmp_path / "here.yaml"))
    assert 1e8 < found.flops_per_s < 1e15
    assert found.launch_ns < 1e7
    save_profiles(Profiles(cpu={"a": found, "b": found}), tmp_path / "two.yaml")
    with pytest.raises(CutError, match="found 2 cpu profiles; allowed: exactly one"):
        find_processor("cpu", str(tmp_path / "two.yaml"))


def test_random_inputs_are_other_ids_in_other_bags_of_whole_tables() -> None:
    captured = captured_dlrm(multi_hot)
    lookups = find_lookups(captured).lookups
    examples, fresh = trials(captured, lookups)
    assert examples is captured
    for lookup, ours, theirs in zip(captured.inputs, fresh.examples, captured.examples, strict=True):
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype, lookup
    assert not torch.equal(fresh.expected[0], captured.expected[0])


def test_a_faulty_program_is_refused_with_the_first_operator_that_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def tamper(graph: torch.fx.Graph) -> None:
        relus = [n for n in graph.nodes if n.target is torch.ops.aten.relu.default]
        relus[2].target = torch.ops.aten.tanh.default

    monkeypatch.setattr(programs, "_reuse_buffers", tamper)
    with pytest.raises(CutError, match=r"(?s)differs from the original.*first operator that differs: relu_2 \(File"):
        partition_model(*single_id(max_rows=50), tmp_path / "out", name="m")
    assert list(tmp_path.iterdir()) == []
