"""A model's inputs become one part of a lookup: an id matrix, or jagged bags."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sidepool.client.dense import DenseGraph
from sidepool.client.index_program import FeatureRouter
from sidepool.client.linear_layers import pack_linear_layers, rounded_up
from sidepool.wire.errors import ConfigError, LookupRejected, ShardCorrupt
from sidepool.wire.model import DenseProgram, FeatureSource, FixedSource, IndexProgram, JaggedSource, ModelSpec, TensorSpec
from sidepool.wire.plan import Feature, Plan, Pooling, Shard, SidecarAddress, Table
from sidepool.wire.torch_program import load_program

Source = FixedSource | JaggedSource


def plan(count: int, weighted: bool = False, pooling: Pooling = Pooling.SUM) -> Plan:
    return Plan(
        epoch=1,
        model="m",
        tables=(Table(name="t", rows=100, dim=4),),
        features=tuple(Feature(name=f"f{i}", table="t", weighted=weighted, pooling=pooling) for i in range(count)),
        sidecars=(SidecarAddress(name="s", address="127.0.0.1:1"),),
        shards=(Shard(table="t", sidecar="s", rows=(0, 100), columns=(0, 4)),),
    )


def model(*sources: Source, **changes: Any) -> ModelSpec:
    fields: dict[str, Any] = {
        "name": "m",
        "inputs": (TensorSpec(name="ids", dtype="int64", shape=(-1, 2)),),
        "features": tuple(FeatureSource(feature=f"f{i}", source=source) for i, source in enumerate(sources)),
        "dense": DenseProgram(file="dense.pt2", inputs=("x",)),
        "outputs": (TensorSpec(name="y", dtype="float32", shape=(-1, 1)),),
    }
    return ModelSpec(**(fields | changes))


def router(*sources: Source, weighted: bool = False) -> FeatureRouter:
    return FeatureRouter(model(*sources), plan(len(sources), weighted), Path())


def test_one_id_matrix_is_passed_on_without_a_copy() -> None:
    routed = router(FixedSource(input="ids", begin=1, end=2), FixedSource(input="ids", begin=0, end=1))
    ids = np.array([[1, 2], [3, 4]])
    values, lengths, weights = routed.route({"ids": ids})
    assert np.shares_memory(values, ids)
    assert lengths is None
    assert weights is None
    assert routed.fixed_columns == ((1, 2), (0, 1))


def test_several_id_inputs_become_one_matrix() -> None:
    routed = router(FixedSource(input="user", begin=0, end=1), FixedSource(input="items", begin=1, end=3))
    user, items = np.array([7, 8], np.int32), np.array([[0, 1, 2], [0, 3, 4]])
    values, _, _ = routed.route({"user": user, "items": items})
    assert values.dtype == np.int64
    assert routed.fixed_columns is not None
    (begin, end), (first, last) = routed.fixed_columns
    assert values[:, begin:end].tolist() == [[7], [8]]
    assert values[:, first:last].tolist() == [[1, 2], [3, 4]]


def test_offsets_become_lengths_whether_or_not_they_hold_the_end() -> None:
    routed = router(
        JaggedSource(values="v", offsets="o"),
        JaggedSource(values="w", offsets="p", include_last_offset=True),
        FixedSource(input="ids", begin=0, end=2),
    )
    inputs = {
        "v": np.array([1, 2, 3]),
        "o": np.array([0, 3]),
        "w": np.array([4, 5]),
        "p": np.array([0, 0, 2]),
        "ids": np.array([[6, 7], [8, 9]]),
    }
    values, lengths, weights = routed.route(inputs)
    assert values.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert lengths is not None
    assert lengths.tolist() == [3, 0, 0, 2, 2, 2]
    assert lengths.dtype == np.int32
    assert weights is None
    assert routed.fixed_columns is None


def test_weights_are_joined_in_feature_order() -> None:
    routed = router(JaggedSource(values="v", offsets="o", weights="s"), weighted=True)
    inputs = {"v": np.array([1, 2]), "o": np.array([0, 1]), "s": np.array([0.5, 2.0], np.float32)}
    assert routed.route(inputs)[2].tolist() == [0.5, 2.0]  # type: ignore[union-attr]
    with pytest.raises(LookupRejected, match=r"^s: found float32 \[1\]; allowed: float32 \[2\]"):
        routed.route({**inputs, "s": np.ones(1, np.float32)})


JAGGED = JaggedSource(values="v", offsets="o")


@pytest.mark.parametrize(
    ("source", "inputs", "message"),
    [
        (FixedSource(input="ids", begin=0, end=2), {}, r"^ids: missing; found the inputs \[\]"),
        (FixedSource(input="ids", begin=0, end=2), {"ids": np.zeros((3, 2))}, "^ids: found float64"),
        (FixedSource(input="ids", begin=0, end=2), {"ids": np.zeros((3, 1), np.int64)}, "^ids: found 1 columns"),
        (FixedSource(input="ids", begin=0, end=2), {"ids": np.array(3)}, r"^ids: found 1 columns \(shape \[1\]\)"),
        (JAGGED, {"v": np.arange(3), "o": np.array([1, 2])}, r"^o: found \[1, 2, 3\].* up to the 3 ids of v"),
        (JAGGED, {"v": np.arange(3), "o": np.array([0, 2, 1])}, "^o: found"),
        (JAGGED, {"v": np.arange(3), "o": np.array([0, 4])}, "^o: found"),
        # Differences that overflow into 2**62 + 1, 2**62 + 1, 2**62, 2**62 + 1: in 32 bits the lengths 1, 1, 0, 1.
        (JAGGED, {"v": np.arange(3), "o": np.array([0, 2**62 + 1, -(2**63) + 2, -(2**62) + 2])}, "^o: found"),
        (JAGGED, {"v": np.zeros((2, 2), np.int64), "o": np.array([0])}, r"^v: found shape \[2, 2\]"),
        (JAGGED, {"v": np.arange(3), "o": np.zeros(0, np.int64)}, "^o: found"),
    ],
)
def test_inputs_that_are_no_bags_are_named(source: Source, inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(LookupRejected, match=message):
        router(source).route(inputs)


def test_inputs_of_different_batches_are_named() -> None:
    fixed = router(FixedSource(input="a", begin=0, end=1), FixedSource(input="b", begin=0, end=1))
    with pytest.raises(LookupRejected, match=r"^batch: found \{'a': 2, 'b': 3\}"):
        fixed.route({"a": np.zeros((2, 1), np.int64), "b": np.zeros((3, 1), np.int64)})
    mixed = router(JAGGED, FixedSource(input="a", begin=0, end=1))
    with pytest.raises(LookupRejected, match=r"^batch: found \{'f0': 1, 'f1': 2\}"):
        mixed.route({"v": np.arange(3), "o": np.array([0]), "a": np.zeros((2, 1), np.int64)})


class Hash(torch.nn.Module):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return (ids * 31 + 7) % 100


class Score(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 1))
        self.register_buffer("scale", torch.tensor([2.0]))

    def forward(self, pooled: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.net(torch.cat([pooled, x], 1)) * self.scale
        return scores


def save(module: torch.nn.Module, file: Path, *examples: torch.Tensor) -> None:
    batch = torch.export.Dim("batch", min=1, max=1024)
    torch.export.save(torch.export.export(module, examples, dynamic_shapes=tuple({0: batch} for _ in examples)), file)


def test_index_arithmetic_runs_before_the_lookup(tmp_path: Path) -> None:
    save(Hash(), tmp_path / "index.pt2", torch.ones(4, 2, dtype=torch.int64))
    index = IndexProgram(file="index.pt2", inputs=("ids",), outputs=("hashed",))
    spec = model(FixedSource(input="hashed", begin=0, end=1), FixedSource(input="hashed", begin=1, end=2), index=index)
    routed = FeatureRouter(spec, plan(2), tmp_path)
    ids = np.random.default_rng(0).integers(0, 1000, (6, 2))
    np.testing.assert_array_equal(routed.route({"ids": ids})[0], (ids * 31 + 7) % 100)


def test_a_dense_graph_gives_what_the_module_gives(tmp_path: Path) -> None:
    module = Score().eval()
    save(module, tmp_path / "dense.pt2", torch.ones(3, 4), torch.ones(3, 2))
    dense = DenseGraph(model(FixedSource(input="ids", begin=0, end=1)), tmp_path)
    for batch in (1, 2, 17):
        pooled, x = torch.randn(batch, 4), torch.randn(batch, 2)
        (found,) = dense.run(pooled, (), {"x": x, "unused": x})
        with torch.no_grad():
            torch.testing.assert_close(found, module(pooled, x), rtol=1e-6, atol=1e-6)


class Wide(torch.nn.Module):
    """Linear layers with and without bias and ReLU, one over three dimensions, one whose result is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(96, 128), torch.nn.Linear(128, 64, bias=False)
        self.each, self.last = torch.nn.Linear(32, 48), torch.nn.Linear(64 + 48, 3)

    def forward(self, pooled: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        second = self.second(torch.relu(self.first(pooled)))
        return self.last(torch.cat([second * torch.relu(second), torch.relu(self.each(x)).sum(1)], dim=1))


def test_large_linear_layers_give_what_the_module_gives_at_any_size_of_batch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Wide().eval()
    save(module, tmp_path / "dense.pt2", torch.ones(3, 96), torch.ones(3, 5, 32))
    packed: list[int] = []
    load_program(tmp_path / "dense.pt2", rewrite=lambda graph: packed.append(pack_linear_layers(graph)))
    assert packed == [4 if torch.backends.mkldnn.is_available() and "AVX" in torch.backends.cpu.get_cpu_capability() else 0]
    dense = DenseGraph(model(FixedSource(input="ids", begin=0, end=1)), tmp_path)
    buffer = torch.full((512, 96), torch.nan)  # what lies behind a batch in its memory reaches no result
    for batch in (0, 1, 17, 129, 300, 512):
        pooled, x = buffer[:batch].normal_(), torch.randn(batch, 5, 32)
        (found,) = dense.run(pooled, (), {"x": x})
        with torch.no_grad():
            torch.testing.assert_close(found, module(pooled, x), rtol=1e-4, atol=1e-4)
        buffer[:batch] = torch.nan


def test_batches_are_rounded_up_by_an_eighth_at_most_to_few_sizes() -> None:
    sizes = {batch: rounded_up(batch) for batch in range(4097)}
    assert all(batch <= size <= batch * 9 / 8 for batch, size in sizes.items())
    assert len(set(sizes.values())) < 100


def test_dense_inputs_that_do_not_fit_are_named_and_the_next_call_works(tmp_path: Path) -> None:
    save(Score().eval(), tmp_path / "dense.pt2", torch.ones(3, 4), torch.ones(3, 2))
    dense = DenseGraph(model(FixedSource(input="ids", begin=0, end=1)), tmp_path)
    with pytest.raises(LookupRejected, match=r"^x: missing"):
        dense.run(torch.ones(2, 4), (), {})
    with pytest.raises(LookupRejected, match=r"^inputs: found float32 \[2, 4\], float32 \[2, 3\]; they do not fit"):
        dense.run(torch.ones(2, 4), (), {"x": torch.ones(2, 3)})
    assert dense.run(torch.ones(2, 4), (), {"x": torch.ones(2, 2)})[0].shape == (2, 1)


class Attend(torch.nn.Module):
    def forward(self, pooled: torch.Tensor, rows: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return (rows.sum(1) * x).sum(1, keepdim=True) + pooled.sum()


def test_sequences_arrive_as_one_block_per_sample(tmp_path: Path) -> None:
    save(Attend(), tmp_path / "dense.pt2", torch.ones(3, 4), torch.ones(3, 2, 4), torch.ones(3, 4))
    program = DenseProgram(file="dense.pt2", sequences=("f0",), inputs=("x",))
    dense = DenseGraph(model(FixedSource(input="ids", begin=0, end=2), dense=program), tmp_path)
    rows = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
    (found,) = dense.run(torch.zeros(3, 4), (rows,), {"x": torch.ones(3, 4)})
    np.testing.assert_allclose(found.numpy()[:, 0], rows.reshape(3, 8).sum(1), rtol=1e-5)


def test_a_program_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    (tmp_path / "dense.pt2").write_bytes(b"PK\3\4 not a program")
    with pytest.raises(ShardCorrupt, match=r"dense\.pt2: cannot be loaded"):
        load_program(tmp_path / "dense.pt2")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_gpu_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="device: found 'cuda:0', but torch sees no CUDA device"):
        DenseGraph(model(FixedSource(input="ids", begin=0, end=1)), tmp_path, device="cuda:0")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_graph_gives_what_the_module_gives(tmp_path: Path) -> None:
    module = Score().eval()
    save(module, tmp_path / "dense.pt2", torch.ones(3, 4), torch.ones(3, 2))
    spec = model(FixedSource(input="ids", begin=0, end=1))
    for largest in (0, 8):
        dense = DenseGraph(spec, tmp_path, device="cuda:0", max_captured_batch=largest)
        for batch in (1, 5, 7, 8, 9, 3):
            pooled, x = dense.host_buffer(batch, 4).normal_(), torch.randn(batch, 2)
            (found,) = dense.run(pooled, (), {"x": x})
            with torch.no_grad():
                torch.testing.assert_close(found, module(pooled, x), rtol=1e-4, atol=1e-5)
