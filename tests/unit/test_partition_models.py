"""Whatever the model looks like, the written artifact computes what the model computes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from artifact_oracle import ArtifactOracle
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sidepool.bench.models.dlrm import MLPERF_BAG_IDS, multi_hot, single_id, table_rows
from sidepool.client import Pipeline
from sidepool.partition import PartitionReport, partition_model
from sidepool.wire.plan import Pooling

TOLERANCE = 1e-6


def partition_and_compare(
    tmp_path: Path, model: nn.Module, example: Any, make: Callable[[int], tuple[Any, ...]], **options: Any
) -> tuple[PartitionReport, ArtifactOracle]:
    """Partition, then compare artifact and model on fresh inputs of several sizes; without programs, which the oracle lacks."""
    torch.manual_seed(1)
    model = model.eval()
    report = partition_model(model, example, tmp_path / "out", name="m", **({"sidecars": 1, "programs": False} | options))
    oracle = ArtifactOracle(tmp_path / "out")
    assert oracle.plan == report.plan
    assert oracle.model == report.model
    with Pipeline.open(tmp_path / "out") as pipeline:
        compare(model, make, lambda inputs: oracle(*pytree.tree_leaves(inputs)))
        compare(model, make, lambda inputs: pytree.tree_leaves(pipeline(*inputs)))
    return report, oracle


def compare(model: nn.Module, make: Callable[[int], tuple[Any, ...]], run: Callable[[tuple[Any, ...]], list[Tensor]]) -> None:
    """Compare the model with what `run` makes of the same inputs."""
    for batch in (1, 2, 7):
        inputs = make(batch)
        with torch.no_grad():
            expected = pytree.tree_leaves(model(*inputs))
        for ours, theirs in zip(run(inputs), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)


def ids(rows: int, *shape: int) -> Tensor:
    return torch.randint(0, rows, shape)


def test_the_single_id_dlrm_is_cut_into_slices_of_one_matrix(tmp_path: Path) -> None:
    model, example = single_id(max_rows=300)
    rows = table_rows(300)

    def make(batch: int) -> tuple[Tensor, Tensor]:
        return torch.randn(batch, 13), torch.stack([ids(n, batch) for n in rows], dim=1)

    report, oracle = partition_and_compare(tmp_path, model, example, make, sidecars=2)
    assert [f.source.model_dump() for f in report.model.features] == [
        {"kind": "fixed", "input": "sparse", "begin": i, "end": i + 1} for i in range(26)
    ]
    assert report.model.index is None
    assert report.model.dense.inputs == ("dense",)
    assert [(t.name, t.shape) for t in report.model.outputs] == [("score", (-1, 1))]
    operators = [str(n.target) for n in torch.export.load(oracle.version / "dense.pt2").graph.nodes if n.op == "call_function"]
    assert not any("split" in o or "getitem" in o or "embedding" in o for o in operators), operators
    assert report.dense_bytes < sum(p.numel() for n, p in model.named_parameters() if "tables" not in n) * 4 + 200_000


def test_the_multi_hot_dlrm_keeps_its_values_and_offsets(tmp_path: Path) -> None:
    model, example = multi_hot(max_rows=300)
    rows = table_rows(300)

    def make(batch: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        lengths = [torch.randint(0, 2 * n, (batch,)) for n in MLPERF_BAG_IDS]  # empty bags as well
        values = [ids(n, int(length.sum())) for n, length in zip(rows, lengths, strict=True)]
        return torch.randn(batch, 13), values, [length.cumsum(0) - length for length in lengths]

    report, _ = partition_and_compare(tmp_path, model, example, make, sidecars=2)
    assert report.model.jagged
    assert [f.name for f in report.plan.features] == [f"values_{i}" for i in range(26)]
    assert report.ids_per_bag["values_20"] == 100


class WideAndDeep(nn.Module):
    """Two tables over the same ids, one table for two features, single ids as [B, 1] and as [B], an id of its own dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.deep, self.shop = nn.Embedding(50, 1), nn.Embedding(50, 8), nn.Embedding(9, 8)
        self.top = nn.Linear(8 * 4, 2)

    def forward(self, dense: Tensor, users: Tensor, shops: Tensor) -> dict[str, Tensor]:
        embedded = [self.deep(users[:, 0:1]), self.deep(users[:, 2:3]), self.shop(shops).unsqueeze(1), dense.unsqueeze(1)]
        deep = self.top(torch.cat(embedded, dim=-1).flatten(1))
        return {"deep": deep, "wide": self.wide(users[:, 0]).squeeze(1)}


def test_shared_tables_and_shared_ids_become_features_of_their_own(tmp_path: Path) -> None:
    def make(batch: int) -> tuple[Tensor, Tensor, Tensor]:
        return torch.randn(batch, 8), ids(50, batch, 3), ids(9, batch).int()

    report, _ = partition_and_compare(tmp_path, WideAndDeep(), make(3), make, sidecars=3)
    assert sorted((f.name, f.table) for f in report.plan.features) == [
        ("shops", "shop"),
        ("users.0.deep", "deep"),
        ("users.0.wide", "wide"),
        ("users.2", "deep"),
    ]
    assert all(f.pooling is Pooling.SUM for f in report.plan.features)
    assert [t.name for t in report.model.outputs] == ["deep", "wide"]
    assert [t.shape for t in report.model.outputs] == [(-1, 2), (-1,)]
    assert {s.sidecar for s in report.plan.shards} == {"sidecar-0", "sidecar-1", "sidecar-2"}


class Hashing(nn.Module):
    """Index arithmetic before the lookups: modulo, offsets into one table, a clamp, a remap buffer."""

    offsets: Tensor
    remap: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.table, self.other, self.mapped = nn.EmbeddingBag(30, 4, mode="mean"), nn.Embedding(5, 4), nn.Embedding(3, 4)
        self.register_buffer("offsets", torch.tensor([0, 10, 20]))
        self.register_buffer("remap", torch.tensor([2, 0, 1, 1]))
        self.top = nn.Linear(12, 1)

    def forward(self, raw: Tensor, single: Tensor) -> Tensor:
        hashed = raw % 10 + self.offsets
        vectors = [self.table(hashed), self.other(single.clamp(0, 4)), self.mapped(self.remap[single % 4])]
        return torch.sigmoid(self.top(torch.cat(vectors, dim=1)))


def test_index_arithmetic_becomes_the_index_program(tmp_path: Path) -> None:
    def make(batch: int) -> tuple[Tensor, Tensor]:
        return torch.randint(0, 1 << 40, (batch, 3)), torch.randint(0, 1000, (batch,))

    report, _ = partition_and_compare(tmp_path, Hashing(), make(4), make)
    assert report.model.index is not None
    assert report.model.index.inputs == ("raw", "single")
    assert len(report.model.index.outputs) == 3
    assert report.model.dense.inputs == ()


def test_index_arithmetic_takes_a_batch_without_samples(tmp_path: Path) -> None:
    partition_model(Hashing().eval(), (ids(1000, 4, 3), ids(1000, 4)), tmp_path / "out", name="m")
    with Pipeline.open(tmp_path / "out") as pipeline:
        assert pytree.tree_leaves(pipeline(ids(1000, 0, 3), ids(1000, 0)))[0].shape == (0, 1)


class Awkward(nn.Module):
    """Inputs and parameters with the names that a program gives its own."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.history = nn.Embedding(10, 4), nn.Embedding(10, 4)
        self.top = nn.Linear(4, 2)
        self.top_weight = nn.Parameter(torch.randn(2, 4))

    def forward(self, ids: Tensor, pooled: Tensor, sequence_0: Tensor) -> dict[str, Tensor]:
        vector = self.table(ids) + pooled + self.history(sequence_0).softmax(1).sum(1)
        return {'a "b\\': self.top(vector) - vector @ self.top_weight.T}


def test_names_may_be_those_that_a_program_would_choose(tmp_path: Path) -> None:
    def make(batch: int) -> tuple[Tensor, Tensor, Tensor]:
        return ids(10, batch), torch.randn(batch, 4), ids(10, batch, 3)

    partition_and_compare(tmp_path, Awkward(), make(4), make)
    config = (tmp_path / "out" / "model_repository" / "m" / "config.pbtxt").read_text()
    assert r'{ name: "a \"b\\" data_type' in config


class Interests(nn.Module):
    """A sequence that attention reads, one that is only averaged, a mask over ids, positions that never leave."""

    def __init__(self) -> None:
        super().__init__()
        self.item, self.tag, self.position = nn.Embedding(40, 6, padding_idx=0), nn.Embedding(7, 6), nn.Embedding(5, 6)
        self.top = nn.Linear(18, 1)

    def forward(self, history: Tensor, candidate: Tensor, tags: Tensor) -> tuple[Tensor, Tensor]:
        rows = self.item(history) + self.position(torch.arange(5))
        target = self.item(candidate)
        scores = torch.einsum("bkd,bd->bk", rows, target).masked_fill(history == 0, -1e9)
        interest = torch.einsum("bk,bkd->bd", scores.softmax(1), rows)
        vector = torch.cat([interest, target, self.tag(tags).mean(1)], dim=1)
        return self.top(vector), interest.reshape(history.shape[0], 2, 3)


def test_sequences_come_back_as_rows_and_plain_means_are_pooled(tmp_path: Path) -> None:
    def make(batch: int) -> tuple[Tensor, Tensor, Tensor]:
        return ids(40, batch, 5), ids(40, batch), ids(7, batch, 4)

    report, _ = partition_and_compare(tmp_path, Interests(), make(3), make, sidecars=2)
    assert {f.name: f.pooling for f in report.plan.features} == {"candidate": "sum", "tags": "mean", "history": "none"}
    assert report.model.dense.sequences == ("history",)
    assert report.model.dense.inputs == ("history",)
    assert [t.name for t in report.model.outputs] == ["output_0", "output_1"]
    assert len(report.kept) == 1


class Weighted(nn.Module):
    """Per-sample weights: given as an input for a jagged feature, computed for a matrix of ids; both offset conventions."""

    def __init__(self) -> None:
        super().__init__()
        self.jagged = nn.EmbeddingBag(20, 4, mode="sum", include_last_offset=True)
        self.plain = nn.EmbeddingBag(10, 3, mode="max")
        self.matrix = nn.EmbeddingBag(15, 4, mode="sum")
        self.gate = nn.Linear(2, 3)
        self.top = nn.Linear(11, 1)

    def forward(self, dense: Tensor, v: Tensor, o: Tensor, w: Tensor, v2: Tensor, o2: Tensor, cards: Tensor) -> Tensor:
        bags = [self.jagged(v, o, per_sample_weights=w), self.plain(v2, o2)]
        gated = self.matrix(cards, per_sample_weights=self.gate(dense).sigmoid())
        score: Tensor = self.top(torch.cat([*bags, gated], dim=1))
        return score


def test_per_sample_weights_travel_with_jagged_ids_and_are_applied_behind_fixed_ones(tmp_path: Path) -> None:
    def make(batch: int) -> tuple[Tensor, ...]:
        lengths = torch.randint(1, 4, (batch,))
        ends = lengths.cumsum(0)
        nnz, starts = int(ends[-1]), ends - lengths
        offsets = torch.cat([starts, ends[-1:]])
        return torch.randn(batch, 2), ids(20, nnz), offsets, torch.rand(nnz), ids(10, nnz).int(), starts.int(), ids(15, batch, 3)

    report, _ = partition_and_compare(tmp_path, Weighted(), make(3), make)
    weighted = {f.name: f.weighted for f in report.plan.features}
    assert weighted == {"v": True, "v2": False, "cards": False}
    assert {f.name: f.pooling for f in report.plan.features} == {"v": "sum", "v2": "max", "cards": "none"}


class Interleaved(nn.Module):
    """Pieces joined in an order of their own, twice, with other tensors between; a dimension that differs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.EmbeddingBag(11, n) for n in (4, 4, 2, 4))
        self.top = nn.Linear(18, 1)

    def forward(self, ids: Tensor, dense: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, b, c, d = (table(ids[:, i : i + 1]) for i, table in enumerate((self.a, self.b, self.c, self.d)))
        wide = self.top(torch.cat([d, b, dense, a, c], dim=1))
        tall = torch.stack([a, dense, d, b], dim=1)
        return wide, torch.bmm(tall, tall.transpose(1, 2)), torch.stack([a, b, d], dim=2) + torch.cat([a, b]).sum() * 0


def test_pieces_joined_in_any_order_stay_right(tmp_path: Path) -> None:
    def make(batch: int) -> tuple[Tensor, Tensor]:
        return ids(11, batch, 4), torch.randn(batch, 4)

    report, _ = partition_and_compare(tmp_path, Interleaved(), make(5), make, sidecars=4)
    assert [f.name for f in report.plan.features] == ["ids.3", "ids.1", "ids.0", "ids.2"]  # as the widest join takes them


class FusedTable(nn.Module):
    """All features in one table, looked up as `[B, F]`, reduced by a factorization machine; ids of three dimensions too."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.grid = nn.Embedding(60, 4), nn.Embedding(8, 2)

    def forward(self, ids: Tensor, grid: Tensor) -> Tensor:
        rows = self.table(ids)
        pairs = 0.5 * (rows.sum(1) ** 2 - (rows**2).sum(1)).sum(1, keepdim=True)
        score: Tensor = pairs + self.grid(grid).sum((1, 2, 3)).unsqueeze(1)
        return score


def test_a_fused_table_is_one_sequence(tmp_path: Path) -> None:
    def make(batch: int) -> tuple[Tensor, Tensor]:
        return ids(60, batch, 6), ids(8, batch, 2, 3)

    report, _ = partition_and_compare(tmp_path, FusedTable(), make(3), make)
    assert report.plan.out_dim == 0
    assert report.ids_per_bag == {"ids": 6, "grid": 6}


class Tied(nn.Module):
    """Two modules with one parameter; keyword arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Embedding(12, 3), nn.Embedding(12, 3)
        self.right.weight = self.left.weight

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        product: Tensor = self.left(a) * self.right(b)
        return product.sum(1)


def test_tied_parameters_are_one_table_and_keyword_examples_work(tmp_path: Path) -> None:
    def make(batch: int) -> tuple[Tensor, Tensor]:
        return ids(12, batch), ids(12, batch)

    a, b = make(4)
    report, _ = partition_and_compare(tmp_path, Tied(), {"a": a, "b": b}, make)
    assert len(report.plan.tables) == 1
    assert [f.name for f in report.plan.features] == ["a", "b"]


@pytest.mark.parametrize(("row_format", "allowed"), [("fp16", 1e-3), ("bf16", 1e-2), ("int8", 1e-2), ("int4", 0.2)])
def test_narrow_rows_are_within_their_precision_and_the_report_says_how_far(
    tmp_path: Path, row_format: str, allowed: float
) -> None:
    model, example = single_id(max_rows=100)
    report = partition_model(model, example, tmp_path / "out", name="m", row_format=row_format)
    oracle = ArtifactOracle(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(oracle(*example)[0], model(*example), rtol=0, atol=allowed)
    original = {name.removesuffix(".weight"): p for name, p in model.named_parameters() if name.startswith("tables.")}
    assert original.keys() == oracle.tables.keys()
    for table in json.loads((tmp_path / "out" / "report.json").read_text())["tables"]:
        error = oracle.tables[table["name"]].double() - original[table["name"]].detach().double()
        assert table["row_format"] == row_format
        assert table["max_abs_error"] == pytest.approx(float(error.abs().max()), rel=1e-4, abs=1e-7)
        assert table["rms_error"] == pytest.approx(float(error.square().mean().sqrt()), rel=1e-4, abs=1e-7)
    assert "largest error" in report.text
    assert f" {row_format} " in report.text


def test_rows_as_the_model_has_them_have_no_error(tmp_path: Path) -> None:
    model, example = single_id(max_rows=100)
    report = partition_model(model, example, tmp_path / "out", name="m")
    assert all(t["max_abs_error"] == t["rms_error"] == 0 for t in report.json["tables"])


def test_partitioning_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model, example = single_id(max_rows=50)
    model.train()
    model.top[1].eval()
    modes = [m.training for m in model.modules()]
    before = {n: (p.data_ptr(), p.clone()) for n, p in model.named_parameters()}
    partition_model(model, example, tmp_path / "out", name="m")
    assert [m.training for m in model.modules()] == modes
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad
        assert parameter.data_ptr() == before[name][0]
        assert torch.equal(parameter, before[name][1])
