"""What cannot be partitioned is refused with what was found, what is allowed, and nothing is left behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sidepool.partition import partition_model
from sidepool.partition.placement import place_tables
from sidepool.partition.triton_config import TritonOptions
from sidepool.wire.errors import CutError, PlanError
from sidepool.wire.plan import Table


class Small(nn.Module):
    """One table of 10 rows over `ids [B]`; `forward` is what a test makes of it."""

    table: Any
    top: Any
    seen: Tensor

    def __init__(self, body: Callable[..., Any] | None = None, table: nn.Module | None = None) -> None:
        super().__init__()
        self.table = table or nn.Embedding(10, 4)
        self.top = nn.Linear(4, 1)
        self.register_buffer("seen", torch.zeros(()))
        self._body = body

    def forward(self, *inputs: Tensor) -> Any:
        return self._body(self, *inputs) if self._body else self.top(self.table(inputs[0]))


IDS = torch.tensor([1, 2, 3])
VALUES, OFFSETS = torch.tensor([1, 2, 3, 4, 5]), torch.tensor([0, 1, 3])


def refused(tmp_path: Path, model: Any, example: Any, match: str, error: type[Exception] = CutError, **options: Any) -> None:
    with pytest.raises(error, match=match):
        partition_model(model, example, tmp_path / "out", **dict[str, Any](name="m", sidecars=1) | options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("example", "match"),
    [
        (7, "example inputs: found int; allowed: a tensor, a tuple"),
        ((), "example inputs: found none"),
        ((IDS, 3), "tensor 1: found 3; allowed: tensors only"),
        ((torch.tensor(1),), r"tensor 0: found shape \[\]; allowed: a first dimension of at least 2"),
        ((IDS[:1],), r"tensor 0: found shape \[1\]; allowed: a first dimension of at least 2"),
        ((IDS.to(torch.int8),), "tensor 0: found dtype torch.int8; allowed: float32"),
        ((IDS, torch.zeros(3, dtype=torch.bfloat16)), "tensor 1: found dtype torch.bfloat16; allowed: float32"),
        ((IDS.float(),), "the model itself refuses them: RuntimeError"),
        ((torch.tensor([1, 99]),), "the model itself refuses them: IndexError"),
    ],
)
def test_wrong_example_inputs_are_named(tmp_path: Path, example: Any, match: str) -> None:
    refused(tmp_path, Small(), example, match)


@pytest.mark.parametrize(
    ("name", "match"), [("", "name: found ''"), ("a/b", "name: found 'a/b'"), (".x", "name: found '.x'; allowed: letters")]
)
def test_a_name_that_is_no_directory_name_is_refused(tmp_path: Path, name: str, match: str) -> None:
    refused(tmp_path, Small(), IDS, match, PlanError, name=name)


def test_what_is_no_module_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, print, IDS, "model: found builtin_function_or_method; allowed: a torch.nn.Module")


def test_tensors_on_another_device_are_refused(tmp_path: Path) -> None:
    refused(tmp_path, Small().to("meta"), IDS, "model: table.weight lies on meta; allowed: cpu")
    refused(tmp_path, Small(), IDS.to("meta"), "tensor 0: lies on meta; allowed: cpu")


def test_a_model_without_lookups_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, nn.Linear(3, 1), torch.randn(2, 3), "found 0 embedding operators")


def test_ids_from_another_lookup_are_refused_with_their_source_line(tmp_path: Path) -> None:
    model = Small(lambda self, ids: self.top(self.table(self.table(ids).argmax(1))))
    refused(tmp_path, model, IDS, r"(?s)depend on the lookup embedding \(File .*test_partition_errors.*remedy: ")


@pytest.mark.parametrize(
    ("body", "match"),
    [
        (lambda self, x, ids: torch.zeros_like(x).index_add(0, ids % 2, self.table(ids).sum(1).long()), "it has s.* ids, not "),
        (lambda self, x, ids: self.table.weight[ids].sum(1), "takes rows of table.weight by index; allowed: torch.nn.functional"),
        (lambda self, x, ids: (self.table(x), self.table(ids)), "output output_1: found 5 samples; allowed: 3, as in output_0"),
    ],
)
def test_ids_that_are_no_bags_of_samples_are_refused(tmp_path: Path, body: Any, match: str) -> None:
    refused(tmp_path, Small(body), (IDS, VALUES), match)


def test_bags_of_several_features_in_one_are_refused(tmp_path: Path) -> None:
    model = Small(lambda self, v, o: self.table(v, o).view(-1, 8), nn.EmbeddingBag(10, 4))
    refused(tmp_path, model, (VALUES, torch.tensor([0, 1, 3, 4])), "it has s.* offsets, not a bag per sample")


def test_ids_from_a_dense_layer_are_refused(tmp_path: Path) -> None:
    model = Small(lambda self, x: self.top(self.table((self.top(x).squeeze(1) > 0).long())))
    refused(tmp_path, model, torch.randn(3, 4), r"depend on the parameter top\.(weight|bias)")


def test_a_table_that_something_else_reads_is_refused(tmp_path: Path) -> None:
    model = Small(lambda self, ids: self.table(ids) @ self.table.weight.T)
    refused(tmp_path, model, IDS, "table table.weight: also read by .*test_partition_errors")


def test_a_table_of_another_dtype_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, Small().double(), IDS, r"(?s)table table.weight: found torch.float64.*remedy: partition model.float")


def test_tables_of_several_dtypes_are_refused(tmp_path: Path) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Embedding(10, 4).half(), nn.Embedding(10, 4)

        def forward(self, ids: Tensor) -> Tensor:
            return self.first(ids) + self.second(ids)

    refused(tmp_path, Mixed(), IDS, "table second.weight: found torch.float32; allowed: torch.float16, as the first table is")


def test_two_outputs_of_one_name_are_refused(tmp_path: Path) -> None:
    model = Small(lambda self, ids: {1: self.table(ids), "1": self.top(self.table(ids))})
    refused(tmp_path, model, IDS, "returns outputs named 1, 1; allowed: every name once")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_table_that_holds_no_number_is_refused_and_nothing_is_left(tmp_path: Path, value: float) -> None:
    model = Small()
    with torch.no_grad():
        model.table.weight[7, 2] = value
    refused(tmp_path, model, IDS, "table table: row 7 holds NaN or infinity as fp32")


def test_rows_too_large_for_half_precision_are_refused(tmp_path: Path) -> None:
    model = Small()
    with torch.no_grad():
        model.table.weight[3, 0] = 1e6
    refused(tmp_path, model, IDS, "table table: row 3 holds NaN or infinity as fp16", row_format="fp16")


def test_a_model_that_mixes_samples_is_refused(tmp_path: Path) -> None:
    model = Small(lambda self, ids: self.top(self.table(ids)).softmax(0))
    refused(tmp_path, model, IDS, "output score: the last sample alone scores differently: the model mixes the samples")


def test_a_model_that_is_not_deterministic_is_refused(tmp_path: Path) -> None:
    model = Small(lambda self, ids: self.top(self.table(ids)) + torch.rand(ids.shape[0], 1))
    refused(tmp_path, model, IDS, "the partitioned model differs from the original")


def test_a_model_that_writes_in_forward_is_refused(tmp_path: Path) -> None:
    def count(self: Small, ids: Tensor) -> Any:
        self.seen.add_(1)
        return self.top(self.table(ids))

    refused(tmp_path, Small(count), IDS, "writes to 'seen' in forward")


@pytest.mark.parametrize(
    ("body", "match"),
    [
        (lambda self, ids: self.top(self.table(ids)) * (2 if ids.sum() > 3 else 1), "remedy: values decide"),
        (lambda self, ids: self.top(self.table(ids)).reshape(3, 1), r"operator aten.(view|reshape).*remedy: a size is fixed there"),
        (lambda self, ids: self.top(self.table(torch.from_numpy(ids.numpy() + 1))), "remedy: express that line with torch's own"),
    ],
)
def test_what_cannot_be_exported_is_named_with_its_line_and_what_to_change(tmp_path: Path, body: Any, match: str) -> None:
    refused(tmp_path, Small(body), IDS, rf"(?s)capture it with a varying batch at File .*test_partition_errors.py.*{match}")


def test_an_operator_that_torch_does_not_bring_is_refused(tmp_path: Path) -> None:
    with torch.library._scoped_library("sidepool_test", "DEF") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: x * 2, "CompositeExplicitAutograd")
        torch.library.register_fake("sidepool_test::twice", torch.empty_like, lib=library)
        model = Small(lambda self, ids: torch.ops.sidepool_test.twice(self.top(self.table(ids))))
        refused(tmp_path, model, IDS, r"(?s)found operator sidepool_test.twice.default \(File .*test_partition_errors.*remedy")


def chosen(self: Small, ids: Tensor) -> Tensor:
    found, some = torch.zeros(ids.shape[0], 1), ids > 0
    if ids[some].shape[0] == 0:
        return found
    found[some] = self.top(self.table(ids[some]))
    return found


def test_examples_must_hold_samples_that_the_model_leaves_out(tmp_path: Path) -> None:
    refused(tmp_path, Small(chosen), IDS, r"(?s)leaves samples out by a mask, but none of these.*remedy: add a sample")
    partition_model(Small(chosen), torch.tensor([0, 1, 2]), tmp_path / "out", name="m", sidecars=1)


@pytest.mark.parametrize(
    ("body", "match"),
    [
        (lambda self, ids: self.top(self.table(ids)).sum(), r"output score: found shape \[\]; allowed: the batch"),
        (lambda self, ids: {"a": self.top(self.table(ids)), "b": 3}, "returns dict; allowed: a tensor, or a tuple or dict"),
        (lambda self, ids: self.top(self.table(ids)).to(torch.int16), "output score: found dtype torch.int16"),
    ],
)
def test_outputs_that_triton_cannot_batch_are_refused(tmp_path: Path, body: Any, match: str) -> None:
    refused(tmp_path, Small(body), IDS, match)


def test_arithmetic_on_jagged_ids_is_refused_with_a_remedy(tmp_path: Path) -> None:
    model = Small(lambda self, v, o: self.top(self.table(v % 10, o)), nn.EmbeddingBag(10, 4, mode="sum"))
    refused(tmp_path, model, (VALUES, OFFSETS), r"(?s)found values computed by remainder.*remedy: apply the arithmetic before")


def test_offsets_that_count_from_the_first_sample_are_refused(tmp_path: Path) -> None:
    model = Small(lambda self, v, o: self.top(self.table(v, o)) + o.unsqueeze(1), nn.EmbeddingBag(10, 4, mode="sum"))
    refused(tmp_path, model, (VALUES, OFFSETS), "the last sample alone scores differently: the model mixes the samples of a batch")


def test_renormalised_tables_are_refused(tmp_path: Path) -> None:
    refused(tmp_path, Small(table=nn.Embedding(10, 4, max_norm=0.1)), IDS, "writes to 'table.weight' in forward|cannot capture")


def test_more_sidecars_than_tables_are_refused(tmp_path: Path) -> None:
    refused(tmp_path, Small(), IDS, "sidecars: found 2; allowed: 1 to 1", PlanError, sidecars=2)


class Optional(nn.Module):
    """A table that is looked up only where an input is given."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.more = nn.Embedding(10, 4), nn.Embedding(100, 4)

    def forward(self, ids: Tensor, more: Tensor | None = None) -> Tensor:
        return self.table(ids) if more is None else self.table(ids) + self.more(more)


def test_examples_that_do_not_reach_a_table_are_refused(tmp_path: Path) -> None:
    refused(tmp_path, Optional(), IDS, r"(?s)do not reach the table more, and leave out more; .*remedy: give what is left out")


@pytest.mark.parametrize(
    ("allowed", "match"),
    [
        (1599, r"(?s)found 1599; sidecar-0 needs 1600.*remedy: a narrower row_format: the largest table alone needs more"),
        (1700, r"(?s)found 1700; sidecar-0 needs 1760 .*remedy: more sidecars \(at least 2\), or a narrower row_format"),
    ],
)
def test_a_plan_that_needs_more_memory_than_a_sidecar_has_is_refused(tmp_path: Path, allowed: int, match: str) -> None:
    refused(tmp_path, Optional(), (IDS, IDS), match, PlanError, sidecar_bytes=allowed, sidecars=2 if allowed < 1600 else 1)
    partition_model(Optional(), (IDS, IDS), tmp_path / "out", name="m", sidecars=2, sidecar_bytes=1600)


@pytest.mark.parametrize(
    ("addresses", "match"),
    [
        (["127.0.0.1:1", "127.0.0.1:2"], "allowed: 1 different addresses"),
        (["10.0.0.7"], "addresses: found .10.0.0.7.; allowed: HOST:PORT"),
        (["127.0.0.1:99999"], "sidecars.0.address: found .127.0.0.1:99999.; allowed: host:port, ports 1 to 65535"),
        (["nowhere"], "addresses: found 'nowhere'; allowed: HOST:PORT"),
    ],
)
def test_wrong_addresses_are_refused(tmp_path: Path, addresses: list[str], match: str) -> None:
    refused(tmp_path, Small(), IDS, match, PlanError, addresses=addresses)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"name": None}, "name: found None; allowed: letters"),
        ({"sidecars": 0}, "sidecars: found 0; allowed: a whole number, 1 or more"),
        ({"sidecars": "2"}, "sidecars: found '2'; allowed: a whole number"),
        ({"sidecar_bytes": 1.5}, "sidecar_bytes: found 1.5; allowed: a whole number, 1 or more"),
        ({"epoch": True}, "epoch: found True; allowed: a whole number"),
        ({"row_format": "int2"}, "row_format: found 'int2'; allowed: fp32, fp16, bf16, int8, int4"),
        ({"row_format": torch.float16}, "row_format: found torch.float16; allowed: fp32"),
        ({"on_missing_shard": "skip"}, "on_missing_shard: found 'skip'; allowed: fail, degrade"),
        ({"addresses": "127.0.0.1:1"}, "addresses: found '127.0.0.1:1'; allowed: a list of HOST:PORT"),
        ({"link": ["shm"]}, "link: found .*; allowed: shm"),
        ({"gpu_table_bytes": "1"}, "gpu_table_bytes: found '1'; allowed: 0 or more"),
        ({"programs": "no"}, "programs: found 'no'; allowed: True or False"),
        ({"triton": {}}, "triton: found {}; allowed: TritonOptions"),
        ({"triton": TritonOptions(lane="pigeon")}, "triton.lane: found 'pigeon'; allowed: shm, tcp"),
        ({"triton": TritonOptions(instances=0)}, "triton.instances: found 0; allowed: a whole number, 1 or more"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_done(tmp_path: Path, options: dict[str, Any], match: str) -> None:
    with pytest.raises((CutError, PlanError), match=match):
        partition_model(print, IDS, tmp_path / "out", **dict[str, Any](name="m") | options)  # type: ignore[arg-type]
    for out, said in ((3, "found 3; allowed: a path"), (".", "found '.'; allowed: the path of a directory with a name")):
        with pytest.raises(CutError, match=f"out_dir: {said}"):
            partition_model(print, IDS, out, name="m")  # type: ignore[arg-type]


def test_an_output_directory_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(CutError, match=r"(?s)out: found .*which is not empty.*remedy: remove it"):
        partition_model(Small(), IDS, tmp_path, name="m", sidecars=1)
    with pytest.raises(CutError, match="which is not empty"):
        partition_model(Small(), IDS, tmp_path / "mine.txt", name="m", sidecars=1)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
    assert (tmp_path / "mine.txt").read_text() == "precious"


def test_an_empty_output_directory_is_used(tmp_path: Path) -> None:
    partition_model(Small(), IDS, tmp_path / "new" / "deep", name="m", sidecars=1)
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    partition_model(Small(), IDS, tmp_path / "link", name="m", sidecars=1)
    assert (tmp_path / "empty" / "plan.yaml").is_file()
    assert not list(tmp_path.rglob("*.partial"))


def test_tables_are_placed_by_bytes_and_by_work() -> None:
    def table(name: str, rows: int) -> Table:
        return Table(name=name, rows=rows, dim=4)

    same = [table(str(i), 100) for i in range(8)]
    owners = place_tables(same, {t.name: 1.0 for t in same}, 4)
    assert sorted(owners) == [0, 0, 1, 1, 2, 2, 3, 3]
    # One table holds nearly all bytes, another does nearly all the work: they part, and the rest is shared out.
    mixed = [table("big", 10_000), table("busy", 100), *(table(f"t{i}", 100) for i in range(6))]
    loads = {t.name: 1.0 for t in mixed} | {"busy": 100.0}
    owners = place_tables(mixed, loads, 2)
    assert owners[0] != owners[1]
    assert place_tables(mixed, loads, 2) == owners
    assert set(place_tables(mixed, loads, 8)) == set(range(8))
