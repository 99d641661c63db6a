"""Criteo rows: what is read is what was written, wrong lines are named, ids are stable."""

from pathlib import Path

import numpy as np
import pytest
import torch

from sidepool.bench.criteo import MISSING, CriteoRows, generate_rows, multi_hot_ids, read_rows, write_rows
from sidepool.bench.models.dlrm import MLPERF_BAG_IDS, multi_hot, single_id, table_rows
from sidepool.bench.training import train
from sidepool.wire.errors import ConfigError

REAL = Path(__file__).parents[3] / "shared" / "data" / "criteo_7200.tsv"
GOOD = ["1", *map(str, range(13)), *(f"{i:08x}" for i in range(26))]


def write(path: Path, *rows: list[str], end: str = "\n") -> Path:
    path.write_bytes(end.join("\t".join(row) for row in rows).encode() + end.encode())
    return path


def changed(field: int, value: str) -> list[str]:
    return [*GOOD[:field], value, *GOOD[field + 1 :]]


def test_generated_rows_survive_a_round_trip_through_a_file(tmp_path: Path) -> None:
    rows = generate_rows(20_000, seed=3)  # more than one chunk
    write_rows(rows, tmp_path / "rows.tsv")
    read = read_rows(tmp_path / "rows.tsv")
    for name in ("labels", "integers", "categories"):
        np.testing.assert_array_equal(getattr(read, name), getattr(rows, name))


def test_generated_rows_depend_on_the_seed_only() -> None:
    np.testing.assert_array_equal(generate_rows(100, seed=1).categories, generate_rows(100, seed=1).categories)
    assert (generate_rows(100, seed=1).categories != generate_rows(100, seed=2).categories).any()


def test_generated_categories_are_skewed() -> None:
    _, counts = np.unique(generate_rows(10_000).categories[:, 0], return_counts=True)
    assert counts.max() > 20 * np.median(counts)


def test_fields_are_read_by_position_with_missing_ones_marked(tmp_path: Path) -> None:
    row = ["0", "", "-3", *map(str, range(11)), "", "Ff", "a", *["00000000"] * 23]
    rows = read_rows(write(tmp_path / "rows.tsv", GOOD, row, end="\r\n"))
    assert rows.labels.tolist() == [1.0, 0.0]
    assert rows.integers.tolist() == [list(range(13)), [0, -3, *range(11)]]
    assert rows.categories.tolist() == [list(range(26)), [MISSING, 255, 10, *[0] * 23]]
    np.testing.assert_allclose(rows.dense()[0], np.log1p(np.arange(13.0)), rtol=1e-6)
    assert rows.dense()[1, :2].tolist() == [0.0, 0.0]


def test_a_limit_reads_no_further(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.tsv", GOOD, GOOD, ["broken"])
    assert len(read_rows(path, limit=2)) == 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (GOOD[:-1], r"rows.tsv:2: found 39 fields; allowed: 40"),
        ([*GOOD, "x"], r"rows.tsv:2: found 41 fields; allowed: 40"),
        (changed(0, "2"), r"rows.tsv:2: label: found '2'; allowed: 0 or 1"),
        (changed(0, ""), r"rows.tsv:2: label: found ''; allowed: 0 or 1"),
        (changed(3, "1.5"), r"rows.tsv:2: integer 3: found '1.5'; allowed: a 64-bit integer, or empty"),
        (changed(3, "9" * 30), r"rows.tsv:2: integer 3: found '9{30}'; allowed: a 64-bit integer"),
        (changed(14, "xyz"), r"rows.tsv:2: category 1: found 'xyz'; allowed: up to 8 hexadecimal digits"),
        (changed(39, "123456789"), r"rows.tsv:2: category 26: found '123456789'; allowed: up to 8"),
    ],
)
def test_a_malformed_line_is_named_with_what_is_allowed(tmp_path: Path, row: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_rows(write(tmp_path / "rows.tsv", GOOD, row, GOOD))


def test_an_empty_or_absent_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.tsv").write_text("")
    with pytest.raises(ConfigError, match="found no rows"):
        read_rows(tmp_path / "empty.tsv")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_rows(tmp_path / "absent.tsv")


def test_ids_lie_in_their_tables_and_only_missing_categories_get_zero() -> None:
    rows = table_rows(1000)
    data = generate_rows(5000)
    ids = data.ids(rows)
    assert ids.dtype == np.int64
    assert (ids >= 0).all()
    assert (ids < np.asarray(rows)).all()
    np.testing.assert_array_equal(ids == 0, data.categories == MISSING)


def test_ids_are_the_same_on_every_machine() -> None:
    """Golden values: a saved model and later rows must agree on them."""
    data = CriteoRows(np.zeros(1, np.float32), np.zeros((1, 13), np.int64), np.arange(26, dtype=np.int64)[None])
    assert data.ids([200_000] * 26)[0, :4].tolist() == [48076, 186, 16399, 184066]


def test_multi_hot_bags_keep_the_id_first_and_stay_in_range() -> None:
    rows = table_rows(1000)
    ids = generate_rows(500).ids(rows)
    bags = multi_hot_ids(ids, rows)
    for feature, (bag, count) in enumerate(zip(bags, MLPERF_BAG_IDS, strict=True)):
        assert bag.shape == (500, count)
        np.testing.assert_array_equal(bag[:, 0], ids[:, feature])
        assert bag.min() >= 0
        assert bag.max() < rows[feature]
    assert len(np.unique(bags[20][0])) > 50
    for again, bag in zip(multi_hot_ids(ids, rows), bags, strict=True):
        np.testing.assert_array_equal(again, bag)


def test_the_real_rows_are_read() -> None:
    if not REAL.exists():
        pytest.skip(f"{REAL} is absent")
    rows = read_rows(REAL)
    assert len(rows) == 7200
    first = REAL.read_text().splitlines()[0].split("\t")
    assert rows.categories[0, 0] == int(first[14], 16)
    assert rows.integers[0, 4] == int(first[5])


@pytest.mark.parametrize("build", [single_id, multi_hot])
def test_training_lowers_the_loss_of_both_variants(build: type, capsys: pytest.CaptureFixture[str]) -> None:
    model, _ = build(max_rows=500)
    threads = torch.get_num_threads()
    result = train(model, generate_rows(2000), seconds=20)
    assert result.loss_after < result.loss_before
    assert result.steps > 0
    assert f"{result.loss_after:.4f}" in capsys.readouterr().out
    assert not model.training
    assert torch.get_num_threads() == threads
