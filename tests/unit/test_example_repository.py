"""The example in model_repository/ is what `sidepool partition` writes today."""

from __future__ import annotations

from pathlib import Path

from sidepool.bench.models import dlrm
from sidepool.partition import partition_model

EXAMPLE = Path(__file__).resolve().parents[2] / "model_repository" / "dlrm"


def test_the_example_is_what_partitioning_generates(tmp_path: Path) -> None:
    model, example_inputs = dlrm.single_id(max_rows=10)
    partition_model(model, example_inputs, tmp_path / "out", name="dlrm")
    written = tmp_path / "out" / "model_repository" / "dlrm"
    for file in ("config.pbtxt", "1/model.py"):
        assert (EXAMPLE / file).read_text() == (written / file).read_text()
