"""Models from files: saved programs, and models as a Triton repository holds them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sidepool.__main__ import main
from sidepool.client import Pipeline
from sidepool.partition.model_sources import load_source
from sidepool.wire.errors import CutError


class Two(nn.Module):
    """Two tables over ids `[B, 2]`, and numbers `[B, 4]`."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.top = nn.Embedding(5, 4), nn.Embedding(6, 4), nn.Linear(4, 1)

    def forward(self, ids: Tensor, numbers: Tensor) -> Tensor:
        return self.top(self.a(ids[:, 0]) * self.b(ids[:, 1]) + numbers)


MODULE = """
import torch
from torch import nn

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.top = nn.Embedding(5, 4), nn.Embedding(6, 4), nn.Linear(4, 1)

    def forward(self, ids, numbers):
        return self.top(self.a(ids[:, 0]) * self.b(ids[:, 1]) + numbers)
"""
BACKEND = """
import json, os
import torch
import triton_python_backend_utils as pb_utils
from two import Two

class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        self.dtype = pb_utils.triton_string_to_numpy(pb_utils.get_output_config_by_name(config, "score")["data_type"])
        self.model = Two()
        self.model.load_state_dict(torch.load(os.path.join(args["model_repository"], args["model_version"], "weights.pt")))

    def execute(self, requests):
        return [pb_utils.InferenceResponse([]) for _ in requests]
"""
CONFIG = """
name: "two"
backend: "BACKEND"
max_batch_size: 8
input [ { name: "ids" data_type: TYPE_INT64 dims: [ 2 ] }, { name: "numbers" data_type: TYPE_FP32 dims: [ 4 ] } ]
output [ { name: "score" data_type: TYPE_FP32 dims: [ 1 ] } ]
"""


def inputs(batch: int) -> tuple[Tensor, Tensor]:
    return torch.randint(0, 5, (batch, 2)), torch.rand(batch, 4)


def partitions_as(model: nn.Module, source: Path, out: Path) -> None:
    """The command writes an artifact that scores as `model`."""
    assert main(["partition", str(source), "--out", str(out)]) == 0
    with Pipeline.open(out) as pipeline, torch.no_grad():
        for batch in (1, 5):
            given = inputs(batch)
            torch.testing.assert_close(pipeline(*given), model(*given), rtol=1e-5, atol=1e-6)


def test_a_saved_program_is_partitioned(tmp_path: Path) -> None:
    model = Two().eval()
    shapes = ({0: torch.export.Dim("batch")}, {0: torch.export.Dim("batch")})
    torch.export.save(torch.export.export(model, inputs(3), dynamic_shapes=shapes), tmp_path / "two.pt2")
    partitions_as(model, tmp_path / "two.pt2", tmp_path / "out")
    assert load_source(str(tmp_path / "two.pt2"))[2] == "two"


class Sized(Two):
    """Makes a tensor of the batch's size."""

    def forward(self, ids: Tensor, numbers: Tensor) -> Tensor:
        return super().forward(ids, numbers) + torch.arange(ids.shape[0]).unsqueeze(1) * 0


def test_a_saved_program_whose_operators_hold_a_batch_size_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.export.save(torch.export.export(Sized().eval(), inputs(3)), tmp_path / "two.pt2")
    assert main(["partition", str(tmp_path / "two.pt2"), "--out", str(tmp_path / "out")]) != 0
    assert "a size is fixed there as a number" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["two.pt2"]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    root = tmp_path / "repository" / "two"
    (root / "1").mkdir(parents=True)
    return root


@pytest.mark.parametrize("backend", ["pytorch", "python"])
def test_a_model_of_tritons_whose_python_can_be_imported_is_partitioned(
    tmp_path: Path, directory: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "two", raising=False)
    model = Two().eval()
    (directory / "config.pbtxt").write_text(CONFIG.replace("BACKEND", backend))
    (directory / "1" / ("model.py" if backend == "pytorch" else "two.py")).write_text(MODULE)
    torch.save(model.state_dict(), directory / "1" / ("model.pt" if backend == "pytorch" else "weights.pt"))
    if backend == "python":
        (directory / "1" / "model.py").write_text(BACKEND)
    partitions_as(model, directory, tmp_path / "out")
    assert "triton_python_backend_utils" not in sys.modules


@pytest.mark.parametrize(
    ("files", "match"),
    [
        ({}, "config.pbtxt cannot be read"),
        ({"config.pbtxt": "name: 3"}, "config.pbtxt cannot be read"),
        ({"config.pbtxt": CONFIG}, "holds no 1/model.py; allowed: a model whose Python can be imported"),
        ({"config.pbtxt": CONFIG, "1/model.py": "x = 1 / 0"}, "model.py cannot be run: ZeroDivisionError"),
        ({"config.pbtxt": CONFIG, "1/model.py": "x = 1"}, "defines 0 modules of torch; allowed: exactly one"),
        (
            {"config.pbtxt": CONFIG.replace("[ 2 ]", "[ -1 ]"), "1/model.py": MODULE},
            r"ids: found dims \[-1\]; allowed: fixed",
        ),
        ({"config.pbtxt": CONFIG.replace("INT64", "STRING"), "1/model.py": MODULE}, "input ids: found TYPE_STRING; allowed: TYPE_"),
    ],
)
def test_a_directory_that_gives_no_module_is_explained(directory: Path, files: dict[str, str], match: str) -> None:
    for name, text in files.items():
        (directory / name).write_text(text)
    with pytest.raises(CutError, match=match):
        load_source(str(directory))


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04 no program"])
def test_a_file_that_is_no_program_is_explained(tmp_path: Path, content: Any) -> None:
    if content is not None:
        (tmp_path / "m.pt2").write_bytes(content)
    with pytest.raises(CutError, match=r"m.pt2 cannot be loaded"):
        load_source(str(tmp_path / "m.pt2"))
