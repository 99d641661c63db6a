"""`sidepool partition` from the shell: where the model comes from, and what is said when it does not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sidepool.__main__ import main
from sidepool.partition.model_sources import load_source
from sidepool.wire.errors import CutError
from sidepool.wire.plan import load_plan

MODEL = """
import torch
from torch import nn

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Embedding(5, 2), nn.Embedding(6, 2)

    def forward(self, ids):
        return self.a(ids[:, 0]) * self.b(ids[:, 1])

def good():
    return Two(), (torch.ones(3, 2, dtype=torch.int64),)

def bad():
    raise ValueError("no weights here")

def alone():
    return Two()

def swapped():
    return (torch.ones(3),), Two()

number = 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "two_tables.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "two_tables", raising=False)
    return tmp_path


@pytest.mark.parametrize("source", ["two_tables:good", "two_tables.py:good"])
def test_a_module_or_a_file_in_the_current_directory_is_partitioned(
    folder: Path, source: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "partition",
        source,
        "--out",
        "out",
        "--name",
        "two",
        "--address",
        "10.0.0.1:9",
        "--address",
        "10.0.0.2:9",
        "--epoch",
        "4",
    ]
    assert main([*words, "--lane", "tcp", "--max-batch", "32", "--row-format", "fp16"]) == 0
    plan = load_plan(folder / "out" / "plan.yaml")
    assert (plan.model, plan.epoch, [s.address for s in plan.sidecars]) == ("two", 4, ["10.0.0.1:9", "10.0.0.2:9"])
    assert {t.row_format for t in plan.tables} == {"fp16"}
    text = (folder / "out/model_repository/two/config.pbtxt").read_text()
    assert "max_batch_size: 32" in text
    assert 'string_value: "tcp"' in text
    assert "written to out" in capsys.readouterr().out


def test_the_name_is_the_functions_by_default(folder: Path) -> None:
    assert main(["partition", "two_tables:good", "--out", "out"]) == 0
    assert load_plan(folder / "out" / "plan.yaml").model == "good"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("two_tables", "source: found 'two_tables'; allowed: MODULE:FUNCTION, FILE.py:FUNCTION, FILE.pt2 or a directory"),
        ("two_tables:", "allowed: MODULE:FUNCTION"),
        ("absent_module:good", "absent_module cannot be imported: ModuleNotFoundError"),
        ("absent.py:good", "found 'absent.py'; allowed: an importable module or an existing .py file"),
        ("two_tables:absent", "two_tables has no function 'absent'"),
        ("two_tables:number", "two_tables has no function 'number'"),
        ("two_tables:bad", "two_tables:bad failed: ValueError: no weights here"),
        ("two_tables:alone", "two_tables:alone returned Two; allowed: a tuple"),
        ("two_tables:swapped", r"returned \(tuple, Two\); allowed: a tuple"),
    ],
)
def test_a_source_that_gives_no_model_is_explained(folder: Path, source: str, message: str) -> None:
    with pytest.raises(CutError, match=message):
        load_source(source)


def test_errors_reach_the_shell_as_one_line_and_status_two(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["partition", "two_tables:good", "--out", "out", "--sidecars", "3"]) == 2
    assert "[PLAN] sidecars: found 3; allowed: 1 to 2" in capsys.readouterr().err
    assert not (folder / "out").exists()


def test_importing_the_command_costs_no_torch() -> None:
    code = "import sys, sidepool.partition.command; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
