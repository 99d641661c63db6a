"""Every wrong input that a caller can make gets its own clear error through the real Triton, and the next request works."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from served_dlrm import Served, served

from sidepool.bench.traffic import Arrays, Caller, concurrently, infer_inputs

pytestmark = pytest.mark.triton


@pytest.fixture(scope="module")
def fixed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(jagged=False, directory=tmp_path_factory.mktemp("fixed")) as running:
        yield running


@pytest.fixture(scope="module")
def jagged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(jagged=True, directory=tmp_path_factory.mktemp("jagged")) as running:
        yield running


def without_a_column(arrays: Arrays) -> None:
    arrays["sparse"] = np.ascontiguousarray(arrays["sparse"][:, :25])


def without_an_input(arrays: Arrays) -> None:
    del arrays["sparse"]


def with_an_unknown_input(arrays: Arrays) -> None:
    arrays["other"] = arrays["dense"]


def with_float_ids(arrays: Arrays) -> None:
    arrays["sparse"] = arrays["sparse"].astype(np.float32)


def with_an_id_beyond_its_table(arrays: Arrays) -> None:
    arrays["sparse"][1, 2] = 500


def with_a_negative_id(arrays: Arrays) -> None:
    arrays["sparse"][0, 0] = -1


def without_samples(arrays: Arrays) -> None:
    for name in arrays:
        arrays[name] = arrays[name][:0]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (without_a_column, ["sparse", "25", "26"]),
        (without_an_input, ["sparse"]),
        (with_an_unknown_input, ["other"]),
        (with_float_ids, ["sparse", "FP32", "INT64"]),
        (with_an_id_beyond_its_table, ["[REJECTED]", "sparse.2", "500", "0 to 499"]),
        (with_a_negative_id, ["[REJECTED]", "sparse.0", "-1", "0 to 499"]),
        (without_samples, ["input byte size mismatch", "got 0"]),
    ],
)
def test_a_wrong_fixed_width_request_is_refused_by_name_and_the_next_one_works(
    fixed: Served, spoil: object, said: list[str]
) -> None:
    arrays = fixed.request(4)
    spoil(arrays)  # type: ignore[operator]
    message = fixed.refusal(arrays)
    assert [word for word in said if word not in message] == [], message
    fixed.check_serving()


def longer_than_the_values(arrays: Arrays) -> None:
    arrays["sparse.lengths"][0, 3, 1] += 1


def shorter_than_the_values(arrays: Arrays) -> None:
    arrays["sparse.values"] = np.concatenate([arrays["sparse.values"], [[1]]], axis=1).astype(np.int64)


def with_a_negative_length(arrays: Arrays) -> None:
    arrays["sparse.lengths"][0, 5, 0] = -2


def with_an_id_out_of_its_table(arrays: Arrays) -> None:
    arrays["sparse.values"][0, 0] = 1 << 40


def with_too_few_features(arrays: Arrays) -> None:
    arrays["sparse.lengths"] = np.ascontiguousarray(arrays["sparse.lengths"][:, :25])


def with_fewer_dense_samples(arrays: Arrays) -> None:
    arrays["dense"] = np.ascontiguousarray(arrays["dense"][:, :2])


def with_two_entries_in_the_batch_dimension(arrays: Arrays) -> None:
    for name in arrays:
        arrays[name] = np.concatenate([arrays[name]] * 2)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (longer_than_the_values, ["[REJECTED]", "length"]),
        (shorter_than_the_values, ["[REJECTED]", "values"]),
        (with_a_negative_length, ["[REJECTED]", "-2"]),
        (with_an_id_out_of_its_table, ["[REJECTED]", str(1 << 40), "values_0", "0 to 499"]),
        (with_too_few_features, ["sparse.lengths", "25", "26"]),
        (with_fewer_dense_samples, ["[REJECTED]", "dense", "sparse.lengths", "2", "4"]),
        (with_two_entries_in_the_batch_dimension, ["[REJECTED]", "dense", "1 first"]),
    ],
)
def test_a_wrong_jagged_request_is_refused_by_name_and_the_next_one_works(jagged: Served, spoil: object, said: list[str]) -> None:
    arrays = jagged.request(4)
    spoil(arrays)  # type: ignore[operator]
    message = jagged.refusal(arrays)
    assert [word for word in said if word not in message] == [], message
    jagged.check_serving()


def test_a_jagged_request_without_samples_gets_an_output_without_rows(jagged: Served) -> None:
    assert jagged.infer(jagged.request(0)).shape == (0,)
    jagged.check_serving()


def test_bags_without_ids_score_as_in_torch(jagged: Served) -> None:
    arrays = jagged.request(2)
    arrays["sparse.lengths"][:] = 0
    arrays["sparse.values"] = arrays["sparse.values"][:, :0]
    assert np.isfinite(jagged.infer(arrays)).all()
    jagged.check_serving()


def test_a_million_rows_in_one_request_score_as_in_torch(jagged: Served) -> None:
    arrays = jagged.request(20_000, seed=5)
    assert arrays["sparse.values"].size > 1_000_000
    scores = jagged.infer(arrays, parameters={"deadline_ms": 60_000})
    np.testing.assert_allclose(scores, jagged.expected(20_000, seed=5), atol=1e-5)
    jagged.check_serving()


@pytest.mark.parametrize(
    ("deadline_ms", "code", "said"),
    [(0, "[DEADLINE]", "spent"), (0.001, "[DEADLINE]", ""), ("soon", "[REJECTED]", "soon"), (1e12, "[REJECTED]", "at most")],
)
def test_a_budget_that_cannot_be_kept_or_read_is_answered_so(fixed: Served, deadline_ms: object, code: str, said: str) -> None:
    message = fixed.refusal(fixed.request(4), parameters={"deadline_ms": deadline_ms})
    assert code in message
    assert said in message
    fixed.check_serving()


@pytest.mark.parametrize("variant", ["fixed", "jagged"])
def test_a_wrong_request_does_not_spoil_those_it_is_merged_with(variant: str, request: pytest.FixtureRequest) -> None:
    running: Served = request.getfixturevalue(variant)
    wrong = running.request(3)
    ids = "sparse.values" if running.jagged else "sparse"
    wrong[ids][0, 0] = 10**9
    wrong_inputs = infer_inputs(wrong)
    answers: dict[int, object] = {}

    def send(seed: int, caller: Caller) -> None:
        answers[seed] = caller.infer(infer_inputs(running.request(1 + seed % 7, seed)))

    def send_wrong(caller: Caller) -> None:
        with pytest.raises(Exception, match="REJECTED"):
            caller.infer(wrong_inputs)

    jobs = [job for seed in range(60) for job in (lambda caller, seed=seed: send(seed, caller), send_wrong)]
    callers = [Caller(running.deployment.server.grpc, "dlrm") for _ in range(8)]
    try:
        concurrently(callers, jobs)
    finally:
        for caller in callers:
            caller.close()
    assert len(answers) == 60
    for seed, scores in answers.items():
        np.testing.assert_allclose(scores, running.expected(1 + seed % 7, seed), atol=1e-5)  # type: ignore[arg-type]
