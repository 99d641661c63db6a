"""The settings of a ranker: `parameters{}` of its config.pbtxt, decoded strictly."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from sidepool.client.lanes import DEFAULT_MAX_IDS, DEFAULT_WINDOW_DELAY_US, MAX_MAX_IDS, MAX_WINDOW_DELAY_US, TlsFiles
from sidepool.wire.config import Frozen, decode
from sidepool.wire.coordination import Coordination
from sidepool.wire.errors import ConfigError

# Parameters that belong to Triton's Python backend or to whoever wrote the repository.
FOREIGN_PARAMETERS = ("EXECUTION_ENV_PATH", "FORCE_CPU_ONLY_INPUT_TENSORS")


class RankerParameters(Frozen):
    """What `parameters{}` may hold; every value is a string there and is decoded as its type says."""

    lane: Literal["auto", "shm", "tcp", "grpc", "rdma", "local"] = "auto"
    """How to reach the sidecars; `auto` takes shm on this host and tcp elsewhere."""
    rdma_device: str = "auto"
    """RDMA device for `lane: rdma`, as `sidepool doctor` lists them; auto: the first with an active port."""
    rdma_port: Annotated[int, Field(ge=1, le=254)] | Literal["auto"] = "auto"
    """Port of the device; auto: the first active one."""
    rdma_gid_index: Annotated[int, Field(ge=0, le=65_535)] | Literal["auto"] = "auto"
    """Entry of the port's GID table; auto: RoCE v2 over IPv4 before all others."""
    rdma_traffic_class: Annotated[int, Field(ge=0, le=255)] = 0
    """RoCE: IP traffic class (DSCP times 4) of requests; 0 is best effort, use your fabric's lossless class."""
    rdma_engines: Annotated[int, Field(ge=1, le=256)] = 1
    """Native threads that post and poll for the rdma lanes; one keeps up with several sidecars."""
    deadline_ms: Annotated[float, Field(gt=0, le=3_600_000)] = 1000.0
    """Budget of a request that brings none: any healthy request takes tens of milliseconds."""
    torch_threads: Annotated[int, Field(ge=0, le=1024)] = 0
    """Threads of one dense forward on the CPU. 0 leaves torch's choice, all cores."""
    workers: Annotated[int, Field(ge=1, le=1024)] = 1
    """Threads of this instance that share the sub-batches of a batch, each with its own torch_threads."""
    split_samples: Annotated[int, Field(ge=0, le=1 << 20)] = 0
    """The dense forward of a larger batch runs in sub-batches of at most so many samples; 0: whole."""
    gpu_min_samples: Annotated[int, Field(ge=0, le=1 << 20)] = 0
    """Instances on a GPU: batches of fewer samples run on the CPU."""
    limit_ms: Annotated[float, Field(ge=0, le=3_600_000)] = 0.0
    """The p95 limit that requests are served for: split_samples is then adjusted to the load while requests flow; 0: it stays."""
    pooling: Literal["sidecar", "ranker"] = "sidecar"
    """Where bags are pooled. ranker: rows travel, for comparison."""
    hedge_budget: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of subrequests that may go to a second replica once the first takes longer than its 95th percentile; 0: a replica is
    left only when it has failed or taken half of the budget."""
    window_delay_us: Annotated[int, Field(ge=0, le=MAX_WINDOW_DELAY_US)] = DEFAULT_WINDOW_DELAY_US
    """tcp and rdma lanes: how much longer than twice its least an answer may be on the network, in microseconds, before fewer bytes
    are asked for at once from all sidecars together; 0: no such window."""
    max_ids: Annotated[int, Field(ge=0, le=MAX_MAX_IDS)] = DEFAULT_MAX_IDS
    """Ids of the requests that Triton hands over at once; those beyond are refused as overloaded, one alone never. 0: no bound."""
    spin_us: Annotated[int, Field(ge=0, le=1_000_000)] = 50
    """How long a lookup waits spinning before it sleeps: about what a sidecar on the same machine takes for a small batch."""
    artifact: str = ""
    """Directory with plan.yaml and model.yaml, absolute or relative to the model's version directory; default: that directory."""
    shards: str = ""
    """Directory with the shard directories, for `lane: local` only; relative to the version directory."""
    features: str = ""
    """Names of the jagged features in the order of `sparse.lengths`, separated by commas. For callers: ScoreClient reads it."""
    tls_ca: str = ""
    """PEM file of the authorities that sign the sidecars' certificates; given, the control plane is encrypted. Like the next
    two, absolute or relative to the version directory."""
    tls_cert: str = ""
    """This ranker's own certificate chain, for sidecars that ask for one (mutual TLS)."""
    tls_key: str = ""
    """The private key of `tls_cert`."""
    etcd: str = ""
    """Endpoints of etcd, `host:port` separated by commas: the plan is followed there, and `plan.yaml` holds until it has one."""
    etcd_prefix: str = ""
    """Where the deployment's keys lie in etcd."""
    etcd_ca: str = ""
    """PEM file of the authorities that sign etcd's certificates; given, etcd is spoken to under TLS. Like the next two, absolute or
    relative to the version directory."""
    etcd_cert: str = ""
    """This ranker's own certificate chain towards etcd."""
    etcd_key: str = ""
    """The private key of `etcd_cert`."""


@dataclass(frozen=True)
class Settings:
    """Everything `initialize` was told."""

    name: str
    version: str
    artifact: Path
    shards: Path | None
    tls: TlsFiles | None
    coordination: Coordination | None
    device: str
    """`cpu`, or `cuda:N` where the instance kind is GPU."""
    outputs: frozenset[str]
    """Names of the outputs that config.pbtxt declares."""
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
        tls=_tls(parameters, version, where),
        coordination=_coordination(parameters, version, where),
        device=f"cuda:{args['model_instance_device_id']}" if gpu else "cpu",
        outputs=frozenset(output["name"] for output in config.get("output", [])),
        parameters=parameters,
    )


def _tls(parameters: RankerParameters, version: Path, where: str) -> TlsFiles | None:
    ca, cert, key = (version / file if file else None for file in (parameters.tls_ca, parameters.tls_cert, parameters.tls_key))
    if ca is None and (cert or key):
        raise ConfigError(f"{where}: tls_ca: missing; tls_cert and tls_key go with it")
    return TlsFiles(ca=ca, cert=cert, key=key) if ca is not None else None


def _coordination(parameters: RankerParameters, version: Path, where: str) -> Coordination | None:
    files = {name: getattr(parameters, f"etcd_{name}") for name in ("ca", "cert", "key")}
    if not parameters.etcd:
        if parameters.etcd_prefix or any(files.values()):
            raise ConfigError(f"{where}: etcd: missing; etcd_prefix, etcd_ca, etcd_cert and etcd_key go with it")
        return None
    content: dict[str, Any] = {"etcd": [e.strip() for e in parameters.etcd.split(",")], "prefix": parameters.etcd_prefix}
    if any(files.values()):
        content["tls"] = {name: file for name, file in files.items() if file}
    return decode(content, Coordination, where=f"{where}: etcd").relative_to(version)


def _typed(name: str, text: str, where: str) -> Any:
    """`text` as the number its field wants; strings stay as they are, and unknown names are left for `decode` to refuse."""
    field = RankerParameters.model_fields.get(name)
    kind = field.annotation if field is not None else str
    if kind not in (int, float):
        return int(text) if int in get_args(kind) and text.isdecimal() else text
    try:
        return kind(text)
    except ValueError:
        raise ConfigError(f"{where}: {name}: found {text!r}; allowed: {'a whole number' if kind is int else 'a number'}") from None
