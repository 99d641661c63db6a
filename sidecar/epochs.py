"""The directories of plans that `sidepool plan apply` brought here, and which plans a sidecar serves when it starts.

They lie beside the configured `shards`: `shards.epoch-7` for epoch 7, with a manifest, shard files and a record of the move;
`shards.epoch-7.partial` as long as it is not complete. What is configured is never written to.
"""

from __future__ import annotations

import glob
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sidepool.sidecar.config import SidecarConfig
from sidepool.wire.config import FormatVersion, Frozen, load_json
from sidepool.wire.durable import replace_text
from sidepool.wire.errors import PlanError, ShardCorrupt
from sidepool.wire.plan import Plan, load_plan, validate_plan

RECORD_FILE = "move.json"

MoveState = Literal["prepared", "switched", "settled", "abandoned"]
"""prepared: answered beside the plan before it. switched: the same, and that one leaves after `previous_epoch_s`. settled: alone.
abandoned: leaves itself."""


class Before(Frozen):
    """What a sidecar served when a move began."""

    plan: Plan
    shards: str
    """Name of its directory, beside the new one."""


class MoveRecord(Frozen):
    """The file beside the shards of a plan that was brought here."""

    version: FormatVersion = 1
    state: MoveState
    plan: Plan
    replaces: str
    """Fingerprint of the deployment's plan until then, whether this sidecar was in it or not."""
    before: Before | None = None
    """None for a sidecar that had nothing."""


@dataclass(frozen=True)
class Source:
    """A plan and the directory of its shards here. `record`: of one that was brought here."""

    plan: Plan
    shards: Path
    record: MoveRecord | None = None


def complete_directory(base: Path, epoch: int) -> Path:
    """Where the shards of a plan that was brought here lie; `base`: the configured ones."""
    return base.with_name(f"{base.name}.epoch-{epoch}")


def partial_directory(base: Path, epoch: int) -> Path:
    """The same while they are not complete."""
    return base.with_name(f"{base.name}.epoch-{epoch}.partial")


def partial_directories(base: Path) -> Iterator[Path]:
    """All that moves have begun and not ended."""
    return base.parent.glob(f"{glob.escape(base.name)}.epoch-*.partial")


def load_record(directory: Path) -> MoveRecord:
    """Read the record of a complete directory; raises `ShardCorrupt`."""
    path = directory / RECORD_FILE
    record = load_json(path, MoveRecord, error=ShardCorrupt)
    validate_plan(record.plan, where=str(path))
    return record


def save_record(record: MoveRecord, directory: Path) -> None:
    """Write the record; whoever reads it finds the old or the new one, also after a power cut."""
    replace_text(directory / RECORD_FILE, record.model_dump_json(exclude_none=True) + "\n")


def remove_directory(directory: Path) -> None:
    """Remove a directory of shards; one that is gone already is no error, one that cannot go is `ShardCorrupt`."""
    try:
        shutil.rmtree(directory)
    except FileNotFoundError:
        return
    except OSError as e:
        raise ShardCorrupt(f"{directory}: cannot be removed: {e}") from e


def sources(config: SidecarConfig) -> list[Source]:
    """What the sidecar serves, the newest last: the configured plan, or what was brought here since, with what it replaces as
    long as that is answered too; empty where nothing is configured and nothing has come.

    Raises `PlanError` and `ShardCorrupt`.
    """
    base = Path(config.shards)
    configured = load_plan(Path(config.plan)) if config.plan is not None else None
    for directory in complete_directories(base):
        record = load_record(directory)
        if configured is not None and configured.epoch > record.plan.epoch:
            break
        if record.state == "abandoned":
            remove_directory(directory)
            continue
        if configured is not None and configured.epoch == record.plan.epoch and configured.fingerprint != record.plan.fingerprint:
            raise PlanError(
                f"{config.plan}: epoch: found {configured.epoch}, which stands for another plan in {directory}; allowed: a new one"
            )
        found = [Source(record.plan, directory, record)]
        if record.before is not None and record.state != "settled":
            found.insert(0, Source(record.before.plan, base.with_name(record.before.shards)))
        return found
    return [Source(configured, base)] if configured is not None else []


def complete_directories(base: Path) -> list[Path]:
    """Directories of plans that were brought here, the newest first."""
    prefix = f"{base.name}.epoch-"
    found = {path.name.removeprefix(prefix): path for path in base.parent.glob(f"{glob.escape(base.name)}.epoch-*")}
    return [found[epoch] for epoch in sorted((e for e in found if e.isascii() and e.isdigit()), key=int, reverse=True)]
