"""What a caller passes to a lookup is taken as it is meant or refused by name."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

from sidepool.client import arguments
from sidepool.client.trace import parse_traceparent
from sidepool.wire.errors import DeadlineExceeded, LookupRejected
from sidepool.wire.model import OutputDtype

TRACE = "0af7651916cd43dd8448eb211c80319c"
SPAN = "b7ad6b7169203331"


@pytest.mark.parametrize("given", [[1, 2], (1, 2), np.array([1, 0, 2, 0])[::2]])
def test_integers_are_taken_as_contiguous_int64(given: Any) -> None:
    ids = arguments.id_values(given)
    assert (ids.dtype, ids.tolist(), ids.flags.c_contiguous) == (np.int64, [1, 2], True)


@pytest.mark.parametrize("dtype", [np.int64, np.int32])
def test_ids_of_both_widths_are_not_copied(dtype: type) -> None:
    given = np.arange(6, dtype=dtype)
    assert arguments.id_values(given) is given
    assert arguments.id_matrix(given.reshape(2, 3)).base is given
    assert np.shares_memory(arguments.id_values(torch.from_numpy(given)), given)


@pytest.mark.parametrize("empty", [[], np.zeros(0, np.int64)])
def test_no_ids_at_all_are_fine(empty: Any) -> None:
    assert arguments.id_values(empty).shape == (0,)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (np.array([1.0]), r"float64 \[1\]"),
        ([1.5], r"float64 \[1\]"),
        (np.array([True]), r"bool \[1\]"),
        (np.array([1], np.uint64), r"uint64 \[1\]"),
        (np.array(["a"]), r"str32 \[1\]"),
        (np.zeros((2, 3), np.int64), r"int64 \[2, 3\]"),
        (7, r"int64 \[\]"),
    ],
)
def test_anything_but_a_row_of_integers_is_refused_as_values(given: Any, found: str) -> None:
    with pytest.raises(LookupRejected, match=rf"^values: found {found}; allowed: int64 or int32"):
        arguments.id_values(given)


def test_lengths_may_be_flat_or_one_row_per_feature() -> None:
    flat = arguments.bag_lengths(np.arange(6), 2)
    rows = arguments.bag_lengths([[0, 1, 2], [3, 4, 5]], 2)
    assert flat.dtype == rows.dtype == np.int32
    assert flat.tolist() == rows.tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.arange(5), r"lengths: found shape \[5\]; allowed: \[2, batch\]"),
        (np.zeros((3, 2), np.int32), r"lengths: found shape \[3, 2\]"),
        (np.array([1.0, 2.0]), "lengths: found float64"),
        (np.array([0, 1 << 31]), "lengths: found 2147483648"),
        (np.array([0, -(1 << 31) - 1]), "lengths: found .*allowed: a length below"),
    ],
)
def test_lengths_that_are_no_lengths_are_refused(given: Any, message: str) -> None:
    with pytest.raises(LookupRejected, match=message):
        arguments.bag_lengths(given, 2)


def test_weights_are_float32_or_a_list() -> None:
    assert arguments.bag_weights(None) is None
    weights = arguments.bag_weights([0.5, 2])
    assert weights is not None
    assert (weights.dtype, weights.tolist()) == (np.float32, [0.5, 2.0])
    with pytest.raises(LookupRejected, match=r"weights: found float64 \[1\]; allowed: float32"):
        arguments.bag_weights(np.array([0.5]))


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (np.zeros((2, 3)), r"out: found float64 \[2, 3\]; allowed: float32 or float16 or uint16 \[2, 3\]"),
        (np.zeros((2, 4), np.float32), r"out: found float32 \[2, 4\]"),
        (np.zeros((3, 2), np.float32).T, "rows that are not contiguous"),
        (np.broadcast_to(np.float32(0), (2, 3)), "read-only"),
        ([[0.0] * 3] * 2, "out: found list"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused(out: Any, message: str) -> None:
    with pytest.raises(LookupRejected, match=message):
        arguments.output(out, 2, 3)


@pytest.mark.parametrize(("dtype", "made"), [(None, np.float32), ("fp32", np.float32), ("fp16", np.float16), ("bf16", np.uint16)])
def test_a_new_output_is_what_was_asked_for(dtype: OutputDtype | None, made: type) -> None:
    out = arguments.output(None, 2, 3, dtype)
    assert (out.dtype, out.shape) == (made, (2, 3))
    assert arguments.output(out, 2, 3, dtype) is arguments.output(out, 2, 3) is out


def test_an_output_dtype_that_is_none_or_not_the_outputs_is_refused() -> None:
    with pytest.raises(LookupRejected, match="output_dtype: found 'fp8'; allowed: fp32, fp16, bf16"):
        arguments.output(None, 2, 3, "fp8")  # type: ignore[arg-type]
    with pytest.raises(LookupRejected, match=r"out: found float32 \[2, 3\]; allowed: uint16 \(output_dtype bf16\) \[2, 3\]"):
        arguments.output(np.zeros((2, 3), np.float32), 2, 3, "bf16")


def test_an_output_may_be_columns_of_a_wider_array() -> None:
    wide = np.zeros((2, 10), np.float32)
    out = wide[:, 4:7]
    assert arguments.output(out, 2, 3) is out


def test_a_deadline_is_a_positive_number_of_milliseconds() -> None:
    assert arguments.deadline_ns(1.5) == 1_500_000
    for spent in (0, -1, 1e-9):
        with pytest.raises(DeadlineExceeded, match="the budget was spent"):
            arguments.deadline_ns(spent)
    for wrong in (float("nan"), float("inf"), 1e12):
        with pytest.raises(LookupRejected, match="deadline_ms: found"):
            arguments.deadline_ns(wrong)


def test_a_priority_fits_its_field() -> None:
    assert arguments.priority_level(-5) == -5
    with pytest.raises(LookupRejected, match="priority: found 2147483648"):
        arguments.priority_level(1 << 31)


IDS, LENGTHS = np.zeros(3, np.int64), np.zeros(2, np.int32)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([IDS], r"parts\[0\]: found int64 \[3\]; allowed: a tuple"),
        ([(IDS, LENGTHS.astype(np.int64), None)], r"parts\[0\].lengths: found int64 \[2\]; allowed: contiguous int32"),
        ([(IDS, None, None)], r"parts\[0\].values: found int64 \[3\]; allowed: contiguous int64 or int32 with 2 dimensions"),
        ([(IDS, LENGTHS, None), (np.zeros((4, 4), np.int64)[:, ::2], None, None)], r"parts\[1\].values: .* not contiguous"),
        ([(IDS, LENGTHS, [1.0])], r"parts\[0\].weights: found list"),
        ([(IDS, LENGTHS, None)], "parts: incompatible"),
    ],
)
def test_parts_of_wrong_type_are_explained(parts: Any, message: str) -> None:
    assert re.match(message, str(arguments.explain_parts(parts, 2, TypeError("incompatible"))))


def test_a_traceparent_becomes_26_bytes() -> None:
    raw = parse_traceparent(f"00-{TRACE}-{SPAN}-01")
    assert raw == bytes([0]) + bytes.fromhex(TRACE) + bytes.fromhex(SPAN) + bytes([1])
    assert len(raw) == 26


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "nonsense",
        f"00-{TRACE}-{SPAN}",
        f"00-{TRACE}-{SPAN}-01-more",
        f"01-{TRACE}-{SPAN}-01",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f" 00-{TRACE}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-01\n",
    ],
)
def test_a_malformed_traceparent_means_no_trace(text: str | None) -> None:
    assert parse_traceparent(text) == b""
