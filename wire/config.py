"""Strict loading of YAML files into frozen types.

Every file sidepool reads goes through `load_yaml`: unknown keys and out-of-range values are refused
with the path of the field, what was found and what is allowed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from sidepool.wire.errors import ConfigError, SidepoolError

# A configuration is a few kilobytes and a plan of 10,000 tables about 3 MB; anything far beyond is a wrong file.
MAX_YAML_BYTES = 64 << 20


class Frozen(BaseModel):
    """Base of every type that is read from a file: frozen, strict, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


def _known_version(version: int) -> int:
    if version != 1:
        raise PydanticCustomError("format_version", "1 (another version of sidepool may read this file)")
    return version


# Of every kind of file; a change that an older sidepool would misread gets a new number.
FormatVersion = Annotated[int, AfterValidator(_known_version), Field(json_schema_extra={"const": 1})]

T = TypeVar("T", bound=Frozen)


def load_yaml(path: Path, kind: type[T], *, error: type[SidepoolError] = ConfigError) -> T:
    """Read `path` as a `kind`; raises `error` with file, field path, value found and what is allowed."""
    try:
        size = path.stat().st_size
        if size > MAX_YAML_BYTES:
            raise error(f"{path}: {size} bytes; a {kind.__name__} file has at most {MAX_YAML_BYTES}")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise error(f"{path}: cannot be read: {e}") from e
    try:
        data = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    # Also numbers and dates that look right and are not (ValueError), and brackets without end.
    except (yaml.YAMLError, ValueError, RecursionError) as e:
        raise error(f"{path}: not valid YAML: {' '.join(str(e).split())}") from e  # in one line, as every error
    return decode(data, kind, where=str(path), error=error)


def load_json(path: Path, kind: type[T], *, error: type[SidepoolError] = ConfigError) -> T:
    """Read `path`, JSON that sidepool wrote, as a `kind`; raises `error`, as `load_yaml` does."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise error(f"{path}: cannot be read: {e}") from e
    return decode(data, kind, where=str(path), error=error)


def decode(data: Any, kind: type[T], *, where: str, error: type[SidepoolError] = ConfigError) -> T:
    """Decode plain data (as YAML gives it) into `kind`; `where` begins every message."""
    if not isinstance(data, dict):
        raise error(f"{where}: found {_short(data)}; allowed: a mapping with the keys {_keys(kind)}")
    try:
        # JSON mode keeps strictness for scalars while lists become tuples and strings become enums.
        return kind.model_validate_json(json.dumps(data))
    except (TypeError, ValueError, RecursionError) as e:
        if not isinstance(e, ValidationError):
            raise error(f"{where}: holds a value that YAML types but JSON does not: {e}") from e
        found = e.errors()
        # A list whose items are wrong is also said to be too short, which it is not.
        real = [f for f in found if f["type"] != "too_short" or not any(_inside(g, f) for g in found)]
        lines = [_explain(kind, item) for item in real[:8]]
        raise error(f"{where}: " + "; ".join(lines)) from e


def dump_yaml(value: Frozen) -> str:
    """YAML text of `value`, keys in declaration order, None left out; `load_yaml` of it gives an equal value."""
    text: str = yaml.safe_dump(value.model_dump(mode="json", exclude_none=True), sort_keys=False, width=120)
    return text


def _inside(item: Any, outer: Any) -> bool:
    return item is not outer and item["loc"][: len(outer["loc"])] == outer["loc"]


def _explain(kind: type[BaseModel], item: Any) -> str:
    path = ".".join(str(p) for p in item["loc"]) or "(top level)"
    if item["type"] == "extra_forbidden":
        return f"{path}: unknown key; allowed here: {_keys(_owner(kind, item['loc'][:-1]))}"
    if item["type"] == "missing":
        return f"{path}: missing; it is required"
    return f"{path}: found {_short(item['input'])}; allowed: {item['msg'].removeprefix('Input should be ')}"


def _owner(kind: type[BaseModel], loc: tuple[Any, ...]) -> type[BaseModel] | None:
    """The type of the mapping at `loc`, or None where it cannot be told (unions)."""
    current: Any = kind
    for step in loc:
        if isinstance(step, int):
            continue
        field = current.model_fields.get(step) if isinstance(current, type) and issubclass(current, BaseModel) else None
        if field is None:
            return None
        current = _model_in(field.annotation)
    return current if isinstance(current, type) and issubclass(current, BaseModel) else None


def _model_in(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _model_in(argument)
        if found is not None:
            return found
    return None


def _keys(kind: type[BaseModel] | None) -> str:
    return ", ".join(kind.model_fields) if kind is not None else "see the documentation"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
