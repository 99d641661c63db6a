"""While shards are loaded, the log says how far the load is and how long it will still take."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from small_artifact import write_small_artifact

from sidepool.sidecar import loader
from sidepool.sidecar.config import load_sidecar_config
from sidepool.sidecar.loader import PROGRESS_STEPS, load
from sidepool.wire import shard_reader

TOTAL = 50 * 8 * 4 + 30 * 4 * 2


def progress_lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [vars(r)["fields"] for r in caplog.records if r.getMessage() == "verifying shards"]


def test_the_log_gives_bytes_and_remaining_seconds_for_every_tenth(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_reader, "CHECKSUM_SLICE_BYTES", 20)
    clock = iter(range(1000))  # a second goes by between two looks at the clock
    monkeypatch.setattr(loader, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    artifact = write_small_artifact(tmp_path)
    with caplog.at_level(logging.INFO, "sidepool.sidecar"):
        load(load_sidecar_config(artifact.config))
    lines = progress_lines(caplog)
    assert len(lines) == PROGRESS_STEPS
    assert [line["total_bytes"] for line in lines] == [TOTAL] * PROGRESS_STEPS
    for step, line in enumerate(lines, start=1):
        done, seconds = line["done_bytes"], step
        assert PROGRESS_STEPS * done // TOTAL == step
        assert line["bytes_per_s"] == round(done / seconds)
        assert line["eta_s"] == round(seconds * (TOTAL - done) / done, 1)
    assert lines[-1]["eta_s"] == 0
