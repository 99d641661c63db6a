"""The settings of a ranker: `parameters{}` of its config.pbtxt, decoded strictly."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from sidepool.wire.config import Frozen, decode
from sidepool.wire.errors import ConfigError

# Parameters that belong to Triton's Python backend or to whoever wrote the repository.
FOREIGN_PARAMETERS = ("EXECUTION_ENV_PATH", "FORCE_CPU_ONLY_INPUT_TENSORS")


class RankerParameters(Frozen):
    """What `parameters{}` may hold; every value is a string there and is decoded as its type says."""

    lane: Literal["auto", "shm", "tcp", "grpc", "local"] = "auto"
    """How to reach the sidecars; `auto` takes shm on this host and tcp elsewhere."""
    deadline_ms: Annotated[float, Field(gt=0, le=3_600_000)] = 1000.0
    """Budget of a request that brings none: any healthy request takes tens of milliseconds."""
    torch_threads: Annotated[int, Field(ge=0, le=1024)] = 0
    """Threads of one dense forward on the CPU. 0 leaves torch's choice, all cores."""
    spin_us: Annotated[int, Field(ge=0, le=1_000_000)] = 50
    """How long a lookup waits spinning before it sleeps: about what a sidecar on the same machine takes for a small batch."""
    artifact: str = ""
    """Directory with plan.yaml and model.yaml, absolute or relative to the model's version directory; default: that directory."""
    shards: str = ""
    """Directory with the shard directories, for `lane: local` only; relative to the version directory."""


@dataclass(frozen=True)
class Settings:
    """Everything `initialize` was told."""

    name: str
    version: str
    artifact: Path
    shards: Path | None
    device: str
    """`cpu`, or `cuda:N` where the instance kind is GPU."""
    parameters: RankerParameters


def read_settings(args: dict[str, str]) -> Settings:
    """Decode what Triton passes to `initialize`; raises `ConfigError` naming the parameter."""
    config: dict[str, Any] = json.loads(args["model_config"])
    where = f"config.pbtxt of {args['model_name']}: parameters"
    raw = {k: v["string_value"] for k, v in config.get("parameters", {}).items() if k not in FOREIGN_PARAMETERS}
    parameters = decode({k: _typed(k, v, where) for k, v in raw.items()}, RankerParameters, where=where)
    version = Path(args["model_repository"]) / args["model_version"]
    gpu = args["model_instance_kind"] == "GPU"
    return Settings(
        name=args["model_name"],
        version=args["model_version"],
        artifact=version / parameters.artifact,
        shards=version / parameters.shards if parameters.shards else None,
        device=f"cuda:{args['model_instance_device_id']}" if gpu else "cpu",
        parameters=parameters,
    )


def _typed(name: str, text: str, where: str) -> Any:
    """`text` as the number its field wants; strings stay as they are, and unknown names are left for `decode` to refuse."""
    field = RankerParameters.model_fields.get(name)
    kind = field.annotation if field is not None else str
    if kind not in (int, float):
        return text
    try:
        return kind(text)
    except ValueError:
        raise ConfigError(f"{where}: {name}: found {text!r}; allowed: {'a whole number' if kind is int else 'a number'}") from None
