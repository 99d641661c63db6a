"""A partition that is killed while it writes leaves no artifact, and the next one takes its place."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from sidepool.partition import partition_model
from sidepool.partition.artifact import replacing
from sidepool.partition.check import check_artifact

KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from sidepool.partition import artifact, partition_model
from test_partition_killed import Two, IDS

own = artifact._write_sidecar

def once(directory, plan, index, *rest):
    if index == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return own(directory, plan, index, *rest)

artifact._write_sidecar = once
partition_model(Two(), IDS, Path(sys.argv[1]), name="m")
"""
IDS = torch.tensor([[1, 2], [3, 4], [0, 0]])


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Embedding(5, 2), nn.Embedding(6, 2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.a(ids[:, 0]) * self.b(ids[:, 1])


def test_what_a_killed_process_wrote_is_no_artifact_and_is_swept_up_by_the_next(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-W", "ignore", "-c", KILLED, str(out), str(Path(__file__).parent)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out.")
    assert left.name.endswith(".partial")
    assert list(left.rglob("table-*.safetensors"))
    partition_model(Two(), IDS, out, name="m")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert "agree" in check_artifact(out)


def test_what_another_process_is_writing_is_left_alone(tmp_path: Path) -> None:
    with replacing(tmp_path / "out") as theirs:
        (theirs / "file").write_text("half")
        busy = theirs.rename(tmp_path / ".out.1.partial")
        partition_model(Two(), IDS, tmp_path / "out", name="m")
        assert (busy / "file").read_text() == "half"
        busy.rename(theirs)
        (tmp_path / "out").rename(tmp_path / "elsewhere")
