"""`sidepool tune` on a real Triton with its sidecars, for a few seconds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from sidepool.__main__ import main
from sidepool.bench import triton_server
from sidepool.bench.models.deeprecsys import deeprecsys
from sidepool.bench.triton_server import TritonServer
from sidepool.partition import partition_model

pytestmark = pytest.mark.triton


def test_a_model_is_tuned_and_the_command_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if reason := triton_server.missing():
        pytest.skip(f"no Triton: {reason}")
    model, example = deeprecsys("ncf", max_rows=50)
    partition_model(model, example, tmp_path / "shop", name="shop", sidecars=1)
    before = {path: path.read_bytes() for path in (tmp_path / "shop").rglob("*") if path.is_file()}
    # Time for one setting, the static baseline.
    common = ["tune", "--model", str(tmp_path / "shop"), "--slo", "p95=250ms", "--minutes", "0", "--work-dir", "build"]
    command = [*common, "--quick", "--online", "--sizes", "64", "--requests", "4", "--ids", "uniform"]
    assert main(command) == 0
    out = tmp_path / "shop-tuned"
    found = json.loads((out / "tune.json").read_text())
    assert found["best_qps"] == found["static_qps"] > 1
    assert [tried["qps"] for tried in found["tried"]] == [found["best_qps"]]
    config = (out / "model_repository/shop/config.pbtxt").read_text()
    assert 'key: "split_samples"' in config
    assert 'key: "limit_ms"' in config
    assert yaml.safe_load((out / "sidecars/sidecar-0/sidecar.yaml").read_text())["engines"] == 1
    assert {path: path.read_bytes() for path in before} == before
    # Nothing is left to measure: no server is started.
    monkeypatch.setattr(TritonServer, "__enter__", lambda server: pytest.fail("a second measurement"))
    assert main(command) == 0
    assert json.loads((out / "tune.json").read_text())["tried"] == found["tried"]
    assert "time was up" in capsys.readouterr().out
    assert main([*command, "--seed", "5"]) == 2
    assert "was measured under another seed" in capsys.readouterr().err
