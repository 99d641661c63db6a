"""How often tables are asked: recorded by sidecars (`sidepool profile`), read by the shard planner."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from sidepool.wire.config import FormatVersion, Frozen, load_json
from sidepool.wire.errors import ConfigError
from sidepool.wire.plan import MAX_ROWS, Name

# A profile of 10,000 tables with 64 rows each is about 20 MB.
MAX_PROFILE_BYTES = 256 << 20

Rate = Annotated[float, Field(ge=0, le=1e15, allow_inf_nan=False)]


class HotRow(Frozen):
    """A row that takes a noticeable share of its table's ids."""

    row: Annotated[int, Field(ge=0, le=MAX_ROWS)]
    share: Annotated[float, Field(ge=0, le=1)]


class TableAccess(Frozen):
    """One table, over all its features, shards and replicas."""

    table: Name
    bags_per_s: Rate
    rows_per_s: Rate
    net: Name | None = None
    """The part of the model that consumes it; only a person knows. `net_specific` keeps nets apart."""
    hot_rows: tuple[HotRow, ...] = ()


class AccessProfile(Frozen):
    """What a planner needs to know of the load."""

    version: FormatVersion = 1
    model: Name
    lookups_per_s: Rate
    tables: tuple[TableAccess, ...]


def load_access(path: Path) -> AccessProfile:
    """Read a profile; raises `ConfigError`."""
    try:
        if (size := path.stat().st_size) > MAX_PROFILE_BYTES:
            raise ConfigError(f"{path}: {size} bytes; an access profile has at most {MAX_PROFILE_BYTES}")
    except OSError as e:
        raise ConfigError(f"{path}: cannot be read: {e}") from e
    return load_json(path, AccessProfile)


def save_access(profile: AccessProfile, path: Path) -> None:
    """Write `profile` as JSON."""
    path.write_text(profile.model_dump_json(indent=1, exclude_none=True) + "\n", encoding="utf-8")
