"""A plan file is followed, replaced as a whole, and never by two at once."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from small_plan import plan_of

from sidepool.wire import plan_source
from sidepool.wire.errors import PlanError
from sidepool.wire.plan import load_plan, save_plan
from sidepool.wire.plan_source import FilePlanSource

PATIENCE_S = 60.0


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FilePlanSource:
    monkeypatch.setattr(plan_source, "POLL_S", 0.001)
    save_plan(plan_of(1), tmp_path / "plan.yaml")
    return FilePlanSource(tmp_path / "plan.yaml")


def test_whoever_waits_gets_the_next_plan_and_no_plan_twice(source: FilePlanSource) -> None:
    first = source.read()
    assert source.wait(first, 0.01) is None
    replaced = threading.Timer(0.02, lambda: source.replace(first, plan_of(2)))
    replaced.start()
    second = source.wait(first, PATIENCE_S)
    replaced.join()
    assert second == plan_of(2)
    assert source.wait(first, 0.0) == second  # whoever could not take it yet asks again
    assert source.wait(second, 0.01) is None


def test_wrong_content_is_told_once_and_waited_out(source: FilePlanSource) -> None:
    first = source.read()
    source.path.write_text("version: 1\n", encoding="utf-8")
    with pytest.raises(PlanError, match="epoch: missing"):
        source.wait(first, PATIENCE_S)
    assert source.wait(first, 0.01) is None
    source.path.unlink()
    with pytest.raises(PlanError, match="cannot be read"):
        source.wait(first, PATIENCE_S)
    save_plan(plan_of(3), source.path)
    assert source.wait(first, PATIENCE_S) == plan_of(3)


def test_closing_ends_waiting(source: FilePlanSource) -> None:
    closing = threading.Timer(0.02, source.close)
    closing.start()
    assert source.wait(source.read(), PATIENCE_S) is None
    closing.join()


def test_a_plan_takes_the_place_of_the_one_it_was_made_for_alone(source: FilePlanSource, tmp_path: Path) -> None:
    source.path.chmod(0o640)
    link = tmp_path / "link.yaml"
    link.symlink_to(source.path)
    FilePlanSource(link).replace(plan_of(1), plan_of(2))
    assert link.is_symlink()
    assert load_plan(source.path) == plan_of(2)
    assert source.path.stat().st_mode & 0o777 == 0o640
    source.replace(plan_of(1), plan_of(2))  # again: nothing to do
    with pytest.raises(PlanError, match=r"plan\.yaml: epoch: found 2, another plan; allowed: 1"):
        source.replace(plan_of(1), plan_of(3))
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["link.yaml", "plan.yaml"]
