"""Golden frames hold the wire format: the core reads them as the specification says, and answers in the same layout."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from sidepool import _native

GOLDEN = Path(__file__).parent


def read(name: str) -> bytes:
    return (GOLDEN / f"{name}.bin").read_bytes()


def test_a_fixed_request_is_read_as_specified() -> None:
    frame = _native.inspect_frame(read("request_fixed"))
    assert {k: frame[k] for k in ("kind", "slot", "priority", "lookup_id", "epoch", "budget_ns", "batch", "output_format")} == {
        "kind": "request",
        "slot": 3,
        "priority": 2,
        "lookup_id": 77,
        "epoch": 9,
        "budget_ns": 50_000_000,
        "batch": 2,
        "output_format": "fp32",
    }
    assert frame["trace"].hex() == "000af7651916cd43dd8448eb211c80319cb7ad6b716920333101"
    assert frame["features"] == [
        {"feature": 0, "fixed_length": 1, "lengths": [], "values": [4, 5], "weights": []},
        {"feature": 2, "fixed_length": 2, "lengths": [], "values": [1, 2, 3, 4], "weights": []},
    ]


def test_a_jagged_weighted_request_is_read_as_specified() -> None:
    frame = _native.inspect_frame(read("request_jagged_weighted"))
    assert frame["features"] == [
        {"feature": 1, "fixed_length": -1, "lengths": [2, 0, 1], "values": [10, 11, 12], "weights": [0.5, 1.5, -2.0]},
        {"feature": 5, "fixed_length": -1, "lengths": [0, 0, 0], "values": [], "weights": []},
        {"feature": 7, "fixed_length": -1, "lengths": [1, 1, 1], "values": [-1, 0, 1 << 40], "weights": []},
    ]


def test_entries_of_cut_tables_are_read_as_specified() -> None:
    frame = _native.inspect_frame(read("request_shards"))
    assert frame["features"] == [
        {"feature": 0, "shard": 1, "bags": 2, "partial": True, "fixed_length": -1, "lengths": [2, 1], "values": [0, 1, 4],
         "weights": [1.0, 2.0, 0.5]},
        {"feature": 0, "bags": 1, "rows": True, "fixed_length": 1, "lengths": [], "values": [3], "weights": []},
        {"feature": 1, "bags": 3, "fixed_length": 1, "lengths": [], "values": [2, 0, 1], "weights": []},
    ]  # fmt: skip


def test_partials_and_rows_are_fp32_and_undivided_whatever_was_asked_for() -> None:
    tables = _native.TableSet(9, 3, 2)
    rows = np.arange(5 * 2, dtype=np.float32).reshape(5, 2)
    for table in range(3):
        tables.add_table_array(table, rows + 100 * table, "error", 0)
    tables.add_feature(0, 0, "mean", True, shards=2)
    tables.add_feature(1, 2, "max", False)
    tables.seal()
    server = _native.SidecarServer(engines=1, spin_us=0, max_lanes=1, max_frame_bytes=1 << 20)
    server.publish(tables)
    found = _native.inspect_frame(server.serve(read("request_shards")))
    server.close()
    assert (found["status"], found["count"]) == (0, 3)
    partial, one, pooled = found["payload"][:16], found["payload"][64:72], found["payload"][128:140]
    second = rows + 100
    np.testing.assert_array_equal(np.frombuffer(partial, "f4").reshape(2, 2), [second[0] + 2 * second[1], 0.5 * second[4]])
    np.testing.assert_array_equal(np.frombuffer(one, "f4"), rows[3])
    np.testing.assert_array_equal(np.frombuffer(pooled, "f2").reshape(3, 2), rows[[2, 0, 1]] + 200)


def test_responses_are_read_as_specified() -> None:
    frame = _native.inspect_frame(read("response_two_blocks"))
    assert (frame["status"], frame["first"], frame["count"], frame["last"], frame["lookup_id"]) == (0, 0, 2, True, 77)
    payload = np.frombuffer(frame["payload"], np.float32)
    assert payload[:4].tolist() == [1.0, 2.0, 3.0, 4.0]
    assert payload[16:18].tolist() == [0.5, -0.5]
    assert _native.inspect_frame(read("response_deadline"))["status"] == 3


def test_a_sidecar_answers_a_golden_request_in_the_specified_layout() -> None:
    tables = _native.TableSet(9, 2, 3)
    rows = np.arange(10 * 2, dtype=np.float32).reshape(10, 2)
    for table, feature in ((0, 0), (1, 2)):
        tables.add_table_array(table, rows + 100 * table, "error", 0)
        tables.add_feature(feature, table, "sum", False)
    tables.seal()
    server = _native.SidecarServer(engines=1, spin_us=0, max_lanes=1, max_frame_bytes=1 << 20)
    server.publish(tables)
    answer = server.serve(read("request_fixed"))
    server.close()
    magic, version, kind, flags, frame_bytes, *rest = struct.unpack_from("<IBBHQIiQQIII", answer)
    assert (magic, version, kind, flags, frame_bytes) == (0x31465053, 1, 4, 1, len(answer))
    assert rest == [3, 0, 77, 9, 0, 2, 2]  # slot, status, lookup id, epoch, first, count, batch
    received, began, ready = struct.unpack_from("<QQQ", answer, 80)
    assert received <= began <= ready
    block = np.frombuffer(answer, np.float32, offset=128)
    assert len(block) == 32
    assert block[:4].tolist() == [8.0, 9.0, 10.0, 11.0]  # rows 4 and 5
    assert block[16:20].tolist() == [206.0, 208.0, 214.0, 216.0]  # rows 1 + 2 and 3 + 4 of the second table


def test_a_request_for_16_bit_results_is_answered_in_blocks_of_half_the_bytes() -> None:
    assert _native.inspect_frame(read("request_bf16"))["output_format"] == "bf16"
    tables = _native.TableSet(9, 1, 3)
    tables.add_table_array(0, np.arange(10 * 24, dtype=np.float32).reshape(10, 24), "error", 0)
    tables.add_feature(2, 0, "sum", False)
    tables.seal()
    server = _native.SidecarServer(engines=1, spin_us=0, max_lanes=1, max_frame_bytes=1 << 20)
    server.publish(tables)
    answers = {}
    for output_format in (0, 1, 2):
        frame = bytearray(read("request_bf16"))
        frame[98] = output_format
        answers[output_format] = server.serve(bytes(frame))[128:]
        prepared = _native.PreparedFrames(tables, [bytes(frame)])
        assert prepared.serve(0, 1) == 0
        assert prepared.payload() == answers[output_format]
    server.close()
    sums = np.frombuffer(answers[0], np.float32)[:48]
    assert [len(answers[f]) for f in (0, 1, 2)] == [192, 128, 128]  # 2 bags of 24 values: 192 and 96 bytes, padded to 64
    assert np.array_equal(np.frombuffer(answers[1], np.float16)[:48], sums)  # whole numbers below 2048
    rounded = torch.from_numpy(sums.copy()).bfloat16().view(torch.int16).numpy()
    assert np.array_equal(np.frombuffer(answers[2], np.int16)[:48], rounded)


FIELDS = {
    "magic": (0, "<I", 7),
    "version": (4, "<B", 2),
    "kind": (5, "<B", 9),
    "frame_bytes": (8, "<Q", 1 << 40),
    "batch": (56, "<I", 1 << 25),
    "feature_count": (60, "<I", 1 << 20),
    "value_count": (64, "<Q", 1 << 60),
    "output_format": (98, "<B", 3),
    "entry.fixed_length": (128 + 8, "<i", 50),
    "entry.value_count": (128 + 16, "<Q", 1 << 61),
}


@pytest.mark.parametrize("field", FIELDS)
def test_a_golden_request_with_one_field_changed_is_refused(field: str) -> None:
    offset, layout, value = FIELDS[field]
    frame = bytearray(read("request_fixed"))
    struct.pack_into(layout, frame, offset, value)
    with pytest.raises(_native.NativeError, match="frame"):
        _native.inspect_frame(bytes(frame))


@pytest.mark.parametrize("name", ["request_fixed", "request_jagged_weighted"])
def test_a_truncated_golden_request_is_refused(name: str) -> None:
    frame = read(name)
    for size in range(0, len(frame), 16):
        with pytest.raises(_native.NativeError):
            _native.inspect_frame(frame[:size])
