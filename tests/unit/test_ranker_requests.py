"""What the ranker makes of Triton's requests and settings, without a Triton."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from sidepool.bench.load.model_requests import PartitionedModel, generated_requests
from sidepool.client.index_program import FeatureRouter
from sidepool.triton_backend.incoming import Reader
from sidepool.triton_backend.ranker import Ranker
from sidepool.triton_backend.settings import read_settings
from sidepool.triton_backend.stages import StageTimes
from sidepool.wire.errors import ConfigError, DeadlineExceeded, LookupRejected
from sidepool.wire.model import (
    MODEL_FILE,
    PLAN_FILE,
    DenseProgram,
    FeatureSource,
    FixedSource,
    JaggedSource,
    ModelSpec,
    TensorSpec,
    save_model,
)
from sidepool.wire.plan import Feature, Plan, Shard, SidecarAddress, Table, save_plan

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@dataclass
class Tensor:
    called: str
    array: NDArray[Any]

    def name(self) -> str:
        return self.called

    def as_numpy(self) -> NDArray[Any]:
        return self.array


@dataclass
class Request:
    """What Triton hands to a Python model, as far as the ranker reads it."""

    arrays: dict[str, NDArray[Any]]
    timeout_us: int = 0
    given: dict[str, Any] = field(default_factory=dict)
    context: str | None = None

    def inputs(self) -> list[Tensor]:
        return [Tensor(name, array) for name, array in self.arrays.items()]

    def timeout(self) -> int:
        return self.timeout_us

    def parameters(self) -> str:
        return json.dumps(self.given)

    def trace(self) -> Request:
        return self

    def get_context(self) -> str | None:
        return self.context


def plan(*features: str, weighted: tuple[str, ...] = ()) -> Plan:
    return Plan(
        epoch=1,
        model="m",
        tables=tuple(Table(name=f, rows=10, dim=4) for f in features),
        features=tuple(Feature(name=f, table=f, weighted=f in weighted) for f in features),
        sidecars=(SidecarAddress(name="s", address="127.0.0.1:1"),),
        shards=tuple(Shard(table=f, sidecar="s", rows=(0, 10), columns=(0, 4)) for f in features),
    )


def reader(model: ModelSpec, its_plan: Plan) -> Reader:
    return Reader(model, FeatureRouter(model, its_plan, Path()), 250.0)


def output() -> tuple[TensorSpec, ...]:
    return (TensorSpec(name="score", dtype="float32", shape=(-1, 1)),)


def fixed_reader(ids: Literal["int64", "int32"] = "int64") -> Reader:
    model = ModelSpec(
        name="m",
        inputs=(TensorSpec(name="dense", dtype="float32", shape=(-1, 3)), TensorSpec(name="ids", dtype=ids, shape=(-1, 2))),
        features=tuple(FeatureSource(feature=f, source=FixedSource(input="ids", begin=i, end=i + 1)) for i, f in enumerate("ab")),
        dense=DenseProgram(file="dense.pt2", inputs=("dense",)),
        outputs=output(),
    )
    return reader(model, plan("a", "b"))


def jagged_source(feature: str, *, weights: bool = False, last: bool = False) -> FeatureSource:
    source = JaggedSource(
        values=f"v{feature}", offsets=f"o{feature}", weights=f"w{feature}" if weights else None, include_last_offset=last
    )
    return FeatureSource(feature=feature, source=source)


def int64(name: str) -> TensorSpec:
    return TensorSpec(name=name, dtype="int64", shape=(-1,))


def fixed_request(samples: int = 2, **options: Any) -> Request:
    arrays = {"dense": np.ones((samples, 3), np.float32), "ids": np.arange(samples * 2).reshape(samples, 2)}
    return Request(arrays, **options)


def test_a_single_id_matrix_is_looked_up_where_it_lies() -> None:
    request = fixed_request()
    incoming = fixed_reader().read(5, request)
    assert incoming.part[0] is request.arrays["ids"]
    assert (incoming.position, incoming.samples, list(incoming.inputs)) == (5, 2, ["dense"])
    request.arrays["ids"] = request.arrays["ids"].astype(np.int32)
    assert fixed_reader("int32").read(5, request).part[0] is request.arrays["ids"]


def test_one_column_from_triton_is_an_input_without_columns() -> None:
    source = FixedSource(input="ids", begin=0, end=1)
    model = ModelSpec(
        name="m",
        inputs=(int64("ids"),),
        features=(FeatureSource(feature="a", source=source),),
        dense=DenseProgram(file="dense.pt2", inputs=("ids",)),
        outputs=output(),
    )
    incoming = reader(model, plan("a")).read(0, Request({"ids": np.array([[3], [4]])}))
    assert incoming.inputs["ids"].tolist() == [3, 4]
    assert incoming.part[0].tolist() == [[3], [4]]


def test_a_request_without_a_budget_gets_the_default() -> None:
    assert fixed_reader().read(0, fixed_request()).budget_ns == 250_000_000


def test_a_timeout_is_a_budget_and_a_parameter_overrides_it() -> None:
    assert fixed_reader().read(0, fixed_request(timeout_us=1500)).budget_ns == 1_500_000
    assert fixed_reader().read(0, fixed_request(timeout_us=1500, given={"deadline_ms": 7})).budget_ns == 7_000_000


@pytest.mark.parametrize("deadline_ms", [0, -1, -1e300])
def test_a_spent_budget_is_a_deadline_error(deadline_ms: float) -> None:
    with pytest.raises(DeadlineExceeded, match="deadline_ms"):
        fixed_reader().read(0, fixed_request(given={"deadline_ms": deadline_ms}))


@pytest.mark.parametrize("deadline_ms", ["soon", None, [1], 1e300, float("nan")])
def test_a_budget_that_is_none_is_refused_by_name(deadline_ms: Any) -> None:
    with pytest.raises(LookupRejected, match="deadline_ms"):
        fixed_reader().read(0, fixed_request(given={"deadline_ms": deadline_ms}))


def test_a_moment_counts_where_it_comes_before_the_budget_ends() -> None:
    def budget_ms(moment_ms: float, **more: Any) -> float:
        moment_us = int(time.time() * 1e6 + moment_ms * 1e3)
        return fixed_reader().read(0, fixed_request(given={"deadline_unix_us": moment_us, **more})).budget_ns / 1e6

    assert 50_000 < budget_ms(60_000, deadline_ms=3_600_000) <= 60_000
    assert budget_ms(60_000, deadline_ms=7) == 7
    assert budget_ms(60_000) == 250  # the default
    with pytest.raises(DeadlineExceeded, match="deadline_unix_us: passed"):
        budget_ms(-1)
    with pytest.raises(LookupRejected, match="deadline_unix_us: found 'noon'"):
        fixed_reader().read(0, fixed_request(given={"deadline_unix_us": "noon"}))


def test_a_priority_is_a_whole_number_that_a_frame_holds() -> None:
    for right in (-3, 0, 2**31 - 1):
        assert fixed_reader().read(0, fixed_request(given={"lookup_priority": right})).priority == right
    assert fixed_reader().read(0, fixed_request()).priority == 0
    for wrong in ("high", 1.5, 2**31, None):
        with pytest.raises(LookupRejected, match=f"lookup_priority: found {wrong!r}; allowed"):
            fixed_reader().read(0, fixed_request(given={"lookup_priority": wrong}))


def test_the_trace_context_comes_from_the_parameter_or_from_triton() -> None:
    context = json.dumps({"traceparent": TRACE})
    assert fixed_reader().read(0, fixed_request()).traceparent is None
    assert fixed_reader().read(0, fixed_request(context=context)).traceparent == TRACE
    other = TRACE.replace("0af7", "1bf7")
    assert fixed_reader().read(0, fixed_request(context=context, given={"traceparent": other})).traceparent == other


@pytest.mark.parametrize(
    ("name", "array", "said"),
    [
        ("ids", np.zeros((2, 3), np.int64), r"ids: found int64 \[2, 3\]; allowed: int64 \[samples, 2\]"),
        ("ids", np.zeros((2, 2), np.int32), "ids: found int32"),
        ("ids", np.zeros(2, np.int64), r"ids: found int64 \[2\]"),
        ("dense", np.zeros((3, 3), np.float32), "samples: found {'dense': 3, 'ids': 2}"),
    ],
)
def test_a_wrong_tensor_is_named_with_what_was_found_and_what_is_allowed(name: str, array: NDArray[Any], said: str) -> None:
    request = fixed_request()
    request.arrays[name] = array
    with pytest.raises(LookupRejected, match=said):
        fixed_reader().read(0, request)


def test_a_missing_tensor_is_named() -> None:
    request = fixed_request()
    del request.arrays["ids"]
    with pytest.raises(LookupRejected, match="ids: missing"):
        fixed_reader().read(0, request)


def test_jagged_ids_are_passed_on_as_they_are() -> None:
    model = ModelSpec(
        name="m",
        inputs=(int64("va"), int64("oa"), int64("vb"), int64("ob")),
        features=(jagged_source("a"), jagged_source("b")),
        dense=DenseProgram(file="dense.pt2", inputs=()),
        outputs=output(),
    )
    arrays = {"sparse.lengths": np.array([[[1, 0], [2, 1]]], np.int32), "sparse.values": np.array([[3, 4, 5, 6]])}
    incoming = reader(model, plan("a", "b")).read(0, Request(arrays))
    values, lengths, weights = incoming.part
    assert lengths is not None
    assert (values.tolist(), lengths.tolist(), weights, incoming.samples) == ([3, 4, 5, 6], [1, 0, 2, 1], None, 2)


def mixed() -> Reader:
    """Feature a is a column of a matrix; b and c are jagged, c is weighted and gives its last offset."""
    model = ModelSpec(
        name="m",
        inputs=(
            int64("ids"),
            int64("vb"),
            int64("ob"),
            int64("vc"),
            int64("oc"),
            TensorSpec(name="wc", dtype="float32", shape=(-1,)),
        ),
        features=(
            FeatureSource(feature="a", source=FixedSource(input="ids", begin=0, end=1)),
            jagged_source("b"),
            jagged_source("c", weights=True, last=True),
        ),
        dense=DenseProgram(file="dense.pt2", inputs=("ids", "vb", "ob", "oc")),
        outputs=output(),
    )
    return reader(model, plan("a", "b", "c", weighted=("c",)))


def mixed_arrays() -> dict[str, NDArray[Any]]:
    return {
        "ids": np.array([[7, 8]]),
        "sparse.lengths": np.array([[[0, 2], [1, 1]]], np.int32),
        "sparse.values": np.array([[1, 2, 3, 4]]),
        "sparse.weights": np.array([[9.0, 9.0, 0.5, 0.25]], np.float32),
    }


def test_jagged_features_beside_fixed_ones_become_one_part() -> None:
    incoming = mixed().read(0, Request(mixed_arrays()))
    values, lengths, weights = incoming.part
    assert lengths is not None
    assert weights is not None
    assert values.tolist() == [7, 8, 1, 2, 3, 4]
    assert lengths.tolist() == [1, 1, 0, 2, 1, 1]
    assert weights[-2:].tolist() == [0.5, 0.25]
    assert incoming.inputs["ids"].tolist() == [7, 8]


def test_offsets_for_the_dense_half_count_on_from_request_to_request() -> None:
    taking, requests = mixed(), [mixed_arrays(), mixed_arrays()]
    requests[0]["sparse.lengths"] = np.array([[[1, 0], [2, 1]]], np.int32)
    merged = taking.merged([taking.read(i, Request(arrays)) for i, arrays in enumerate(requests)])
    assert {name: array.tolist() for name, array in merged.items()} == {
        "ids": [7, 8, 7, 8],
        "vb": [1, 1, 2],
        "ob": [0, 1, 1, 1],
        "oc": [0, 2, 3, 4, 5],
    }


def test_features_over_the_same_ids_take_no_others() -> None:
    model = ModelSpec(
        name="m",
        inputs=(int64("va"), int64("oa")),
        features=(jagged_source("a"), jagged_source("a").model_copy(update={"feature": "b"})),
        dense=DenseProgram(file="dense.pt2", inputs=("oa",)),
        outputs=output(),
    )
    taking = reader(model, plan("a", "b"))
    arrays = {"sparse.lengths": np.array([[[1, 1], [1, 1]]], np.int32), "sparse.values": np.array([[3, 4, 3, 4]])}
    assert taking.read(0, Request(arrays)).inputs["oa"].tolist() == [0, 1]
    arrays["sparse.lengths"][0, 1] = [2, 0]
    with pytest.raises(LookupRejected, match=r"sparse.values: found different bags for features over the same ids"):
        taking.read(0, Request(arrays))


@pytest.mark.parametrize(
    ("name", "array", "said"),
    [
        ("sparse.lengths", np.array([[[0, 2], [1, 2]]], np.int32), "sparse.lengths: found a sum of 5"),
        ("sparse.lengths", np.array([[[0, 2], [3, -1]]], np.int32), "sparse.lengths"),
        ("sparse.lengths", np.array([[[0, 2]]], np.int32), r"sparse.lengths: found int32 \[1, 2\]; allowed: int32 \[2, samples\]"),
        ("sparse.weights", np.ones((1, 3), np.float32), r"sparse.weights: found float32 \[3\]; allowed: float32 \[4\]"),
        ("sparse.values", np.ones((2, 4), np.int64), r"sparse.values: found \[2, 4\]; allowed: 1 first"),
        ("ids", np.array([[7, 8, 9]]), "samples: found"),
    ],
)
def test_a_wrong_jagged_tensor_is_named(name: str, array: NDArray[Any], said: str) -> None:
    arrays = mixed_arrays() | {name: array}
    with pytest.raises(LookupRejected, match=said):
        mixed().read(0, Request(arrays))


def test_no_samples_at_all_are_a_request_like_any_other() -> None:
    arrays: dict[str, NDArray[Any]] = {
        "ids": np.zeros((1, 0), np.int64),
        "sparse.lengths": np.zeros((1, 2, 0), np.int32),
        "sparse.values": np.zeros((1, 0), np.int64),
        "sparse.weights": np.zeros((1, 0), np.float32),
    }
    assert mixed().read(0, Request(arrays)).samples == 0


def settings_arguments(kind: str = "CPU", **parameters: str) -> dict[str, str]:
    return {
        "model_name": "m",
        "model_version": "3",
        "model_repository": "/repository/m",
        "model_instance_kind": kind,
        "model_instance_device_id": "1",
        "model_config": json.dumps({"parameters": {k: {"string_value": v} for k, v in parameters.items()}}),
    }


def test_settings_have_defaults_and_find_the_artifact_beside_the_shim() -> None:
    settings = read_settings(settings_arguments())
    assert (settings.artifact, settings.device, settings.parameters.lane) == (Path("/repository/m/3"), "cpu", "auto")


def test_settings_are_decoded_from_strings() -> None:
    settings = read_settings(
        settings_arguments("GPU", deadline_ms="2.5", torch_threads="4", artifact="../a", EXECUTION_ENV_PATH="x")
    )
    assert (settings.device, settings.parameters.deadline_ms, settings.parameters.torch_threads) == ("cuda:1", 2.5, 4)
    assert settings.artifact == Path("/repository/m/3/../a")


def test_etcd_is_named_by_its_endpoints_with_files_beside_the_shim() -> None:
    settings = read_settings(settings_arguments(etcd="a:2379, b:2379", etcd_prefix="/shop", etcd_ca="ca.pem"))
    assert settings.coordination is not None
    assert settings.coordination.etcd == ("a:2379", "b:2379")
    assert settings.coordination.tls is not None
    assert settings.coordination.tls.ca == "/repository/m/3/ca.pem"
    assert read_settings(settings_arguments()).coordination is None


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("lain", "shm", "lain: unknown key"),
        ("spin_us", "1.5", "spin_us: found '1.5'; allowed: a whole number"),
        ("deadline_ms", "-1", "deadline_ms"),
        ("lane", "pigeon", "lane: found 'pigeon'"),
        ("etcd", "h", "etcd: etcd.0: found 'h'"),
        ("etcd", "h:2379", "prefix: found ''"),
        ("etcd_prefix", "/shop", "etcd: missing"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(key: str, value: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_settings(settings_arguments(**{key: value}))


def test_batches_stay_whole_where_the_dense_half_reads_ids_of_bags(tmp_path: Path) -> None:
    model = ModelSpec(
        name="m",
        inputs=(int64("va"), int64("oa")),
        features=(jagged_source("a"),),
        dense=DenseProgram(file="dense.pt2", inputs=("va", "oa")),
        outputs=output(),
    )
    save_plan(plan("a"), tmp_path / PLAN_FILE)
    save_model(model, tmp_path / MODEL_FILE)
    with pytest.raises(ConfigError, match="split_samples: found 64; allowed: 0"):
        Ranker(read_settings(settings_arguments(artifact=str(tmp_path), split_samples="64")), pb_utils=None)


def test_stage_times_are_handed_out_once() -> None:
    times = StageTimes()
    lookup = np.arange(18).reshape(3, 6) * 1000
    for sidecars in (("a", "b"), ("a", "b"), ("c", "b")):  # the plan changes
        times.add(
            requests=3, samples=30, tensors_in_ns=1000, lookup=lookup.copy(), sidecars=sidecars, dense_ns=5000, tensors_out_ns=2000
        )
    times.add_error("REJECTED")
    taken = times.take()
    assert taken["executes", "", ""] == 3
    assert taken["requests", "", ""] == 9
    assert taken["stage_seconds", "dense", ""] == pytest.approx(1.5e-5)
    assert taken["stage_seconds", "merge", ""] == pytest.approx(3 * 2e-6)
    assert taken["sidecar_stage_seconds", "b", "pool"] == pytest.approx(3 * 14e-6)
    assert taken["sidecar_bytes", "a", "response"] == 2 * 11_000
    assert taken["sidecar_bytes", "c", "response"] == 11_000
    assert taken["errors", "REJECTED", ""] == 1
    assert times.take() == {}


@pytest.mark.parametrize("jagged", [False, True])
def test_the_ranker_reads_generated_load_as_the_lookups_that_it_means(tmp_path: Path, jagged: bool) -> None:
    column = FeatureSource(feature="c", source=FixedSource(input="c", begin=0, end=1))
    dense = TensorSpec(name="dense", dtype="float32", shape=(-1, 3))
    inputs = [TensorSpec(name="ids", dtype="int64", shape=(-1, 2))]
    sources = [FeatureSource(feature=f, source=FixedSource(input="ids", begin=i, end=i + 1)) for i, f in enumerate("ab")]
    if jagged:
        inputs = [int64(name) for name in ("va", "oa", "vb", "ob")] + [TensorSpec(name="wa", dtype="float32", shape=(-1,))]
        sources = [jagged_source("a", weights=True), jagged_source("b", last=True)]
    model = ModelSpec(
        name="m",
        inputs=(dense, *inputs, int64("c")),
        features=(*sources, column),
        dense=DenseProgram(file="dense.pt2", inputs=("dense",)),
        outputs=output(),
    )
    its_plan = plan("a", "b", "c", weighted=("a",) if jagged else ())
    save_plan(its_plan, tmp_path / PLAN_FILE)
    save_model(model, tmp_path / MODEL_FILE)
    made = PartitionedModel(tmp_path)
    requests = generated_requests(made, np.array([5, 1, 7]), ids="uniform", ids_per_bag=3)
    for given, samples in zip(requests, (5, 1, 7), strict=True):
        incoming = reader(model, its_plan).read(0, Request(made.triton(given)))
        assert incoming.samples == samples
        for read, meant in zip(incoming.part, made.part(given), strict=True):
            np.testing.assert_array_equal(read, meant)
        assert 0 <= incoming.part[0].min() <= incoming.part[0].max() < 10
        np.testing.assert_array_equal(incoming.inputs["dense"], given["dense"])
    assert len({given["dense"].tobytes() for given in requests}) == 3
