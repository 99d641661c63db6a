"""`sidepool partition --check`: an artifact is good, or the first thing that is not is named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sidepool.__main__ import main
from sidepool.bench.models.dlrm import multi_hot, single_id
from sidepool.partition import partition_model
from sidepool.wire.plan import RowFormat


class Seconds(nn.Module):
    """Index arithmetic, a padding index, unpooled rows: every way in which a feature gets its ids."""

    def __init__(self) -> None:
        super().__init__()
        self.bag, self.rows = nn.EmbeddingBag(7, 4, mode="mean", padding_idx=2), nn.Embedding(5, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.bag(ids % 7) * self.rows(ids % 5).softmax(1).sum(1)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("check") / "out"
    partition_model(*single_id(max_rows=50), out, name="m")
    return out


@pytest.mark.parametrize("row_format", [None, *RowFormat])
def test_what_was_just_written_is_good_in_every_row_format(tmp_path: Path, row_format: RowFormat | None) -> None:
    example = torch.randint(0, 1000, (4, 3))
    partition_model(Seconds(), example, tmp_path / "out", name="m", row_format=row_format)
    assert main(["partition", "--check", str(tmp_path / "out")]) == 0


def test_bags_are_checked_on_the_examples_and_on_random_inputs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    partition_model(*multi_hot(max_rows=50), tmp_path / "out", name="m")
    assert main(["partition", "--check", str(tmp_path / "out")]) == 0
    assert "26 shards and 2 recorded lookups (8 samples) agree" in capsys.readouterr().out


def flip_a_row(out: Path) -> None:
    shard = next(out.glob("sidecars/sidecar-0/shards/*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)


def record_other(kind: str) -> Callable[[Path], None]:
    def change(out: Path) -> None:
        tensors = load_file(out / "check.safetensors")
        first = min(k for k in tensors if k.startswith(f"1/{kind}/"))
        tensors[first] = tensors[first] + 1
        save_file(tensors, out / "check.safetensors")

    return change


def edit_model(found: str, other: str) -> Callable[[Path], None]:
    def change(out: Path) -> None:
        model = out / "model_repository/m/1/model.yaml"
        assert found in model.read_text()
        model.write_text(model.read_text().replace(found, other))

    return change


def serve_another_plan(out: Path) -> None:
    served = out / "model_repository/m/1/plan.yaml"
    served.write_text(served.read_text().replace("epoch: 1", "epoch: 2"))


def record_nothing(out: Path) -> None:
    save_file({}, out / "check.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_a_row, "CRC-32C of the rows: found"),
        (record_other("lookup"), "feature sparse.0: its lookup differs from what was recorded"),
        (record_other("output"), "output score: every lookup agrees; the dense program differs from what was recorded"),
        (record_nothing, "found nothing recorded"),
        (lambda out: (out / "check.safetensors").unlink(), "check.safetensors: cannot be read"),
        (lambda out: (out / "model_repository/m/1/dense.pt2").write_bytes(b"no"), "dense.pt2: CRC-32C: found"),
        (edit_model("- dense\n", "- dance\n"), "model.yaml: dense.inputs: found 'dance'; allowed: ['dense', 'sparse']"),
        (edit_model("sequences: []", "sequences: [sparse.0]"), "dense.sequences: found ('sparse.0',); allowed: ()"),
        (edit_model("file: dense.pt2", "file: ../dense.pt2"), "dense.file: found '../dense.pt2'"),
        (edit_model("inputs:\n  - dense\n  pooled", "inputs:\n  - sparse\n  pooled"), "does not run on what was recorded: "),
        (serve_another_plan, "1/plan.yaml: found another plan"),
        (lambda out: (out / "plan.yaml").unlink(), "holds no plan.yaml; allowed: a directory that `sidepool partition` wrote"),
    ],
)
def test_what_is_wrong_is_named(
    written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], object], message: str
) -> None:
    shutil.copytree(written, tmp_path / "out")
    damage(tmp_path / "out")
    assert main(["partition", "--check", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["m:f"], ["--out", "o"], ["m:f", "--check", "d"], ["--check", "d", "--calibrate", "f"]])
def test_one_thing_at_a_time_is_asked_for(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["partition", *words]) == 2
    assert "allowed: MODEL with --out DIR, or --check DIR alone" in capsys.readouterr().err
