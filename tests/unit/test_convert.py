"""`sidepool convert` takes the tables of existing checkpoints bit by bit, or says what is wrong with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from artifact_oracle import served
from fbgemm import ComputeDevice, EmbeddingLocation, SplitTableBatchedEmbeddingBagsCodegen, needs_fbgemm
from numpy.typing import NDArray

from sidepool.__main__ import main
from sidepool.partition import convert, hps, shard_writer
from sidepool.partition.checkpoints import open_checkpoint
from sidepool.wire.errors import CutError, PlanError, ShardCorrupt
from sidepool.wire.plan import load_plan

ROWS = np.random.default_rng(5).standard_normal((50, 6), dtype=np.float32)


def write_hps(directory: Path, rows: NDArray[np.float32] = ROWS, keys: NDArray[np.int64] | None = None) -> Path:
    directory.mkdir(parents=True)
    (np.arange(len(rows)) if keys is None else keys).astype("<i8").tofile(directory / "key")
    rows.tofile(directory / "emb_vector")
    return directory


def test_an_hps_table_whose_keys_are_in_order_is_taken_as_it_is(tmp_path: Path) -> None:
    source = write_hps(tmp_path / "users")
    convert.convert([source], tmp_path / "out", name="m")
    found = served(tmp_path / "out")
    assert list(found) == ["users"]
    np.testing.assert_array_equal(found["users"], ROWS)


def test_the_rows_of_permuted_keys_go_where_their_keys_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hps, "CHUNK_KEYS", 7)
    monkeypatch.setattr(shard_writer, "CHUNK_BYTES", 6 * 4 * 9)
    keys = np.random.default_rng(1).permutation(50)
    source = write_hps(tmp_path / "users", ROWS[keys], keys)
    convert.convert([source], tmp_path / "out", name="m")
    np.testing.assert_array_equal(served(tmp_path / "out")["users"], ROWS)


def test_a_directory_of_hps_tables_is_spread_over_sidecars(tmp_path: Path) -> None:
    for i in range(3):
        write_hps(tmp_path / "model" / f"sparse{i}.model", ROWS + i)
    plan = convert.convert([tmp_path / "model"], tmp_path / "out", name="m", sidecars=2).plan
    assert sorted(set(sum(plan.sidecars_of_table, ()))) == [0, 1]
    found = served(tmp_path / "out")
    for i in range(3):
        np.testing.assert_array_equal(found[f"sparse{i}.model"], ROWS + np.float32(i))


def test_rows_are_rounded_to_half_precision_when_asked(tmp_path: Path) -> None:
    convert.convert([write_hps(tmp_path / "users")], tmp_path / "out", name="m", row_format=convert.RowFormat.FP16)
    np.testing.assert_array_equal(served(tmp_path / "out")["users"], ROWS.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (np.array([*range(49), 100]), r"key: key 100 at position 49; allowed for 50 keys: 0 to 99, each once: ids are row numbers"),
        (np.array([-1, *range(1, 50)]), "key -1 at position 0"),
        (np.array([1, *range(1, 50)]), "key 1 appears twice"),
    ],
)
def test_keys_that_are_no_row_numbers_are_refused(tmp_path: Path, keys: NDArray[np.int64], message: str) -> None:
    with pytest.raises(CutError, match=message):
        convert.convert([write_hps(tmp_path / "users", keys=keys)], tmp_path / "out", name="m")
    assert not (tmp_path / "out").exists()


def test_rows_of_absent_keys_are_zero_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = np.random.default_rng(2).permutation(99)[:50]
    keys[7] = 99
    source = write_hps(tmp_path / "users", keys=keys)
    assert main(["convert", str(source), "--out", str(tmp_path / "out")]) == 0
    assert "users: [100, 6] fp32" in (said := capsys.readouterr().out)
    assert "50 rows without a key are zero" in said
    expected = np.zeros((100, 6), np.float32)
    expected[keys] = ROWS
    np.testing.assert_array_equal(served(tmp_path / "out")["users"], expected)


@pytest.mark.parametrize(("file", "cut"), [("key", 3), ("key", 8), ("emb_vector", 2), ("emb_vector", 4), ("emb_vector", 1200)])
def test_a_truncated_hps_file_is_named(tmp_path: Path, file: str, cut: int) -> None:
    source = write_hps(tmp_path / "users")
    (source / file).write_bytes((source / file).read_bytes()[:-cut])
    with pytest.raises(ShardCorrupt, match=r"users/(key|emb_vector): tensor '(key|emb_vector)': found \d+ bytes"):
        open_checkpoint(source)


def test_an_hps_table_without_its_rows_is_named(tmp_path: Path) -> None:
    source = write_hps(tmp_path / "users")
    (source / "emb_vector").unlink()
    with pytest.raises(ShardCorrupt, match=r"emb_vector: tensor 'emb_vector': cannot be read"):
        open_checkpoint(source)


def save(path: Path, state: Any) -> Path:
    torch.save(state, path)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_tables_of_a_torchrec_state_dict_are_taken_and_dense_layers_are_not(tmp_path: Path, dtype: torch.dtype) -> None:
    users, items = torch.from_numpy(ROWS).to(dtype), torch.arange(12).view(4, 3).to(dtype)
    state = {
        "sparse_arch.ebc.embedding_bags.t_users.weight": users,
        "sparse_arch.ec.embeddings.t_items.weight": items,
        "over_arch.model.0.weight": torch.ones(3, 3),
    }
    convert.convert([save(tmp_path / "model.pt", {"state_dict": state})], tmp_path / "out", name="m")
    found = served(tmp_path / "out")
    assert sorted(found) == ["t_items", "t_users"]
    np.testing.assert_array_equal(found["t_users"], users.float().numpy())
    np.testing.assert_array_equal(found["t_items"], items.float().numpy())


@needs_fbgemm
def test_the_flat_weights_of_fbgemm_are_split_into_its_tables(tmp_path: Path) -> None:
    specs = [(rows, dim, EmbeddingLocation.HOST, ComputeDevice.CPU) for rows, dim in ((50, 8), (7, 16))]
    # The third feature shares the first table.
    module = SplitTableBatchedEmbeddingBagsCodegen(specs, feature_table_map=[0, 1, 1])
    for weight in (expected := module.split_embedding_weights()):
        weight.uniform_(-1, 1)
    path = save(tmp_path / "model.pt", {f"emb.{key}": value for key, value in module.state_dict().items()})
    convert.convert([path], tmp_path / "out", name="m")
    found = served(tmp_path / "out")
    assert list(found) == ["emb.table_0", "emb.table_1"]
    for rows, weight in zip(found.values(), expected, strict=True):
        np.testing.assert_array_equal(rows, weight.detach().numpy())


def test_flat_weights_that_are_too_short_are_named(tmp_path: Path) -> None:
    state = {
        "weights_host": torch.zeros(39),
        "weights_offsets": torch.tensor([0]),
        "rows_per_table": torch.tensor([10]),
        "D_offsets": torch.tensor([0, 4]),
    }
    with pytest.raises(ShardCorrupt, match=r"model\.pt: tensor 'weights_host': table 0: \[10, 4\] at 0 of 39 values"):
        open_checkpoint(save(tmp_path / "model.pt", state))


def test_a_truncated_torch_file_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "model.pt", {"embedding_bags.t.weight": torch.from_numpy(ROWS)})
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ShardCorrupt, match=r"model\.pt: tensor \(none could be read\): not a whole file of torch\.save"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        ([1, 2], CutError, "found a list; allowed: a state dict"),
        ({"fc.weight": torch.ones(2, 2)}, CutError, "none of its 1 entries is a table"),
        (
            {"embedding_bags.t.weight": torch.ones(3)},
            ShardCorrupt,
            r"tensor 'embedding_bags\.t\.weight': found torch\.float32 \[3\]",
        ),
        ({"embedding_bags.t.weight": torch.ones(3, 2).int()}, ShardCorrupt, "found torch.int32"),
        (
            {"a.embeddings.t.weight": torch.ones(3, 2), "b.embeddings.t.weight": torch.ones(3, 2)},
            CutError,
            "table 't' appears as 'a.embeddings.t.weight' and as 'b.embeddings.t.weight'",
        ),
    ],
)
def test_a_state_dict_that_holds_no_plain_tables_is_refused(tmp_path: Path, state: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        open_checkpoint(save(tmp_path / "model.pt", state))


def test_a_directory_without_tables_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CutError, match="no directory with the files 'key' and 'emb_vector'"):
        open_checkpoint(tmp_path)


def test_rows_that_are_not_finite_are_refused_and_nothing_is_left(tmp_path: Path) -> None:
    rows = ROWS.copy()
    rows[17, 2] = np.inf
    with pytest.raises(CutError, match="table users: row 17 holds NaN or infinity as fp32"):
        convert.convert([write_hps(tmp_path / "users", rows)], tmp_path / "out", name="m")
    assert [p.name for p in tmp_path.iterdir()] == ["users"]


def test_two_tables_of_one_name_are_refused(tmp_path: Path) -> None:
    sources = [write_hps(tmp_path / side / "users") for side in ("a", "b")]
    with pytest.raises(PlanError, match="'users' appears more than once"):
        convert.convert(sources, tmp_path / "out", name="m")


def test_progress_counts_every_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_writer, "CHUNK_BYTES", 6 * 4 * 20)
    steps: list[tuple[int, int]] = []
    source = write_hps(tmp_path / "users")
    convert.convert([source], tmp_path / "out", name="m", progress=lambda done, total: steps.append((done, total)))
    assert steps == [(480, 1200), (960, 1200), (1200, 1200)]


def test_the_command_writes_what_a_sidecar_can_serve(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_hps(tmp_path / "users")
    assert main(["convert", str(source), "--out", str(tmp_path / "out"), "--pooling", "mean", "--epoch", "4"]) == 0
    assert "users: [50, 6] fp32" in capsys.readouterr().out
    plan = load_plan(tmp_path / "out" / "plan.yaml")
    assert (plan.model, plan.epoch, plan.features[0].pooling) == ("out", 4, "mean")
    np.testing.assert_array_equal(served(tmp_path / "out")["users"], ROWS)
