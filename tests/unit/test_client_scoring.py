"""What `ScoreClient` sends, what it refuses before sending, and which error a failure becomes."""

from __future__ import annotations

import os
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
from tritonclient.utils import InferenceServerException

from sidepool.client.scoring import translate
from sidepool.client.shared_regions import MAX_IDLE_REGIONS, SHM_FOLDER, SharedRegions, Unanswered
from sidepool.client.triton_inputs import ModelInputs, read_model_inputs
from sidepool.wire.errors import (
    ConfigError,
    DeadlineExceeded,
    LookupRejected,
    Overloaded,
    SidepoolError,
    TransportError,
)

DENSE = np.ones((2, 3), np.float32)


def fixed(**changes: Any) -> ModelInputs:
    config = {
        "input": [
            {"name": "dense", "data_type": "TYPE_FP32", "dims": ["3"]},
            {"name": "sparse", "data_type": "TYPE_INT64", "dims": [2]},
        ],
        "output": [{"name": "score"}],
        "max_batch_size": 4,
    }
    return read_model_inputs({**config, **changes}, ("user", "item"))


def jagged(weighted: bool = False) -> ModelInputs:
    inputs = [
        {"name": "dense", "data_type": "TYPE_FP32", "dims": [-1, 3]},
        {"name": "sparse.lengths", "data_type": "TYPE_INT32", "dims": [2, -1]},
        {"name": "sparse.values", "data_type": "TYPE_INT64", "dims": [-1]},
    ]
    if weighted:
        inputs.append({"name": "sparse.weights", "data_type": "TYPE_FP32", "dims": [-1]})
    return read_model_inputs({"input": inputs, "output": [{"name": "score"}], "max_batch_size": 64}, ("user", "item"))


def test_jagged_features_go_by_the_models_names_and_never_in_another_order() -> None:
    config = {
        "input": [
            {"name": "sparse.lengths", "data_type": "TYPE_INT32", "dims": [2, -1]},
            {"name": "sparse.values", "data_type": "TYPE_INT64", "dims": [-1]},
        ],
        "output": [{"name": "score"}],
        "parameters": {"features": {"string_value": "user,item"}},
    }
    by_name = {"item": [np.array([7, 8])], "user": [np.array([5])]}
    sent = read_model_inputs(config, ()).encode({"sparse": by_name})
    assert sent["sparse.values"].tolist() == [[5, 7, 8]]
    with pytest.raises(ConfigError, match="features: found the order item, user; allowed: the model's, user,item"):
        read_model_inputs(config, ("item", "user"))
    assert read_model_inputs(config, ("buyer", "thing")).features == ("buyer", "thing")


def test_fixed_width_matrices_are_sent_as_they_are() -> None:
    sparse = np.array([[1, 2], [3, 4]])
    sent = fixed().encode({"dense": DENSE, "sparse": sparse})
    assert sent["dense"] is DENSE
    assert sent["sparse"] is sparse


def test_columns_per_feature_become_a_matrix() -> None:
    by_name = {"item": np.array([2, 4], np.int32), "user": np.array([1, 3])}
    in_order = [np.array([1, 3]), np.array([2, 4])]
    for given in (by_name, in_order):
        sent = fixed().encode({"dense": DENSE, "sparse": given})
        assert sent["sparse"].dtype == np.int64
        assert sent["sparse"].tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize("wide", [-(2**63), 2**31, -(2**31) - 1])
def test_ids_that_a_narrower_input_cannot_hold_are_named(wide: int) -> None:
    narrow = fixed(input=[{"name": "ids", "data_type": "TYPE_INT32", "dims": [1]}])
    with pytest.raises(LookupRejected, match=f"ids: found {min(wide, 0)} to {max(wide, 0)}; allowed: what fits int32"):
        narrow.encode({"ids": np.array([[0], [wide]])})
    edges = np.array([[-(2**31)], [2**31 - 1]])
    assert narrow.encode({"ids": edges})["ids"].tolist() == edges.tolist()


def test_a_pair_of_values_and_lengths_is_one_request() -> None:
    values, lengths = np.array([1, 2, 3]), np.array([[1, 0], [0, 2]])
    sent = jagged().encode({"dense": DENSE, "sparse": (values, lengths)})
    assert {name: (array.dtype.name, array.shape) for name, array in sent.items()} == {
        "dense": ("float32", (1, 2, 3)),
        "sparse.lengths": ("int32", (1, 2, 2)),
        "sparse.values": ("int64", (1, 3)),
    }
    assert sent["sparse.lengths"].tolist() == [[[1, 0], [0, 2]]]


def test_bags_per_feature_become_values_and_lengths() -> None:
    user = [np.array([7, 8]), np.array([], np.int64)]
    item = np.array([5, 6])
    for given in ([user, item], {"user": user, "item": item}):
        sent = jagged().encode({"dense": DENSE, "sparse": given})
        assert sent["sparse.values"].tolist() == [[7, 8, 5, 6]]
        assert sent["sparse.lengths"].tolist() == [[[2, 0], [1, 1]]]


def test_the_raw_tensors_may_be_given_by_name() -> None:
    given = {"dense": DENSE, "sparse.values": np.array([1]), "sparse.lengths": np.array([[1, 0], [0, 0]], np.int32)}
    assert jagged().encode(given)["sparse.values"].tolist() == [[1]]


def test_weights_come_third() -> None:
    sent = jagged(weighted=True).encode({"dense": DENSE, "sparse": ([1], [[1, 0], [0, 0]], np.array([0.5], np.float32))})
    assert sent["sparse.weights"].tolist() == [[0.5]]


IDS, TWO, THREE = np.ones((2, 2), np.int64), np.ones(2, np.int64), np.ones(3, np.int64)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dense": DENSE}, r"^sparse: missing; found \['dense'\]; allowed: dense, sparse"),
        ({"dense": DENSE, "sparse": IDS, "x": 1}, "^x: not an input of the model"),
        ({"dense": DENSE.astype(np.float64), "sparse": IDS}, r"^dense: found float64 \[2, 3\]; allowed: float32"),
        ({"dense": DENSE, "sparse": np.ones((2, 2))}, "^sparse: found float64"),
        ({"dense": DENSE, "sparse": np.ones((2, 3), np.int64)}, r"^sparse: found int64 \[2, 3\]; allowed: int64 \[-1, 2\]"),
        ({"dense": DENSE, "sparse": np.ones((3, 2), np.int64)}, r"^batch: found \{'dense': 2, 'sparse': 3\} samples"),
        ({"dense": DENSE, "sparse": [TWO]}, "^sparse: found 1 arrays; allowed: one array per feature, 2"),
        ({"dense": DENSE, "sparse": {"user": TWO}}, r"^sparse\[item\]: missing; found \['user'\]"),
        ({"dense": DENSE, "sparse": {"user": TWO, "item": TWO, "ad": TWO}}, r"^sparse\[ad\]: not a feature"),
        ({"dense": DENSE, "sparse": {"user": TWO, "item": THREE}}, r"^sparse: found columns of \[2, 3\]"),
        ({"dense": DENSE, "sparse": {"user": np.ones(2), "item": TWO}}, r"^sparse\[user\]: found float64"),
        ({"dense": DENSE[:0], "sparse": IDS[:0]}, "^batch: found 0 samples; allowed: at least 1 and at most 4"),
        ({"dense": np.ones((5, 3), np.float32), "sparse": np.ones((5, 2), np.int64)}, "^batch: found 5 samples"),
    ],
)
def test_fixed_width_inputs_that_do_not_fit_are_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(LookupRejected, match=message):
        fixed().encode(given)


@pytest.mark.parametrize(
    ("sparse", "message"),
    [
        (([1, 2], [[1, 0], [0, 0]]), r"^sparse\.lengths: they add up to 1; allowed: 2"),
        (([1], [[2, 0], [0, -1]]), r"^sparse\.lengths: found -1; allowed: 0 or more"),
        (([1], [[1, 0, 0], [0, 0, 0]]), r"^batch: found .*'sparse\.lengths': 3"),
        (([1], [1, 0, 0]), r"^sparse\.lengths: found shape \[3\]"),
        ((np.array([1.0]), [[1, 0], [0, 0]]), r"^sparse\.values: found float64"),
        (([1], [[1, 0], [0, 0]], np.ones(1, np.float32)), r"^sparse\.weights: found weights; allowed: none"),
        (([1],), "^sparse: found a tuple of 1"),
        ([[np.array([1])] * 2, [np.array([1])] * 3], r"^sparse: found features with \[2, 3\] samples"),
    ],
)
def test_jagged_inputs_that_do_not_fit_are_named(sparse: Any, message: str) -> None:
    with pytest.raises(LookupRejected, match=message):
        jagged().encode({"dense": DENSE, "sparse": sparse})


def test_missing_and_miscounted_weights_are_named() -> None:
    with pytest.raises(LookupRejected, match=r"sparse\.weights: missing"):
        jagged(weighted=True).encode({"dense": DENSE, "sparse": ([1], [[1, 0], [0, 0]])})
    with pytest.raises(LookupRejected, match=r"sparse\.weights: found 2; allowed: 1"):
        jagged(weighted=True).encode({"dense": DENSE, "sparse": ([1], [[1, 0], [0, 0]], np.ones(2, np.float32))})


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (
            InferenceServerException("[REJECTED] id 9 is too large", "StatusCode.INVALID_ARGUMENT"),
            LookupRejected,
            "^id 9 is too large$",
        ),
        (InferenceServerException("[request id: 7] [OVERLOADED] no credit", "StatusCode.INTERNAL"), Overloaded, "^no credit$"),
        (InferenceServerException("[DEADLINE] late", "500"), DeadlineExceeded, "^late$"),
        (InferenceServerException("[INTERNAL] defect", "500"), SidepoolError, "^defect$"),
        (InferenceServerException("Deadline Exceeded", "StatusCode.DEADLINE_EXCEEDED"), DeadlineExceeded, "^here: Deadline"),
        (InferenceServerException("Request timeout expired", "StatusCode.UNAVAILABLE"), DeadlineExceeded, "expired"),
        (InferenceServerException("Exceeds maximum queue size", "StatusCode.UNAVAILABLE"), Overloaded, "queue"),
        (InferenceServerException("failed to connect", "StatusCode.UNAVAILABLE"), TransportError, "connect"),
        (InferenceServerException("unexpected shape for input", "400"), LookupRejected, "shape"),
        (InferenceServerException("unknown model", "StatusCode.NOT_FOUND"), ConfigError, "unknown model"),
        (InferenceServerException("boom"), SidepoolError, "boom"),
        (TimeoutError("timed out"), DeadlineExceeded, "timed out"),
        (ConnectionRefusedError("refused"), TransportError, "refused"),
    ],
)
def test_failures_become_the_error_that_their_code_or_status_names(
    error: Exception, kind: type[SidepoolError], message: str
) -> None:
    translated = translate(error, "here")
    assert type(translated) is kind
    with pytest.raises(kind, match=message):
        raise translated


class Registry:
    """What Triton does with system shared memory: map it by name at registration, forget it when told."""

    def __init__(self) -> None:
        self.mapped: dict[str, bytes] = {}
        self.refuse = False

    def register_system_shared_memory(self, name: str, key: str, size: int) -> None:
        if self.refuse:
            raise InferenceServerException("failed to open shared memory region", "400")
        assert os.stat(SHM_FOLDER + key).st_size == size
        self.mapped[name] = b""

    def unregister_system_shared_memory(self, name: str) -> None:
        del self.mapped[name]


def test_a_region_holds_the_tensors_and_leaves_no_file() -> None:
    registry, before = Registry(), set(os.listdir(SHM_FOLDER))
    regions = SharedRegions(lambda: registry)
    tensors = {"a": np.arange(5, dtype=np.int64), "b": np.ones((3, 7), np.float32)}
    with regions.borrow(tensors) as region:
        assert region is not None
        assert set(os.listdir(SHM_FOLDER)) <= before
        for name, (at, size) in region.write(tensors).items():
            assert at % 64 == 0
            assert region.memory[at : at + size] == tensors[name].tobytes()
        assert list(registry.mapped) == [region.name]
    regions.close()
    assert registry.mapped == {}


def test_a_returned_region_is_used_again_and_surplus_ones_are_dropped() -> None:
    registry = Registry()
    regions = SharedRegions(lambda: registry)
    tensors = {"a": np.zeros(1000, np.int64)}
    for _ in range(3):
        with regions.borrow(tensors):
            pass
    assert len(registry.mapped) == 1
    open_regions = [regions.borrow(tensors) for _ in range(MAX_IDLE_REGIONS + 3)]
    for borrowed in open_regions:
        borrowed.__enter__()
    for borrowed in open_regions:
        borrowed.__exit__(None, None, None)
    assert len(registry.mapped) == MAX_IDLE_REGIONS
    regions.close()


def test_a_region_whose_answer_is_late_is_nobody_elses_until_it_has_come() -> None:
    regions, tensors, answer = SharedRegions(Registry), {"a": np.zeros(10)}, Future[Any]()
    with pytest.raises(DeadlineExceeded), regions.borrow(tensors) as late:
        raise Unanswered("no answer within 1 ms", answer)
    with regions.borrow(tensors) as other:
        assert other is not late
    answer.set_exception(TimeoutError())
    with regions.borrow(tensors) as one, regions.borrow(tensors) as two:
        assert late in (one, two)
    regions.close()


def test_a_triton_that_cannot_map_a_region_is_not_asked_again(caplog: pytest.LogCaptureFixture) -> None:
    registry = Registry()
    registry.refuse = True
    before = set(os.listdir(SHM_FOLDER))
    regions = SharedRegions(lambda: registry)
    for _ in range(2):
        with regions.borrow({"a": np.zeros(10)}) as region:
            assert region is None
    assert not regions.usable
    assert [r.message for r in caplog.records if "shared memory" in r.message] == [
        "large requests go without shared memory: [400] failed to open shared memory region"
    ]
    assert set(os.listdir(SHM_FOLDER)) <= before
