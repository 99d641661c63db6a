"""What callers give `partition_model`, checked before anything is done: a refusal says what was found and what is allowed."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from sidepool.wire.errors import CutError, PlanError
from sidepool.wire.plan import OnMissingShard, RowFormat

_MODEL_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,255}")


def check_name(found: object) -> None:
    """Raise `PlanError` for what cannot be the name of a Triton model, which is a directory's."""
    if not isinstance(found, str) or not _MODEL_NAME.fullmatch(found):
        raise PlanError(f"name: found {found!r}; allowed: letters, digits, '_', '.', '-', not beginning with '.' or '-'")


def check_whole(field: str, found: object, least: int) -> None:
    """Raise `PlanError` for what is no whole number from `least` on."""
    if type(found) is not int or found < least:
        raise PlanError(f"{field}: found {found!r}; allowed: a whole number, {least} or more")


def check_choice(field: str, found: object, allowed: Iterable[str]) -> None:
    """Raise `PlanError` for what is none of `allowed`."""
    choices = [str(choice) for choice in allowed]
    if not isinstance(found, str) or found not in choices:
        raise PlanError(f"{field}: found {found!r}; allowed: {', '.join(choices)}")


def check_flags(**flags: object) -> None:
    """Raise `PlanError` for a flag that is neither True nor False."""
    for field, found in flags.items():
        if not isinstance(found, bool):
            raise PlanError(f"{field}: found {found!r}; allowed: True or False")


def check_placing(
    sidecars: object,
    addresses: object,
    sidecar_bytes: object,
    epoch: object,
    row_format: object,
    on_missing_shard: object,
) -> None:
    """Raise `PlanError` for a wrong argument that the plan is made from."""
    check_whole("sidecars", sidecars, 1)
    if sidecar_bytes is not None:
        check_whole("sidecar_bytes", sidecar_bytes, 1)
    check_whole("epoch", epoch, 1)
    if row_format is not None:
        check_choice("row_format", row_format, RowFormat)
    check_choice("on_missing_shard", on_missing_shard, OnMissingShard)
    listed = isinstance(addresses, Sequence) and not isinstance(addresses, str) and all(isinstance(a, str) for a in addresses)
    if addresses is not None and not listed:
        raise PlanError(f"addresses: found {addresses!r}; allowed: a list of HOST:PORT, one per sidecar")


def output_path(found: str | os.PathLike[str]) -> Path:
    """Where to write, behind links; raises `CutError`."""
    try:
        path = Path(found)
    except TypeError:
        raise CutError(f"out_dir: found {found!r}; allowed: a path") from None
    if not path.name:  # the working directory would vanish from under the caller when another takes its place
        raise CutError(f"out_dir: found {str(found)!r}; allowed: the path of a directory with a name")
    return path.resolve() if path.is_symlink() else path
