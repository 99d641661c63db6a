"""A partitioned model in one process gives the original model's outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sidepool.client import Pipeline
from sidepool.partition import partition_model
from sidepool.wire.errors import ConfigError, LookupRejected


class Fixed(torch.nn.Module):
    """Three single-id columns and a history of four, hashed first."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = torch.nn.ModuleList(torch.nn.Embedding(20 + i, 8) for i in range(3))
        self.history = torch.nn.Embedding(50, 8)
        self.top = torch.nn.Linear(3 + 4 * 8, 1)

    def forward(self, dense: torch.Tensor, ids: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        columns = [table(ids[:, i]) for i, table in enumerate(self.tables)]
        history = self.history((seen * 7 + 3) % 50).mean(1)
        return torch.sigmoid(self.top(torch.cat([dense, *columns, history], 1)))


class Jagged(torch.nn.Module):
    """Bags of any length, given as lists of values and offsets."""

    def __init__(self) -> None:
        super().__init__()
        self.bags = torch.nn.ModuleList(torch.nn.EmbeddingBag(30, 4, mode="sum") for _ in range(2))
        self.top = torch.nn.Linear(3 + 2 * 4, 1)

    def forward(self, dense: torch.Tensor, values: list[torch.Tensor], offsets: list[torch.Tensor]) -> torch.Tensor:
        pooled = [bag(v, o) for bag, v, o in zip(self.bags, values, offsets, strict=True)]
        return torch.sigmoid(self.top(torch.cat([dense, *pooled], 1)))


def fixed_inputs(batch: int) -> tuple[Any, ...]:
    return torch.randn(batch, 3), torch.randint(0, 20, (batch, 3)), torch.randint(0, 10_000, (batch, 4))


def jagged_inputs(batch: int) -> tuple[Any, ...]:
    lengths = torch.randint(0, 4, (2, batch))
    offsets = [row.cumsum(0) - row for row in lengths]
    return torch.randn(batch, 3), [torch.randint(0, 30, (int(row.sum()),)) for row in lengths], offsets


@pytest.mark.parametrize(("kind", "inputs"), [(Fixed, fixed_inputs), (Jagged, jagged_inputs)])
def test_a_pipeline_scores_like_the_model_it_was_cut_from(tmp_path: Path, kind: type[torch.nn.Module], inputs: Any) -> None:
    torch.manual_seed(0)
    model = kind().eval()
    partition_model(model, inputs(4), tmp_path / "artifact", name="small")
    with Pipeline.open(tmp_path / "artifact") as pipeline, torch.no_grad():
        for batch in (1, 2, 33):
            given = inputs(batch)
            found = pipeline(*given)
            assert isinstance(found, torch.Tensor)
            torch.testing.assert_close(found, model(*given), rtol=0, atol=1e-5)


class Cast(torch.nn.Module):
    """A model that computes in `dtype` between float32 inputs and outputs: a bag, a single id, a history kept as rows."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.bag = torch.nn.EmbeddingBag(30, 24, mode="sum")
        self.one, self.history = torch.nn.Embedding(20, 5), torch.nn.Embedding(50, 8)
        self.top = torch.nn.Linear(3 + 24 + 5 + 8, 1)
        self.to(dtype)

    def forward(self, dense: torch.Tensor, several: torch.Tensor, one: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        rows = self.history(seen)
        history = (rows * torch.softmax(rows.sum(2, keepdim=True), 1)).sum(1)
        return torch.sigmoid(self.top(torch.cat([dense.to(self.dtype), self.bag(several), self.one(one), history], 1))).float()


def cast_inputs(batch: int, ids: torch.dtype = torch.int64) -> tuple[torch.Tensor, ...]:
    sizes = {(batch, 6): 30, (batch,): 20, (batch, 4): 50}
    return torch.randn(batch, 3), *(torch.randint(0, rows, shape, dtype=ids) for shape, rows in sizes.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("ids", [torch.int64, torch.int32])
def test_a_model_in_16_bits_gets_its_vectors_in_its_own_dtype(tmp_path: Path, dtype: torch.dtype, ids: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Cast(dtype).eval()
    report = partition_model(model, cast_inputs(4, ids), tmp_path / "artifact", name="small", sidecars=1)
    own = {torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    assert (report.model.dense.pooled_dtype, {str(t.row_format) for t in report.plan.tables}) == (own, {own})
    assert not any(error.max_abs for error in report.row_errors.values())
    assert report.wire_bytes(0, 10)[1] == 10 * 2 * (24 + 5 + 4 * 8)
    with Pipeline.open(tmp_path / "artifact") as pipeline, torch.no_grad():
        for batch in (1, 2, 33):
            given = cast_inputs(batch, ids)
            found = pipeline(*given)
            assert isinstance(found, torch.Tensor)
            # A few units in the last place: torch may sum a bag in the narrow dtype, the lookup does not.
            torch.testing.assert_close(found, model(*given), rtol=0, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("weighted", [False, True])
def test_jagged_ids_of_int32_and_weights_of_half_precision_are_taken(tmp_path: Path, weighted: bool) -> None:
    class Bags(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag = torch.nn.EmbeddingBag(30, 4, mode="sum").half()

        def forward(self, values: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.bag(values, offsets, weights if weighted else None)
            return found * (1 if weighted else weights[0])

    torch.manual_seed(0)
    model = Bags().eval()
    values, offsets = torch.randint(0, 30, (9,), dtype=torch.int32), torch.tensor([0, 2, 2], dtype=torch.int32)
    given = values, offsets, torch.randn(9).half()
    if not weighted:
        given = values, offsets, torch.ones(3, 1).half()
    partition_model(model, given, tmp_path / "artifact", name="bags", sidecars=1)
    with Pipeline.open(tmp_path / "artifact") as pipeline, torch.no_grad():
        torch.testing.assert_close(pipeline(*given), model(*given), rtol=0, atol=0.02)
    config = (tmp_path / "artifact/model_repository/bags/config.pbtxt").read_text()
    assert '"sparse.values" data_type: TYPE_INT32' in config


def test_a_pipeline_names_wrong_inputs_and_goes_on(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Fixed().eval()
    partition_model(model, fixed_inputs(4), tmp_path / "artifact", name="small")
    dense, ids, seen = fixed_inputs(3)
    with Pipeline.open(tmp_path / "artifact") as pipeline, torch.no_grad():
        with pytest.raises(LookupRejected, match="inputs: found no seen; allowed: dense, ids, seen"):
            pipeline(dense, ids)
        with pytest.raises(LookupRejected, match=r"dense: found float64 \[3, 3\]; allowed: float32 \[-1, 3\]"):
            pipeline(dense.double(), ids, seen)
        with pytest.raises(LookupRejected, match=r"bag 2: id 999 is outside its table; allowed: 0 to 20"):
            pipeline(dense, torch.tensor([[0, 0, 0], [0, 0, 0], [0, 999, 0]]), seen)
        with pytest.raises(LookupRejected, match=r"batch: found|do not fit"):
            pipeline(dense, ids[:2], seen)
        torch.testing.assert_close(pipeline(dense, ids, seen), model(dense, ids, seen), rtol=0, atol=1e-5)


class Named(torch.nn.Module):
    """Inputs of one dtype and shape that only their names tell apart, and outputs in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.user, self.item, self.shop = (torch.nn.Embedding(20, 4) for _ in range(3))

    def forward(self, ids: dict[str, torch.Tensor], shop: torch.Tensor, note: Any = None) -> dict[str, torch.Tensor]:
        return {"click": self.user(ids["user"]).sum(1) - self.shop(shop).sum(1), "buy": self.item(ids["item"]).sum(1)}


def test_inputs_are_told_by_name_in_whatever_order_they_come(tmp_path: Path) -> None:
    def ids() -> torch.Tensor:
        return torch.randint(0, 20, (3,))

    torch.manual_seed(0)
    model = Named().eval()
    user, item, shop = ids(), ids(), ids()
    partition_model(model, {"shop": ids(), "ids": {"user": ids(), "item": ids()}}, tmp_path / "artifact", name="small")
    with Pipeline.open(tmp_path / "artifact") as pipeline, torch.no_grad():
        expected = model({"user": user, "item": item}, shop)
        for args, kwargs in (
            (({"user": user, "item": item}, shop), {}),
            (({"item": item, "user": user},), {"shop": shop, "note": None}),
            ((), {"ids": {"item": item, "user": user}, "shop": shop}),
        ):
            found = pipeline(*args, **kwargs)
            assert isinstance(found, dict)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        allowed = r"allowed: shop, ids\['user'\], ids\['item'\]"
        with pytest.raises(LookupRejected, match=rf"inputs: found no ids\['item'\]; {allowed}"):
            pipeline({"user": user}, shop)
        with pytest.raises(LookupRejected, match=f"inputs: found note; {allowed}"):
            pipeline({"user": user, "item": item}, shop, shop)
        with pytest.raises(LookupRejected, match="inputs: got an unexpected keyword argument 'shops'; allowed: ids, shop, note"):
            pipeline({"user": user, "item": item}, shops=shop)


def test_a_folder_that_is_no_artifact_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"found model\.yaml in \[\]; allowed: an artifact"):
        Pipeline.open(tmp_path)
