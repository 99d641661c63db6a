"""What is tuned, how far each knob goes, and where it is written: Triton's config.pbtxt and a sidecar's sidecar.yaml."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import yaml

Steps = Mapping[str, tuple[int, ...]]
"""By knob: the values it may take, ascending."""

# Of the limit, what a request may wait in Triton's queue. Under lasting overload whatever leaves the queue has waited that long:
# the rest is for serving it. A longer queue would serve no more.
QUEUE_SHARE = 0.5

_RANKER = ("torch_threads", "workers", "split_samples", "spin_us")


@dataclass(frozen=True)
class Knobs:
    """One setting of a deployment. A model that is served whole has the first four."""

    instances: int = 1
    """Triton's instances of the model: processes that answer different requests at once."""
    torch_threads: int = 1
    max_batch: int = 0
    """What Triton merges at most, in its own unit: samples, or requests where ids are jagged. 0: nothing is merged."""
    delay_us: int = 0
    """How long a request waits in Triton for others."""
    workers: int = 1
    split_samples: int = 0
    spin_us: int = 50
    engines: int = 1
    engine_spin_us: int = 5

    def as_json(self) -> dict[str, int]:
        return asdict(self)

    def settled(self) -> Knobs:
        """The same without what has no effect: so that two settings that mean the same are equal."""
        return replace(self, delay_us=self.delay_us if self.max_batch else 0, workers=self.workers if self.split_samples else 1)


@dataclass(frozen=True)
class Queries:
    """What a deployment is asked."""

    largest: int
    """Samples of the largest query."""
    jagged: bool = False
    """Triton then counts requests, not samples."""
    divisible: bool = True
    """False where the dense half reads ids of bags: batches then stay whole."""

    @property
    def least_batch(self) -> int:
        """What Triton must take at once, in its own unit."""
        return 1 if self.jagged else self.largest

    @property
    def merged(self) -> tuple[int, ...]:
        """Values of `max_batch`: nothing merged, then from what the largest query has, or a few requests, on."""
        return (0, 4, 16, 64) if self.jagged else (0, self.largest, 2 * self.largest, 4 * self.largest)


def static_baseline(cores: int, queries: Queries) -> Knobs:
    """DeepRecSys's baseline: the largest query is split evenly over all cores; queries are not merged."""
    return Knobs(instances=cores, workers=cores, split_samples=-(-queries.largest // cores) * queries.divisible)


def starting_points(cores: int, queries: Queries) -> list[Knobs]:
    """Where a climb begins: the baseline, queries side by side, and more of them merged for one process that uses all cores."""
    return [
        static_baseline(cores, queries),
        Knobs(instances=cores, engines=cores, max_batch=queries.merged[1]),
        Knobs(max_batch=queries.merged[2], workers=cores, split_samples=256 * queries.divisible),
    ]


def steps(cores: int, queries: Queries) -> Steps:
    """The knobs of a partitioned model, those that matter most first."""
    upto = tuple(n for n in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128) if n <= cores)
    return {
        "split_samples": (0, 32, 64, 128, 256, 512) if queries.divisible else (0,),
        "engines": upto,
        "instances": upto,
        "max_batch": queries.merged,
        "workers": upto,
        "torch_threads": upto,
        "delay_us": (0, 500, 2000),
        "engine_spin_us": (0, 5, 50),
        "spin_us": (0, 50, 200),
    }


def neighbour(knobs: Knobs, name: str, ranges: Steps, upwards: bool) -> Knobs | None:
    """The setting one step up, or down; None at the end. A value between two steps has these two beside it."""
    value = getattr(knobs, name)
    further = [v for v in ranges[name] if (v > value if upwards else v < value)]
    return replace(knobs, **{name: (min if upwards else max)(further)}) if further else None


def triton_config(text: str, knobs: Knobs, *, name: str, least_batch: int, limit_ms: float, online: bool = False) -> str:
    """`config.pbtxt` with these knobs and that name; everything else stays.

    least_batch: of `max_batch_size`. limit_ms: what Triton's queue refuses for; online: and the ranker adjusts `split_samples` for.
    """
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    config = text_format.Parse(text, model_config_pb2.ModelConfig())
    config.name = name
    config.max_batch_size = max(least_batch, knobs.max_batch)
    batching = config.dynamic_batching  # also where nothing is merged: Triton's plain queue refuses nothing, however late
    batching.max_queue_delay_microseconds = knobs.settled().delay_us
    batching.default_queue_policy.default_timeout_microseconds = int(QUEUE_SHARE * limit_ms * 1000)
    # A batch that has begun takes nothing that would make it larger than every preferred size.
    batching.preferred_batch_size[:] = [] if knobs.max_batch else [1]
    config.instance_group[0].count = knobs.instances
    for key in _RANKER:
        config.parameters[key].string_value = str(getattr(knobs, key))
    if online:
        config.parameters["limit_ms"].string_value = f"{limit_ms:g}"
    return text_format.MessageToString(config)


def sidecar_config(text: str, knobs: Knobs, address: str | None = None) -> str:
    """`sidecar.yaml` with these knobs, listening at `address` (`host:port`) if one is given."""
    settings: dict[str, Any] = yaml.safe_load(text)
    settings |= {"engines": knobs.engines, "spin_us": knobs.engine_spin_us}
    if address is not None:
        settings["listen"] |= {"grpc": address, "tcp": f"{address.rpartition(':')[0]}:0"}
    return yaml.safe_dump(settings, sort_keys=False)
