"""What `sidepool bench slo` makes of its measurements."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from sidepool.bench import slo
from sidepool.bench.energy import Energy, read_gpus, read_packages
from sidepool.bench.load import LoadResult, Schedule
from sidepool.bench.slo_overload import figures
from sidepool.bench.slo_report import plot, summary
from sidepool.wire.errors import TransportError


def model(rates: tuple[float, float, float], p99_ms: tuple[float, float]) -> dict[str, Any]:
    latencies = {name: [{"p99_ms": 9 * p99}, {"p99_ms": p99}] for name, p99 in zip(("monolithic", "tuned"), p99_ms, strict=True)}
    highest = {"1": dict(zip(("monolithic", "static", "tuned"), rates, strict=True))}
    unmet = {name: "slow" for name, rate in highest["1"].items() if not rate}
    return {"highest_qps": highest, "limit": {"ms": 5.0}, "fixed_rate": {"latencies": latencies}, "unmet": unmet}


def test_a_summary_has_geometric_means_and_leaves_out_what_has_none(tmp_path: Path) -> None:
    models = {"a": model((10, 10, 40), (4, 2)), "b": model((10, 20, 20), (1, 2))}
    means = {
        "tuned_over_static": 2.0,
        "tuned_over_monolithic": pytest.approx(8**0.5, abs=1e-3),
        "p99_at_half_load_tuned_over_monolithic": 1.0,
    }
    assert summary(models) == {"over": ["a", "b"], "left_out": {}, **means}
    models["c"] = model((0, 20, 20), (1, 2))
    assert summary(models) == {"over": ["a", "b"], "left_out": {"c": {"monolithic": "slow"}}, **means}
    assert summary({})["tuned_over_static"] is None
    plot(models, tmp_path / "slo.png")
    assert (tmp_path / "slo.png").read_bytes().startswith(b"\x89PNG")


def test_a_model_that_fails_is_named_and_the_others_are_measured_and_only_it_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []

    class Measured:
        def __init__(self, name: str, args: argparse.Namespace, console: Console) -> None:
            tried.append(name)

        def measure(self) -> dict[str, Any]:
            if tried.count("ncf") == 1 and tried[-1] == "ncf":
                raise TransportError("Triton: not ready")
            return model((10, 10, 20), (4, 2))

    monkeypatch.setattr(slo, "Model", Measured)
    parser = argparse.ArgumentParser()
    slo.add_arguments(parser)
    file = tmp_path / "slo.json"
    args = parser.parse_args(["--json", str(file), "--models", "ncf,din", "--plot", str(tmp_path / "slo.png")])
    assert slo.run(args) == 1
    found = json.loads(file.read_text())
    assert (found["failed"], list(found["models"])) == ({"ncf": "TransportError: Triton: not ready"}, ["din"])
    assert slo.run(args) == 0
    assert tried == ["ncf", "din", "ncf"]
    assert json.loads(file.read_text())["failed"] == {}


def test_an_overload_counts_answers_in_time_and_the_last_miss_after_it() -> None:
    # Two seconds of four requests each, then one a second: the first of these late, the second lost, the third in time.
    due_ns = np.concatenate([np.arange(8) * 250_000_000, np.array([2.25, 3.25, 4.25]) * 1e9]).astype(np.int64)
    took_ms = np.array([10, 10, 10, 60, 10, 60, 60, 60, 60, 10, 10])
    status = np.array([0, 0, 0, 0, 14, 0, 0, 0, 0, 14, 0], np.int32)
    schedule = Schedule(due_ns, np.zeros(11, np.int32), 7.0)
    result = LoadResult(schedule, due_ns, due_ns + took_ms * 1_000_000, status, 0.0, 50.0, {}, {})
    found = figures(result, 8, 2.0, limit_ms=50.0, highest_qps=2.0)
    assert found == {"offered_qps": 4.0, "goodput_qps": 1.5, "goodput_share": 0.75, "recovery_s": 1.25}


def test_energy_is_read_from_packages_whose_counters_wrap_or_the_reason_is_said(tmp_path: Path) -> None:
    assert "no package" in str(read_packages(tmp_path))
    for name, used in (("intel-rapl:0", 900), ("intel-rapl:0:0", 5), ("intel-rapl:1", 100)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text(f"{used}\n")
        (tmp_path / name / "max_energy_range_uj").write_text("999\n")
    before = read_packages(tmp_path)
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("100\n")
    after = read_packages(tmp_path)
    assert isinstance(before, Energy)
    assert isinstance(after, Energy)
    assert before.joules_until(after) == pytest.approx(200e-6)
    (tmp_path / "intel-rapl:1" / "energy_uj").unlink()
    assert "cannot be read" in str(read_packages(tmp_path))


def test_energy_of_gpus_is_read_from_their_driver_or_the_reason_is_said() -> None:
    before, after = read_gpus(), read_gpus()
    if isinstance(before, str):  # no driver here
        assert before.startswith("no NVML: ")
    else:
        assert isinstance(after, Energy)
        assert 0 <= before.joules_until(after) < 1e6
