"""Tune one model: a climb whose every step is a real Triton with its sidecars under a real load."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sidepool.bench.traffic import Arrays
from sidepool.bench.tuning.climb import GAIN, Climb
from sidepool.bench.tuning.knobs import QUEUE_SHARE, Knobs, Queries, Steps, starting_points, steps
from sidepool.bench.tuning.probing import BUSY, IDLE, prober
from sidepool.bench.tuning.rates import better_rate, highest_rate
from sidepool.bench.tuning.variants import Variant, served

NAME = "model"
# What a model that is served whole has of the knobs.
WHOLE_KNOBS = ("instances", "max_batch", "torch_threads", "delay_us")


@dataclass(frozen=True)
class Limit:
    """`percent` of the requests within `ms` milliseconds."""

    percent: float
    ms: float

    def __str__(self) -> str:
        return f"p{self.percent:g}={self.ms:g}ms"


@dataclass(frozen=True)
class Job:
    """What is tuned, for what, under what."""

    model: Path
    """An artifact; with `whole`, a model's directory in a Triton repository."""
    limit: Limit
    requests: Sequence[Arrays]
    queries: Queries
    about: dict[str, Any]
    """What makes scores comparable: model, sizes, machine."""
    directory: Path
    """State and trial copies lie here."""
    work_dir: Path
    """Keeps the Triton installation."""
    seed: int = 0
    scale: float = 1.0
    whole: bool = False
    shared_memory: bool = False

    def score(self, knobs: Knobs, beat: float) -> float:
        """Serve the setting, and find the highest rate within the limit; 0 where it does not beat `beat`."""
        variant = Variant(knobs, self.model) if self.whole else Variant.of(self.model, knobs)
        with (
            served(
                {NAME: variant},
                least_batch=self.queries.least_batch,
                limit_ms=self.limit.ms,
                directory=self.directory / "trial",
                work_dir=self.work_dir,
            ) as server,
            prober(server.grpc, NAME, self.requests, seed=self.seed, scale=self.scale, shared_memory=self.shared_memory) as (
                probe,
                alone_s,
            ),
        ):

            def meets(rate: float) -> bool:
                return probe.meets(rate, limit_ms=self.limit.ms, percent=self.limit.percent)

            return better_rate(meets, beat, GAIN) if beat else highest_rate(meets, BUSY / alone_s, IDLE / alone_s)

    def climb(self, *, minutes: float, told: Callable[[str], None], cores: int | None = None) -> Climb:
        """A climb that measures for at most so many minutes, this time; `run` it."""
        count = cores or len(os.sched_getaffinity(0))
        begin = time.monotonic()
        starts, ranges = starting_points(count, self.queries), steps(count, self.queries)
        if self.whole:
            starts, ranges = _of_whole(starts, ranges)
        return Climb(
            starts=starts,
            steps=ranges,
            score=self.score,
            state=self.directory / "climb.json",
            about=self.about | {"limit": str(self.limit), "queue": QUEUE_SHARE},
            may_go_on=lambda: time.monotonic() - begin < 60 * minutes,
            told=told,
        )


def _of_whole(starts: Sequence[Knobs], ranges: Steps) -> tuple[list[Knobs], Steps]:
    plain = Knobs()
    kept = [replace(plain, **{name: getattr(start, name) for name in WHOLE_KNOBS}) for start in starts]
    most = max(ranges["torch_threads"])
    return [*kept, replace(plain, torch_threads=most)], {name: ranges[name] for name in WHOLE_KNOBS}
