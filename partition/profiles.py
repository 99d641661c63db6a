"""Hardware profiles: what the cost model knows about a CPU, a GPU and the link between them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Annotated

from pydantic import Field

from sidepool.wire.config import FormatVersion, Frozen, dump_yaml, load_yaml
from sidepool.wire.errors import CutError

SHIPPED = Path(__file__).with_name("profiles.yaml")
# What a partition is costed for where nothing is said: a current CPU node, and the GPU most rankers are served on.
DEFAULT_CPU, DEFAULT_GPU, DEFAULT_LINK = "epyc-9654", "a100-80gb", "100g-roce"

Positive = Annotated[float, Field(gt=0, lt=1e18)]


class Processor(Frozen):
    """One side's roofline. `lookup_ns`: the fixed cost of one feature's lookup; `launch_ns`: of any other operator."""

    flops_per_s: Positive
    bytes_per_s: Positive
    gather_bytes_per_s: Positive
    launch_ns: Annotated[float, Field(ge=0)]
    lookup_ns: Annotated[float, Field(ge=0)]
    watts: Positive
    source: str


class Link(Frozen):
    """Between a ranker and its sidecars. `round_trip_ns`: of an empty request and its response."""

    bytes_per_s: Positive
    round_trip_ns: Annotated[float, Field(ge=0)]
    source: str


class Profiles(Frozen):
    """A file of profiles by name."""

    version: FormatVersion = 1
    cpu: dict[str, Processor] = Field(default_factory=dict)
    gpu: dict[str, Processor] = Field(default_factory=dict)
    link: dict[str, Link] = Field(default_factory=dict)


@cache
def shipped() -> Profiles:
    """The profiles that come with sidepool."""
    return load_yaml(SHIPPED, Profiles, error=CutError)


def find_processor(side: str, name: str) -> Processor:
    """A `cpu` or `gpu` profile: a shipped name, or a file that `--calibrate` wrote. Raises `CutError`."""
    known: dict[str, Processor] = getattr(shipped(), side)
    if name in known:
        return known[name]
    if name.endswith((".yaml", ".yml")):
        found: dict[str, Processor] = getattr(load_yaml(Path(name), Profiles, error=CutError), side)
        if len(found) == 1:
            return next(iter(found.values()))
        raise CutError(f"{name}: found {len(found)} {side} profiles; allowed: exactly one")
    raise CutError(f"{side}: found {name!r}; allowed: {', '.join(known)}, or a .yaml file that --calibrate wrote")


def find_link(name: str) -> Link:
    """A shipped link profile. Raises `CutError`."""
    known = shipped().link
    if name not in known:
        raise CutError(f"link: found {name!r}; allowed: {', '.join(known)}")
    return known[name]


def save_profiles(profiles: Profiles, path: Path) -> None:
    """Write profiles as YAML. Raises `CutError`."""
    try:
        path.write_text(dump_yaml(profiles), encoding="utf-8")
    except OSError as e:
        raise CutError(f"calibrate: {path} cannot be written: {e}") from e
