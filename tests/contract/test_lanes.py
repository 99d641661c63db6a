"""Every lane gives what torch gives, refuses what is wrong by name, and goes on with the next lookup."""

from __future__ import annotations

import asyncio
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from lookup_world import Bags, World, expected, random_bags
from numpy.typing import NDArray
from rdma_devices import RANKER_PATH

from sidepool.client import AsyncEmbeddingClient, EmbeddingClient, Pooled
from sidepool.client.lanes import Lane
from sidepool.wire.errors import DeadlineExceeded, LookupRejected, Overloaded, TransportError
from sidepool.wire.model import OutputDtype
from sidepool.wire.plan import Plan

# Sums of a few float32 in another order.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
# Never reached by a healthy lookup, however busy the machine.
PATIENT_MS = 60_000.0


def ask(client: EmbeddingClient, bags: Bags, **options: Any) -> Pooled:
    return client.lookup(bags.values, bags.lengths, bags.weights, deadline_ms=PATIENT_MS, **options)


def assert_answers(world: World, bags: Bags, found: Pooled) -> None:
    pooled, sequences = expected(world.plan, world.rows, bags)
    np.testing.assert_allclose(found.out, pooled, **CLOSE)
    assert found.sequences.keys() == sequences.keys()
    for name, rows in sequences.items():
        np.testing.assert_array_equal(found.sequences[name], rows)
    assert found.degraded == ()


def assert_still_works(client: EmbeddingClient, world: World) -> None:
    bags = random_bags(world.plan, 3, seed=99)
    assert_answers(world, bags, ask(client, bags))


@pytest.mark.parametrize("batch", [1, 2, 7, 64, 300])
def test_pooled_vectors_and_sequences_equal_torchs(client: EmbeddingClient, world: World, batch: int) -> None:
    bags = random_bags(world.plan, batch, seed=batch)
    assert_answers(world, bags, ask(client, bags))


@pytest.mark.parametrize(("dtype", "like"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
@pytest.mark.parametrize("batch", [1, 65])
def test_16_bit_results_are_the_fp32_ones_rounded_and_half_the_bytes(
    client: EmbeddingClient, world: World, dtype: OutputDtype, like: torch.dtype, batch: int
) -> None:
    bags = random_bags(world.plan, batch, seed=batch)
    wanted = client.lookup_parts([bags.part], deadline_ms=PATIENT_MS)
    found = client.lookup_parts([bags.part], output_dtype=dtype, deadline_ms=PATIENT_MS)
    for ours, exact in zip((found.out, *found.sequences), (wanted.out, *wanted.sequences), strict=True):
        assert torch.equal(torch.from_numpy(ours).view(torch.int16), torch.from_numpy(exact).to(like).view(torch.int16))
    wide = np.full((batch, world.plan.out_dim + 2), 7, found.out.dtype)
    into = ask(client, bags, out=wide[:, 1:-1])  # whose dtype says it all
    assert into.out.base is wide
    assert np.array_equal(into.out.view(np.uint16), found.out.view(np.uint16))
    assert (wide[:, [0, -1]] == 7).all()
    with pytest.raises(LookupRejected, match=rf"out: found float32 .*\(output_dtype {dtype}\)"):
        client.lookup_parts([bags.part], wanted.out, output_dtype=dtype)
    for few, many in zip(found.timings.sidecars, wanted.timings.sidecars, strict=True):
        headers_and_padding = 128 + 64 * len(world.plan.features)
        assert few.response_bytes <= many.response_bytes / 2 + headers_and_padding
        assert few.request_bytes == many.request_bytes


def test_refused_parts_and_empty_bags_are_zero_in_16_bits_too(client: EmbeddingClient, world: World) -> None:
    good, bad, empty = (random_bags(world.plan, 2, seed=s, longest=n) for s, n in ((8, 6), (9, 6), (10, 0)))
    bad.values[0] = 1 << 40
    out = np.full((6, world.plan.out_dim), -1, np.float16)
    result = client.lookup_parts([good.part, bad.part, empty.part], out, deadline_ms=PATIENT_MS)
    assert [error is None for error in result.errors] == [True, False, True]
    assert not out[2:].any()
    np.testing.assert_allclose(out[:2], expected(world.plan, world.rows, good)[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("batch", [1, 70])
def test_int32_ids_are_the_same_ids(client: EmbeddingClient, world: World, batch: int) -> None:
    bags = random_bags(world.plan, batch, seed=batch)
    narrow = np.clip(bags.values, -(1 << 31), (1 << 31) - 1).astype(np.int32)  # strays stay outside, on their side
    wide = client.lookup_parts([(narrow.astype(np.int64), *bags.part[1:])], deadline_ms=PATIENT_MS)
    mixed = client.lookup_parts([(narrow, *bags.part[1:]), bags.part, (narrow, *bags.part[1:])], deadline_ms=PATIENT_MS)
    np.testing.assert_array_equal(mixed.out[:batch], wide.out)
    np.testing.assert_array_equal(mixed.out[2 * batch :], wide.out)
    for both, rows in zip(mixed.sequences, wide.sequences, strict=True):
        np.testing.assert_array_equal(both[: len(rows)], rows)
        np.testing.assert_array_equal(both[-len(rows) :], rows)
    ids = np.random.default_rng(batch).integers(0, 6, (batch, len(world.plan.features)))
    weights = np.ones(ids.size, np.float32)
    fixed = [client.lookup_parts([(ids.astype(t), None, weights)], deadline_ms=PATIENT_MS).out for t in (np.int64, np.int32)]
    np.testing.assert_array_equal(*fixed)


def test_a_bad_int32_id_is_named(client: EmbeddingClient) -> None:
    for part in (np.full(10, -3, np.int32), np.ones(10, np.int32)), (np.full((1, 10), -3, np.int32), None):
        result = client.lookup_parts([(*part, ones(10))], deadline_ms=PATIENT_MS)
        assert str(result.errors[0]) == "feature summed, bag 0: id -3 is outside its table; allowed: 0 to 99"


@pytest.mark.parametrize("batch", [0, 1, 5])
def test_bags_without_ids_give_zeros(client: EmbeddingClient, world: World, batch: int) -> None:
    found = ask(client, random_bags(world.plan, batch, seed=1, longest=0))
    assert found.out.shape == (batch, world.plan.out_dim)
    assert not found.out.any()
    assert {name: rows.shape for name, rows in found.sequences.items()} == {"watched": (0, 16), "read": (0, 4)}


@pytest.mark.parametrize("only", range(10))
def test_ids_for_one_feature_alone_leave_the_others_zero(client: EmbeddingClient, world: World, only: int) -> None:
    bags = random_bags(world.plan, 4, seed=only)
    lengths = np.zeros_like(bags.lengths)
    lengths[only] = [2, 0, 1, 3]
    alone = Bags(np.arange(6), lengths, np.full(6, 0.5, np.float32))
    assert_answers(world, alone, ask(client, alone))


def test_an_id_matrix_is_one_id_per_feature_and_sample(client: EmbeddingClient, world: World, served_plan: Plan) -> None:
    ids = np.random.default_rng(5).integers(0, 6, (9, len(world.plan.features)))
    with pytest.raises(LookupRejected, match="weights: missing"):
        client.lookup_fixed(ids, deadline_ms=PATIENT_MS)
    weights = np.ones(ids.size, np.float32)
    same = Bags(ids.T.reshape(-1).copy(), np.ones(ids.T.shape, np.int32), weights)
    (part,) = [(ids, None, weights)]
    result = client.lookup_parts([part], deadline_ms=PATIENT_MS)
    pooled, sequences = expected(world.plan, world.rows, same)
    assert result.errors == [None]
    np.testing.assert_allclose(result.out, pooled, **CLOSE)
    for rows, wanted in zip(result.sequences, sequences.values(), strict=True):
        np.testing.assert_array_equal(rows, wanted)


def test_results_are_written_where_the_caller_says(client: EmbeddingClient, world: World) -> None:
    bags = random_bags(world.plan, 8, seed=3)
    wide = np.full((8, world.plan.out_dim + 20), np.nan, np.float32)
    out = wide[:, 10:-10]
    found = ask(client, bags, out=out)
    assert found.out is out
    assert_answers(world, bags, found)
    assert np.isnan(wide[:, :10]).all()
    assert np.isnan(wide[:, -10:]).all()


def test_read_only_and_narrow_integers_are_taken(client: EmbeddingClient, world: World) -> None:
    bags = random_bags(world.plan, 5, seed=4, stray=False)
    values, lengths = bags.values.astype(np.int32), bags.lengths.astype(np.int64)
    for array in (values, lengths, bags.weights):
        array.flags.writeable = False
    found = client.lookup(values, lengths, bags.weights, deadline_ms=PATIENT_MS)
    assert_answers(world, bags, found)
    frozen = random_bags(world.plan, 5, seed=4)
    for array in (frozen.values, frozen.lengths, frozen.weights):
        array.flags.writeable = False
    assert_answers(world, frozen, ask(client, frozen))


def test_many_parts_are_answered_one_after_another_and_a_bad_one_alone_is_refused(client: EmbeddingClient, world: World) -> None:
    parts = [random_bags(world.plan, batch, seed=20 + batch) for batch in (3, 1, 0, 4, 2)]
    parts[1].values[0] = 100  # outside `plain`
    begin = [0, 3, 4, 4, 8, 10]
    if parts[1].lengths[0].sum() == 0:
        pytest.fail("the seed gives the bad part no id to spoil")
    result = client.lookup_parts([bags.part for bags in parts], deadline_ms=PATIENT_MS)
    assert [type(error) for error in result.errors] == [type(None), LookupRejected, *[type(None)] * 3]
    assert str(result.errors[1]) == "feature summed, bag 0: id 100 is outside its table; allowed: 0 to 99"
    at = [0, 0]
    for i, bags in enumerate(parts):
        found = result.out[begin[i] : begin[i + 1]]
        counts = [int(bags.lengths[3].sum()), int(bags.lengths[9].sum())]
        rows = [result.sequences[s][at[s] : at[s] + counts[s]] for s in (0, 1)]
        at = [at[s] + counts[s] for s in (0, 1)]
        if i == 1:
            assert not found.any()
            assert not any(r.any() for r in rows)
            continue
        assert_answers(world, bags, Pooled(found, {"watched": rows[0], "read": rows[1]}, ()))


@pytest.mark.parametrize("bad", [-1, 100, 1 << 40, -(1 << 63), (1 << 63) - 1])
def test_an_id_outside_its_table_is_named(client: EmbeddingClient, world: World, bad: int) -> None:
    lengths = np.ones((len(world.plan.features), 3), np.int32)
    values = np.zeros(lengths.size, np.int64)
    values[3 + 2] = bad  # feature 1, sample 2
    with pytest.raises(LookupRejected, match=f"feature shared, bag 2: id {bad} is outside its table; allowed: 0 to 99"):
        client.lookup(values, lengths, np.ones(values.size, np.float32), deadline_ms=PATIENT_MS)
    assert_still_works(client, world)


def ones(count: int) -> NDArray[np.float32]:
    return np.ones(count, np.float32)


@pytest.mark.parametrize(
    ("values", "lengths", "weights", "message"),
    [
        (np.zeros(9, np.int64), np.ones(10, np.int32), ones(9), "more than the 9 values given"),
        (np.zeros(11, np.int64), np.ones(10, np.int32), ones(11), "values: 1 of them are not covered by lengths"),
        (np.zeros(9, np.int64), np.array([1] * 9 + [-1]), ones(9), "lengths: feature read, bag 0: found -1; allowed: 0 or more"),
        (np.zeros(10, np.int64), np.ones(10, np.int32), None, "weights: missing"),
        (np.zeros(10, np.int64), np.ones(10, np.int32), ones(9), "weights: found 9; allowed: exactly one per value"),
        (np.zeros(10, np.int64), np.ones(10, np.int32), ones(10) * np.inf, "weights: the weight at position 0 is NaN or infinite"),
        (np.zeros(10), np.ones(10, np.int32), ones(10), r"values: found float64 \[10\]; allowed: int64 or int32"),
        (np.zeros(11, np.int64), np.ones(11, np.int32), ones(11), r"lengths: found shape \[11\]; allowed: \[10, batch\]"),
    ],
)
def test_wrong_bags_are_named_and_the_next_lookup_works(
    client: EmbeddingClient, world: World, values: Any, lengths: Any, weights: Any, message: str
) -> None:
    with pytest.raises(LookupRejected, match=message):
        client.lookup(values, lengths, weights, deadline_ms=PATIENT_MS)
    assert_still_works(client, world)


def test_lengths_of_no_whole_batch_are_refused_as_a_part(client: EmbeddingClient, world: World) -> None:
    good = random_bags(world.plan, 2, seed=8)
    part = (np.zeros(11, np.int64), np.ones(11, np.int32), ones(11))
    result = client.lookup_parts([part, good.part], deadline_ms=PATIENT_MS)
    assert str(result.errors[0]) == "lengths: found 11 entries; allowed: a multiple of the number of features (10)"
    assert result.errors[1] is None
    np.testing.assert_allclose(result.out[1:], expected(world.plan, world.rows, good)[0], **CLOSE)


def test_too_few_columns_are_named(client: EmbeddingClient) -> None:
    with pytest.raises(LookupRejected, match="ids: found 9 columns; allowed: at least 10"):
        client.lookup_fixed(np.zeros((2, 9), np.int64), deadline_ms=PATIENT_MS)


def test_parts_of_a_wrong_dtype_are_named(client: EmbeddingClient) -> None:
    with pytest.raises(LookupRejected, match=r"parts\[0\]\.lengths: found int64 \[10\]; allowed: contiguous int32"):
        client.lookup_parts([(np.zeros(10, np.int64), np.ones(10, np.int64), ones(10))])  # type: ignore[list-item]


def test_a_budget_that_is_too_small_ends_the_lookup_but_not_the_lane(client: EmbeddingClient, world: World, lane: Lane) -> None:
    bags = random_bags(world.plan, 300, seed=6)
    with pytest.raises(DeadlineExceeded, match="deadline_ms: found 0"):
        client.lookup(bags.values, bags.lengths, bags.weights, deadline_ms=0)
    if lane != "local":  # which has nothing to wait for
        with pytest.raises((DeadlineExceeded, Overloaded), match="budget"):
            client.lookup(bags.values, bags.lengths, bags.weights, deadline_ms=0.001)
    assert_still_works(client, world)


def test_a_lookup_larger_than_a_slot_is_cut_into_chunks(client: EmbeddingClient, world: World, lane: Lane) -> None:
    # 211 floats per sample come from the fuller sidecar: 15 MB against slots of 8 MiB.
    bags = random_bags(world.plan, 20_000, seed=7, longest=2, stray=False)
    found = client.lookup_parts([bags.part], deadline_ms=PATIENT_MS)
    pooled, sequences = expected(world.plan, world.rows, bags)
    np.testing.assert_allclose(found.out, pooled, **CLOSE)
    for rows, wanted in zip(found.sequences, sequences.values(), strict=True):
        np.testing.assert_array_equal(rows, wanted)
    assert found.timings.chunks >= (1 if lane == "local" else 2)


def test_timings_say_where_the_time_went(client: EmbeddingClient, world: World, lane: Lane) -> None:
    bags = random_bags(world.plan, 50, seed=9)
    timings = client.lookup_parts([bags.part], deadline_ms=PATIENT_MS).timings
    assert len(timings.sidecars) == (1 if lane == "local" else 2)
    assert 0 < timings.route_ns + timings.wait_ns + timings.merge_ns <= timings.total_ns
    for sidecar in timings.sidecars:
        assert sidecar.pool_ns > 0
        assert min(sidecar.queue_ns, sidecar.lane_out_ns, sidecar.lane_back_ns) >= 0
        assert sidecar.request_bytes > 0
        assert sidecar.response_bytes > 0


def test_many_threads_get_their_own_answers(client: EmbeddingClient, world: World) -> None:
    def look_up(seed: int) -> None:
        bags = random_bags(world.plan, 1 + seed % 40, seed=seed)
        assert_answers(world, bags, ask(client, bags, priority=seed % 3))

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(look_up, seed) for seed in range(200)]:
            done.result()


def test_whatever_its_budget_a_lookup_is_right_or_named_late(client: EmbeddingClient, world: World) -> None:
    budgets_ms = (PATIENT_MS, 0.02, 0.2, 2.0)
    before = client.stats()["statuses"]

    def look_up(seed: int) -> str:
        bags = random_bags(world.plan, 1 + seed % 90, seed=seed)
        try:
            found = client.lookup(bags.values, bags.lengths, bags.weights, deadline_ms=budgets_ms[seed % 4], priority=seed % 3 - 1)
        except (DeadlineExceeded, Overloaded) as e:
            return e.code
        assert_answers(world, bags, found)
        return "OK"

    with ThreadPoolExecutor(8) as pool:
        ends = Counter(pool.map(look_up, range(200)))
    assert ends["OK"] >= 50
    counted = {code: n - before[code] for code, n in client.stats()["statuses"].items() if n != before[code]}
    assert counted == ends
    assert_still_works(client, world)


def test_asyncio_callers_get_the_same(lane: Lane, world: World, served_plan: Plan) -> None:
    async def look_up_together() -> None:
        shards = world.directory if lane == "local" else None
        options = {"lane": lane, "shards_dir": shards, "rdma": RANKER_PATH}
        async with await AsyncEmbeddingClient.connect(served_plan, threads=4, **options) as client:
            many = [random_bags(world.plan, 3, seed=seed) for seed in range(20)]
            found = await asyncio.gather(*(client.lookup(b.values, b.lengths, b.weights, deadline_ms=PATIENT_MS) for b in many))
            for bags, pooled in zip(many, found, strict=True):
                assert_answers(world, bags, pooled)

    asyncio.run(look_up_together())


def test_a_closed_client_says_so(lane: Lane, world: World, served_plan: Plan) -> None:
    shards = world.directory if lane == "local" else None
    client = EmbeddingClient.connect(served_plan, lane=lane, shards_dir=shards, rdma=RANKER_PATH)
    client.close()
    client.close()
    bags = random_bags(world.plan, 2, seed=1)
    with pytest.raises(TransportError, match="not connected"):
        ask(client, bags)
