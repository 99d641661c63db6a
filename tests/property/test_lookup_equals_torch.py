"""Whatever the batch, the bags and the ids: a lookup gives what torch's embedding_bag gives."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lookup_world import FEATURES, Bags, World, expected, write_world

from sidepool.client import EmbeddingClient
from sidepool.wire.errors import LookupRejected
from sidepool.wire.plan import OutOfRange

PATIENT_MS = 60_000.0
IDS = st.one_of(st.integers(-2, 120), st.integers(-(1 << 63), (1 << 63) - 1))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def client(world: World) -> Iterator[EmbeddingClient]:
    with EmbeddingClient.connect(world.plan, lane="local", shards_dir=world.directory) as connected:
        yield connected


@st.composite
def parts(draw: st.DrawFn, features: int = len(FEATURES)) -> Bags:
    batch = draw(st.integers(0, 5))
    lengths = np.array(draw(st.lists(st.integers(0, 4), min_size=features * batch, max_size=features * batch)), np.int32)
    count = int(lengths.sum())
    values = np.array(draw(st.lists(IDS, min_size=count, max_size=count)), np.int64)
    weights = np.array(draw(st.lists(st.floats(-8, 8, width=32), min_size=count, max_size=count)), np.float32)
    return Bags(values, lengths.reshape(features, batch), weights)


def first_bad(world: World, bags: Bags) -> tuple[str, int, int] | None:
    """Feature, bag and id of the first id that its table refuses."""
    at = 0
    for feature, table, lengths in zip(world.plan.features, world.plan.feature_tables, bags.lengths, strict=True):
        for bag, length in enumerate(lengths.tolist()):
            for value in bags.values[at : at + length].tolist():
                if table.out_of_range is OutOfRange.ERROR and not 0 <= value < table.rows:
                    return feature.name, bag, value
            at += length
    return None


@settings(max_examples=150, deadline=None)
@given(requests=st.lists(parts(), min_size=1, max_size=4))
def test_every_part_equals_torch_or_is_refused_for_its_first_bad_id(
    world: World, client: EmbeddingClient, requests: list[Bags]
) -> None:
    result = client.lookup_parts([bags.part for bags in requests], deadline_ms=PATIENT_MS)
    row, at = 0, [0, 0]
    for bags, error in zip(requests, result.errors, strict=True):
        batch = bags.lengths.shape[1]
        pooled = result.out[row : row + batch]
        counts = [int(bags.lengths[3].sum()), int(bags.lengths[9].sum())]
        sequences = [result.sequences[s][at[s] : at[s] + counts[s]] for s in (0, 1)]
        row, at = row + batch, [at[s] + counts[s] for s in (0, 1)]
        bad = first_bad(world, bags)
        if bad is not None:
            assert isinstance(error, LookupRejected)
            assert str(error).startswith("feature {}, bag {}: id {} is outside its table".format(*bad))
            assert not pooled.any()
            assert not any(rows.any() for rows in sequences)
            continue
        assert error is None
        wanted, wanted_sequences = expected(world.plan, world.rows, bags)
        np.testing.assert_allclose(pooled, wanted, rtol=1e-5, atol=1e-4)
        for rows, wanted_rows in zip(sequences, wanted_sequences.values(), strict=True):
            np.testing.assert_array_equal(rows, wanted_rows)
    assert row == len(result.out)


@settings(max_examples=150, deadline=None)
@given(bags=parts(), spoil=st.sampled_from(["shorter", "longer", "negative", "extra"]), amount=st.integers(1, 3))
def test_lengths_that_do_not_describe_the_values_never_pass(
    world: World, client: EmbeddingClient, bags: Bags, spoil: str, amount: int
) -> None:
    values, lengths, weights = bags.part
    values = np.clip(values, 0, 5)
    if spoil == "shorter":
        if values.size < amount:
            return
        values, weights = values[:-amount], weights[:-amount]
    elif spoil == "longer":
        values, weights = np.append(values, [0] * amount), np.append(weights, np.ones(amount, np.float32))
    elif lengths.size == 0:
        return
    elif spoil == "negative":
        lengths = lengths.copy()
        lengths[amount] = -amount
    else:
        lengths = np.append(lengths, np.zeros(amount, np.int32))
    result = client.lookup_parts([(values, lengths, weights)], deadline_ms=PATIENT_MS)
    assert isinstance(result.errors[0], LookupRejected)
    assert not result.out.any()
