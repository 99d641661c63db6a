"""Attention over a history in a sidecar: when it becomes a program, what travels then, and what is refused."""

from __future__ import annotations

import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sidepool.bench.models.deeprecsys import deeprecsys, inputs
from sidepool.client import Pipeline
from sidepool.partition import PartitionReport, partition_model
from sidepool.partition.check import check_artifact
from sidepool.partition.inventory import Inventory
from sidepool.partition.replan import assumed_access, replan
from sidepool.sidecar import stored
from sidepool.sidecar.epochs import MoveRecord
from sidepool.sidecar.fetching import Fetcher, Order
from sidepool.sidecar.loader import load_tables
from sidepool.sidecar.pacing import Pacer
from sidepool.sidecar.sending import Sender
from sidepool.sidecar.serving import Published
from sidepool.wire import control_pb2_grpc
from sidepool.wire.errors import ConfigError, CutError, LookupRejected, PlanError, ShardCorrupt
from sidepool.wire.plan import Plan, SidecarAddress, load_plan, validate_plan
from sidepool.wire.shard_reader import build_table_set

ROWS = 50
# A link on which rows are dear: where programs can be formed, they are cheaper.
SLOW = "10g-tcp"
FAST = 1e11


class Attention(nn.Module):
    """A candidate's share of a history, from tables of their own, beside a user; `sharp`: by an operator that programs lack."""

    def __init__(self, length: int = 12, *, sharp: bool = False) -> None:
        super().__init__()
        self.history, self.item, self.user = nn.Embedding(ROWS, 16), nn.Embedding(ROWS, 16), nn.Embedding(ROWS, 4)
        self.length, self.sharp, self.top = length, sharp, nn.Linear(36, 1)

    def forward(self, history: Tensor, item: Tensor, user: Tensor, seen: Tensor) -> Tensor:
        rows, one = self.history(history), self.item(item)
        scores = torch.bmm(rows, one.unsqueeze(2)).squeeze(2)
        scores = torch.erfinv(torch.tanh(scores) / 2) if self.sharp else scores
        scores = scores.masked_fill(torch.arange(self.length) >= seen.unsqueeze(1), -1e9)
        attended = (torch.softmax(scores, 1).unsqueeze(2) * rows).sum(1)
        return torch.sigmoid(self.top(torch.cat([attended, one, self.user(user)], dim=1)))


def given(batch: int, length: int = 12) -> tuple[Tensor, ...]:
    ids = [torch.randint(0, ROWS, (batch,)) for _ in range(2)]
    return torch.randint(0, ROWS, (batch, length)), *ids, torch.randint(0, length + 1, (batch,))


def partitioned(out: Path, model: nn.Module, **options: Any) -> PartitionReport:
    return partition_model(model.eval(), given(4), out, name="m", link=SLOW, **options)


def programs(plan: Plan) -> list[str]:
    return [t.name for t in plan.tables if t.program is not None]


def test_attention_travels_as_its_result_and_its_tables_lie_together(tmp_path: Path) -> None:
    torch.manual_seed(5)
    model = Attention()
    report = partitioned(tmp_path / "out", model, sidecars=2)
    plan = report.plan
    assert programs(plan) == ["history.program"]
    owner = {t.name: plan.sidecars_of_table[i][0] for i, t in enumerate(plan.tables)}
    assert owner["history"] == owner["item"] == owner["history.program"] != owner["user"]
    # The candidate's row is needed in the dense half too, and travels as before; the history's rows do not.
    assert [(f.name, f.table) for f in plan.features] == [
        ("item", "item"),
        ("user", "user"),
        ("history.program", "history.program"),
    ]
    assert sum(report.wire_bytes(s, 1)[1] for s in (0, 1)) == 4 * (16 + 16 + 4)
    # 12 ids, the candidate, and what of them counts: the mask, since whole numbers stay on the ranker.
    program = plan.tables[plan.table_index["history.program"]].program
    assert program is not None
    assert (program.words, [(x.kind, x.count) for x in program.inputs]) == (15, [("bytes", 12)])
    assert "history.program" in report.text
    assert "history.program" in report.explain()
    assert "history.program" in (tmp_path / "out/cut.html").read_text(encoding="utf-8")
    with Pipeline.open(tmp_path / "out") as pipeline, torch.no_grad():
        for batch in (1, 2, 90):
            arguments = given(batch)
            torch.testing.assert_close(pipeline(*arguments), model(*arguments), rtol=1e-5, atol=1e-6)


def test_rows_stored_in_fewer_bits_go_through_a_program_as_they_are_read(tmp_path: Path) -> None:
    torch.manual_seed(5)
    model = Attention()
    report = partitioned(tmp_path / "out", model, sidecars=1, row_format="int8")
    stored = {t.name: str(t.row_format) for t in report.plan.tables}
    assert stored == {"history": "int8", "item": "int8", "user": "int8", "history.program": "fp32"}
    with Pipeline.open(tmp_path / "out") as pipeline, torch.no_grad():
        arguments = given(5)
        torch.testing.assert_close(pipeline(*arguments), model(*arguments), rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("model", "options", "why"),
    [
        (Attention(length=12, sharp=True), {}, "aten.erfinv.default, which is none of a program's operators"),
        (Attention(), {"sidecar_bytes": 6000}, "a program reads tables whole on one sidecar, and these take 6400 bytes of 6000"),
    ],
)
def test_what_does_not_become_a_program_stays_and_the_reason_is_reported(
    tmp_path: Path, model: nn.Module, options: dict[str, Any], why: str
) -> None:
    report = partitioned(tmp_path / "out", model, sidecars=2, **options)
    assert programs(report.plan) == []
    assert [str(f.pooling) for f in report.plan.features if f.table == "history"] == ["none"]
    assert why in report.text + report.explain()


@pytest.fixture(scope="module")
def run_by_torch(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path, PartitionReport]:
    """A model whose program takes torch, and where it was partitioned for one sidecar."""
    torch.manual_seed(5)
    out = tmp_path_factory.mktemp("run_by_torch") / "out"
    model = Attention(sharp=True)
    return model, out, partitioned(out, model, sidecars=1, sidecar_torch=True)


def test_a_program_of_torch_moves_to_another_sidecar_with_its_file(
    tmp_path: Path, run_by_torch: tuple[nn.Module, Path, PartitionReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, out, report = run_by_torch
    here = out / "sidecars/sidecar-0/shards"
    (program,) = [t.program for t in report.plan.tables if t.program is not None]
    assert program.torch is not None
    served = Published(report.plan, load_tables(report.plan, "sidecar-0", here), here)
    sender = Sender(SimpleNamespace(name="sidecar-0", held=lambda fingerprint: served), FAST)  # type: ignore[arg-type]
    server = grpc.server(ThreadPoolExecutor(2))
    port = server.add_insecure_port("127.0.0.1:0")
    servicer = control_pb2_grpc.SidecarServicer()  # type: ignore[no-untyped-call]
    servicer.Fetch = sender.stream  # type: ignore[method-assign]
    control_pb2_grpc.add_SidecarServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]
    server.start()
    at = (SidecarAddress(name="sidecar-0", address=f"127.0.0.1:{port}"),)
    new = rebuilt(
        report.plan,
        epoch=report.plan.epoch + 1,
        sidecars=(SidecarAddress(name="other", address="127.0.0.1:1"),),
        shards=tuple(s.model_copy(update={"sidecar": "other"}) for s in report.plan.shards),
    )

    def bring() -> Path:
        order = Order(
            name="other", new=new, present=rebuilt(report.plan, sidecars=at), base=tmp_path / "shards", own=None,
            bytes_per_s=FAST, promote=False,
        )  # fmt: skip
        return Fetcher(order, Pacer()).run(MoveRecord(state="prepared", plan=new, replaces=report.plan.fingerprint))

    try:
        brought = bring()
        assert (brought / program.torch.file).read_bytes() == (here / program.torch.file).read_bytes()
        load_tables(new, "other", brought)  # checksums; torch loads the program
        monkeypatch.setattr(stored.np, "fromfile", lambda *_: np.zeros(9, np.uint8))
        with pytest.raises(ShardCorrupt, match=r"sidecar 'sidecar-0' .*: history\.program\.pt2: CRC-32C: found 0x"):
            bring()
    finally:
        server.stop(None)


def test_operators_that_steps_lack_run_in_torch_where_sidecars_have_it(
    tmp_path: Path, run_by_torch: tuple[nn.Module, Path, PartitionReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out, report = run_by_torch
    shutil.copytree(out, tmp_path / "out")
    (program,) = [t.program for t in report.plan.tables if t.program is not None]
    assert program.torch is not None
    assert (program.steps, program.torch.operators) == ((), ("aten.erfinv.default",))
    assert "torch (aten.erfinv.default)" in report.text
    with Pipeline.open(tmp_path / "out") as pipeline, torch.no_grad():
        for batch in (1, 2, 90):
            arguments = given(batch)
            torch.testing.assert_close(pipeline(*arguments), model(*arguments), rtol=1e-5, atol=1e-6)
    check_artifact(tmp_path / "out")
    monkeypatch.setitem(sys.modules, "torch", None)
    shards = tmp_path / "out/sidecars/sidecar-0/shards"
    with pytest.raises(PlanError, match=r"its program has aten\.erfinv\.default, which take torch, and torch is not installed"):
        build_table_set(report.plan, [shards])
    (shards / program.torch.file).write_bytes(b"something else")
    with pytest.raises(ShardCorrupt, match=r"history\.program\.pt2: CRC-32C: found 0x"):
        build_table_set(report.plan, [shards])


class Mixed(Attention):
    """Scores that depend on the other samples of a batch: torch would run it, and give something else for another batch."""

    def forward(self, history: Tensor, item: Tensor, user: Tensor, seen: Tensor) -> Tensor:
        rows = self.history(history)
        scores = (rows * self.item(item).unsqueeze(1)).sum(2).cumsum(0)
        return torch.sigmoid((torch.softmax(scores, 1).unsqueeze(2) * rows).sum((1, 2)) + self.user(user).sum(1) + 0 * seen)


def test_a_program_of_torch_that_mixes_samples_is_found_out(tmp_path: Path) -> None:
    with pytest.raises(CutError, match=r"program history\.program: the last sample alone gives something else"):
        partitioned(tmp_path / "out", Mixed(), sidecars=1, sidecar_torch=True)


def test_a_bad_id_within_a_record_refuses_one_request_and_names_bag_and_table_size(tmp_path: Path) -> None:
    partitioned(tmp_path / "out", Attention(), sidecars=1)
    history, item, user, seen = given(3)
    history[1, 7] = ROWS
    with Pipeline.open(tmp_path / "out") as pipeline:
        wrong = f"feature history.program, bag 1: id {ROWS} is outside its table; allowed: 0 to {ROWS - 1}"
        with pytest.raises(LookupRejected, match=wrong):
            pipeline(history, item, user, seen)
        pipeline(*given(3))


def rebuilt(plan: Plan, **changes: Any) -> Plan:
    """`plan` with other fields, nothing that was derived from the old ones kept."""
    return Plan(**{name: getattr(plan, name) for name in Plan.model_fields} | changes)


def changed(plan: Plan, **changes: Any) -> Plan:
    """`plan` with its computed table changed."""
    tables = [t.model_copy(update=changes) if t.program is not None else t for t in plan.tables]
    return rebuilt(plan, tables=tuple(tables))


def test_a_plan_that_puts_a_programs_tables_apart_is_refused(tmp_path: Path) -> None:
    plan = partitioned(tmp_path / "out", Attention(), sidecars=2).plan
    other = plan.sidecars[1 - plan.sidecars_of_table[plan.table_index["item"]][0]].name
    shards = tuple(s.model_copy(update={"sidecar": other}) if s.table == "item" else s for s in plan.shards)
    with pytest.raises(
        PlanError, match=r"lookups\.\d\.table: found 'item' whole on sidecar-\d; allowed: every table that a program reads"
    ):
        validate_plan(rebuilt(plan, shards=shards))
    halves = [s.model_copy(update={"rows": r}) for s in plan.shards if s.table == "item" for r in ((0, 9), (9, ROWS))]
    with pytest.raises(PlanError, match=r"found 'item' 2 shards on sidecar-\d; allowed: every table that a program reads whole"):
        validate_plan(rebuilt(plan, shards=(*(s for s in plan.shards if s.table != "item"), *halves)))
    with pytest.raises(PlanError, match=r"table history\.program: is computed by a program, which keeps its tables together"):
        replan(plan, Inventory.model_construct(), assumed_access(plan), "optimal")
    with pytest.raises(ConfigError, match=r"pooling: found 'ranker'; allowed with programs in the plan \(history\.program\)"):
        Pipeline.open(tmp_path / "out", pooling="ranker")
    program = plan.tables[plan.table_index["history.program"]].program
    assert program is not None
    lookups = (program.lookups[0].model_copy(update={"table": "nobody"}), *program.lookups[1:])
    with pytest.raises(PlanError, match=r"lookups\.0\.table: found 'nobody'; allowed: a table of this plan with rows of its own"):
        validate_plan(changed(plan, program=program.model_copy(update={"lookups": lookups})))
    with pytest.raises(PlanError, match=r"found ids beyond word 3"):
        validate_plan(changed(plan, program=program.model_copy(update={"words": 3})))
    with pytest.raises(PlanError, match=r"program: found weights stored as int8; allowed: fp32"):
        validate_plan(changed(plan, row_format="int8"))


def test_steps_that_would_leave_their_memory_are_refused_before_anything_runs(tmp_path: Path) -> None:
    out = tmp_path / "out"
    partitioned(out, Attention(), sidecars=1)
    good = load_plan(out / "plan.yaml")
    at = good.table_index["history.program"]
    program = good.tables[at].program
    assert program is not None

    def refused(i: int, why: str, **changes: Any) -> None:
        steps = [s.model_copy(update=changes) if j == i % len(program.steps) else s for j, s in enumerate(program.steps)]
        plan = changed(good, program=program.model_copy(update={"steps": tuple(steps)}))
        plan.__dict__["fingerprint"] = good.fingerprint  # the shards are the good plan's
        with pytest.raises(PlanError, match=rf"table 'history\.program': program: steps\.{i % len(steps)}: {why}"):
            build_table_set(plan, [out / "sidecars/sidecar-0/shards"])

    first, last = program.steps[0], program.steps[-1]
    refused(-1, "found an operand beyond its space", sizes=(last.sizes[0] + 1, *last.sizes[1:]))
    refused(-1, "found an operand beyond its space", operands=((2, 1 << 40, *last.operands[0][2:]), *last.operands[1:]))
    refused(0, "found a result where only reading is allowed", operands=((3, *first.operands[0][1:]), *first.operands[1:]))
    refused(0, "found an unknown space", operands=(first.operands[0], (99, *first.operands[1][1:]), *first.operands[2:]))
    refused(0, "found a stride beyond", operands=(first.operands[0], (*first.operands[1][:-1], 1 << 50), *first.operands[2:]))
    build_table_set(good, [out / "sidecars/sidecar-0/shards"])


def test_deeprecsys_din_answers_with_a_hundredth_of_the_bytes(tmp_path: Path) -> None:
    torch.manual_seed(6)
    model, example = deeprecsys("din", max_rows=100)
    with_program = partition_model(model, example, tmp_path / "out", name="din", sidecars=1)
    assert programs(with_program.plan) == ["behaviour.program"]
    # Three profile vectors and the attended one, in place of the last as 250 rows.
    assert with_program.wire_bytes(0, 1)[1] == 4 * 32 * 4
    given_to = inputs("din", (100, 100, 100, 100), 33)
    with Pipeline.open(tmp_path / "out") as pipeline, torch.no_grad():
        np.testing.assert_allclose(pipeline(*given_to).numpy(), model(*given_to).numpy(), rtol=1e-5, atol=1e-6)
