"""However tables are cut, copied and spread: a lookup gives what one big table gives, by torch."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lookup_world import FEATURES, TABLES, Bags, cut, expected, splitmix64
from numpy.typing import NDArray

from sidepool import _native
from sidepool.client.lanes import LaneOptions, PoolingPlace
from sidepool.wire.plan import OutOfRange, Plan, RowFormat, Shard, SidecarAddress, Table, validate_plan
from sidepool.wire.shard_reader import new_table_set, seal_features

SIDECARS = ("a", "b", "c")
ROWS = {
    t.name: np.random.default_rng(5).standard_normal((t.rows, t.dim)).astype("f2" if t.row_format is RowFormat.FP16 else "f4")
    for t in TABLES
}
PATIENT_NS = 60_000_000_000


@st.composite
def ranges(draw: st.DrawFn, size: int, most: int) -> list[tuple[int, int]]:
    cuts = draw(st.lists(st.integers(1, size - 1), max_size=most - 1, unique=True)) if size > 1 else []
    edges = [0, *sorted(cuts), size]
    return list(pairwise(edges))


@st.composite
def shards_of(draw: st.DrawFn, table: Table, replicas: int) -> list[Shard]:
    shards = []
    for columns in draw(ranges(table.dim, 2)):
        for rows in draw(ranges(table.rows, 4)):
            holders = draw(st.lists(st.sampled_from(SIDECARS), min_size=1, max_size=replicas, unique=True))
            shards += [Shard(table=table.name, sidecar=s, rows=rows, columns=columns) for s in holders]
    return shards


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    replicas = draw(st.integers(1, 2))
    shards = [s for table in TABLES for s in draw(shards_of(table, replicas))]
    plan = Plan(
        epoch=4,
        model="cut",
        tables=TABLES,
        features=FEATURES,
        sidecars=tuple(SidecarAddress(name=n, address=f"127.0.0.1:{i + 1}") for i, n in enumerate(SIDECARS)),
        shards=tuple(draw(st.permutations(shards))),
    )
    validate_plan(plan)
    return plan


@st.composite
def bags(draw: st.DrawFn) -> Bags:
    batch = draw(st.integers(0, 4))
    lengths = np.array(draw(st.lists(st.integers(0, 5), min_size=10 * batch, max_size=10 * batch)), np.int32).reshape(10, batch)
    random = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    values = []
    for feature, of_feature in zip(FEATURES, lengths, strict=True):
        table = next(t for t in TABLES if t.name == feature.table)
        ids = random.integers(0, table.rows, of_feature.sum())
        if table.out_of_range is not OutOfRange.ERROR:
            ids[::3] = random.choice([-1, -(1 << 63), table.rows, (1 << 63) - 1], ids[::3].size)
        elif feature.padding_index is not None:
            ids[1::2] = feature.padding_index
        values.append(ids)
    joined = np.concatenate(values).astype(np.int64)
    return Bags(joined, lengths, random.standard_normal(joined.size).astype(np.float32))


def tables_on(plan: Plan, sidecar: int) -> _native.TableSet:
    tables = new_table_set(plan)
    held = plan.held_by(sidecar)
    for index, shard in held:
        table, split = plan.tables[index], plan.rows_cut(index)
        rows = cut(ROWS[table.name], shard)
        policy, default = ("error", 0) if split else (str(table.out_of_range), table.default_row)
        tables.add_table_array(plan.first_shard[index] + shard.number, rows, policy, default)
    seal_features(tables, plan, {index for index, _ in held})
    return tables


def client(plan: Plan, pooling: PoolingPlace, *, degrade: bool = False) -> _native.LookupClient:
    found = _native.LookupClient(
        epoch=plan.epoch,
        sidecars=len(SIDECARS),
        spin_us=0,
        degrade=degrade,
        rows=np.array([t.rows for t in plan.feature_tables], np.int64),
        dims=np.array([t.dim for t in plan.feature_tables], np.int32),
        poolings=[str(f.pooling) for f in plan.features],
        weighted=[f.weighted for f in plan.features],
        out_of_range=[str(t.out_of_range) for t in plan.feature_tables],
        legs=LaneOptions(lane="tcp").legs(plan),
        default_rows=[t.default_row for t in plan.feature_tables],
        padding=[-1 if f.padding_index is None else f.padding_index for f in plan.features],
        ranker_pooling=pooling == "ranker",
    )
    for sidecar in range(len(SIDECARS)):
        found.attach_local(sidecar, tables_on(plan, sidecar))
    return found


def look_up(
    native: _native.LookupClient, plan: Plan, requests: list[Bags], dtype: type
) -> tuple[NDArray[np.generic], list[NDArray[np.generic]]]:
    batch = sum(r.lengths.shape[1] for r in requests)
    out = np.full((batch, plan.out_dim), 7, dtype)
    sequences = [np.full((sum(int(r.lengths[f].sum()) for r in requests), plan.feature_tables[f].dim), 7, dtype) for f in (3, 9)]
    verdicts, timings = np.zeros((len(requests), 5), np.int64), np.zeros((1 + len(SIDECARS), 6), np.int64)
    status, _ = native.lookup([r.part for r in requests], out, sequences, PATIENT_NS, 0, b"", verdicts, timings)
    assert status == 0
    assert not verdicts[:, 0].any()
    return out, sequences


@pytest.mark.parametrize("pooling", ["sidecar", "ranker"])
@settings(max_examples=80, deadline=None)
@given(plan=plans(), requests=st.lists(bags(), min_size=1, max_size=3))
def test_any_plan_gives_what_one_big_table_gives(pooling: PoolingPlace, plan: Plan, requests: list[Bags]) -> None:
    native = client(plan, pooling)
    found, sequences = look_up(native, plan, requests, np.float32)
    wanted = [expected(plan, ROWS, r) for r in requests]
    np.testing.assert_allclose(found, np.concatenate([pooled for pooled, _ in wanted]), rtol=1e-5, atol=1e-5)
    for rows, name in zip(sequences, ("watched", "read"), strict=True):
        np.testing.assert_array_equal(rows, np.concatenate([of_name[name] for _, of_name in wanted]))
    if any(len(s.sidecars) > 1 for shards in plan.placed_shards for s in shards):
        return  # another replica's partial may be added first: the last bit of fp32 differs
    for dtype, like in ((np.float16, torch.float16), (np.uint16, torch.bfloat16)):
        narrow, narrow_sequences = look_up(native, plan, requests, dtype)
        for ours, exact in zip((narrow, *narrow_sequences), (found, *sequences), strict=True):
            assert torch.equal(torch.from_numpy(ours.view(np.int16)), torch.from_numpy(exact).to(like).view(torch.int16))
    native.close()


def halves() -> Plan:
    """The first half of every table's rows on one sidecar, the second on another."""
    shards = [
        Shard(table=t.name, sidecar=SIDECARS[i], rows=rows, columns=(0, t.dim))
        for t in TABLES
        for i, rows in enumerate([(0, t.rows // 2), (t.rows // 2, t.rows)])
    ]
    addresses = tuple(SidecarAddress(name=n, address=f"127.0.0.1:{i + 1}") for i, n in enumerate(SIDECARS))
    return Plan(epoch=4, model="cut", tables=TABLES, features=FEATURES, sidecars=addresses, shards=tuple(shards))


def in_second_half(table: Table, value: int) -> bool:
    if not 0 <= value < table.rows:
        if table.out_of_range is OutOfRange.ZERO:
            return False
        value = table.default_row if table.out_of_range is OutOfRange.DEFAULT_ROW else splitmix64(value) % table.rows
    return value >= table.rows // 2


@pytest.mark.parametrize("pooling", ["sidecar", "ranker"])
@settings(max_examples=40, deadline=None)
@given(asked=bags())
def test_rows_that_nobody_answers_for_are_as_if_absent_and_their_features_named(pooling: PoolingPlace, asked: Bags) -> None:
    plan = halves()
    native = client(plan, pooling, degrade=True)
    native.detach(1)
    found, sequences = look_up(native, plan, [asked], np.float32)
    owner = np.repeat(np.arange(asked.lengths.size), asked.lengths.reshape(-1))  # the bag of every id
    features = owner // max(1, asked.lengths.shape[1])
    lost = np.array([in_second_half(plan.feature_tables[f], v) for f, v in zip(features, asked.values.tolist(), strict=True)], bool)
    padding = [-1 if f.padding_index is None or str(f.pooling) == "none" else f.padding_index for f in plan.features]
    asked_for = lost & (asked.values != np.array(padding)[features])  # padding is never asked for
    left = np.bincount(owner[~lost], minlength=asked.lengths.size).astype(np.int32).reshape(asked.lengths.shape)
    pooled, _ = expected(plan, ROWS, Bags(asked.values[~lost], left, asked.weights[~lost]))
    np.testing.assert_allclose(found, pooled, rtol=1e-5, atol=1e-5)
    whole = expected(plan, ROWS, asked)[1]
    for rows, (f, name) in zip(sequences, ((3, "watched"), (9, "read")), strict=True):
        np.testing.assert_array_equal(rows, np.where(lost[features == f, None], 0, whole[name]))
    assert native.degraded() == sorted({int(f) for f in features[asked_for]})
    native.close()


@settings(max_examples=40, deadline=None)
@given(plan=plans(), batch=st.integers(1, 5), seed=st.integers(0, 1 << 32))
def test_id_matrices_too(plan: Plan, batch: int, seed: int) -> None:
    ids = np.random.default_rng(seed).integers(0, 6, (batch, len(FEATURES)))
    weights = np.random.default_rng(seed).standard_normal(ids.size).astype(np.float32)
    same = Bags(ids.T.reshape(-1).copy(), np.ones(ids.T.shape, np.int32), weights.reshape(ids.shape).T.reshape(-1).copy())
    native = client(plan, "sidecar")
    out = np.empty((batch, plan.out_dim), np.float32)
    sequences = [np.empty((batch, plan.feature_tables[f].dim), np.float32) for f in (3, 9)]
    verdicts, timings = np.zeros((1, 5), np.int64), np.zeros((1 + len(SIDECARS), 6), np.int64)
    native.lookup([(ids, None, weights)], out, sequences, PATIENT_NS, 0, b"", verdicts, timings)
    pooled, wanted = expected(plan, ROWS, same)
    np.testing.assert_allclose(out, pooled, rtol=1e-5, atol=1e-5)
    for rows, name in zip(sequences, ("watched", "read"), strict=True):
        np.testing.assert_array_equal(rows, wanted[name])
    native.close()
