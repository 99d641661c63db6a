"""What a sidecar serves when it starts: what is configured, or what was brought here since, beside what it replaces."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_plan import plan_of

from sidepool.sidecar.config import SidecarConfig
from sidepool.sidecar.epochs import Before, MoveRecord, MoveState, complete_directory, save_record, sources
from sidepool.wire.errors import PlanError, ShardCorrupt
from sidepool.wire.plan import save_plan


def configured(directory: Path, epoch: int | None) -> SidecarConfig:
    if epoch is not None:
        save_plan(plan_of(epoch), directory / "plan.yaml")
    plan = None if epoch is None else str(directory / "plan.yaml")
    return SidecarConfig(name="s", plan=plan, shards=str(directory / "shards"))


def bring(directory: Path, epoch: int, state: MoveState, before: int | None = None) -> Path:
    """What a move to `epoch` leaves; `before`: the epoch that was served."""
    brought = complete_directory(directory / "shards", epoch)
    brought.mkdir()
    kept = None
    if before is not None:
        kept = Before(plan=plan_of(before), shards="shards" if before == 1 else f"shards.epoch-{before}")
    save_record(MoveRecord(state=state, plan=plan_of(epoch), replaces="x", before=kept), brought)
    return brought


def served(config: SidecarConfig) -> list[tuple[int, str]]:
    return [(source.plan.epoch, source.shards.name) for source in sources(config)]


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ("prepared", [(1, "shards"), (2, "shards.epoch-2")]),
        ("switched", [(1, "shards"), (2, "shards.epoch-2")]),
        ("settled", [(2, "shards.epoch-2")]),
        ("abandoned", [(1, "shards")]),
    ],
)
def test_a_plan_that_was_brought_is_served_as_its_record_says(
    tmp_path: Path, state: MoveState, expected: list[tuple[int, str]]
) -> None:
    config, brought = configured(tmp_path, 1), bring(tmp_path, 2, state, before=1)
    assert served(config) == expected
    assert brought.exists() == (state != "abandoned")
    assert served(config) == expected
    assert served(configured(tmp_path, 3)) == [(3, "shards")]


def test_of_several_plans_the_newest_counts_whatever_else_lies_there(tmp_path: Path) -> None:
    config = configured(tmp_path, 1)
    bring(tmp_path, 9, "settled", before=1)
    bring(tmp_path, 10, "prepared", before=9)
    for other in ("shards.epoch-11.partial", "shards.epoch-x", "shards.epoch-", "other.epoch-12"):
        (tmp_path / other).mkdir()
    assert served(config) == [(9, "shards.epoch-9"), (10, "shards.epoch-10")]


def test_a_sidecar_that_joined_has_nothing_to_begin_with(tmp_path: Path) -> None:
    config = configured(tmp_path, None)
    assert served(config) == []
    bring(tmp_path, 4, "prepared")
    assert served(config) == [(4, "shards.epoch-4")]


def test_a_plan_file_that_was_switched_is_the_one_that_was_brought(tmp_path: Path) -> None:
    bring(tmp_path, 2, "switched", before=1)
    assert served(configured(tmp_path, 2)) == [(1, "shards"), (2, "shards.epoch-2")]
    save_plan(plan_of(2, sidecar="other"), tmp_path / "plan.yaml")
    with pytest.raises(PlanError, match=r"epoch: found 2, which stands for another plan in .*shards\.epoch-2"):
        sources(SidecarConfig(name="s", plan=str(tmp_path / "plan.yaml"), shards=str(tmp_path / "shards")))


@pytest.mark.parametrize(("content", "complaint"), [("{", "cannot be read"), ('{"state": "gone"}', "state: found 'gone'")])
def test_a_record_that_is_wrong_is_named(tmp_path: Path, content: str, complaint: str) -> None:
    config, brought = configured(tmp_path, 1), bring(tmp_path, 2, "settled")
    (brought / "move.json").write_text(content, encoding="utf-8")
    with pytest.raises(ShardCorrupt, match=rf"move\.json: .*{complaint}"):
        sources(config)
