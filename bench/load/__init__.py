"""Open-loop load: `run_load(target, schedule)` sends what is due when it is due, and measures from then (docs/load.md)."""

from sidepool.bench.load.result import LoadResult
from sidepool.bench.load.running import run_load
from sidepool.bench.load.schedule import Schedule, make_schedule

__all__ = ["LoadResult", "Schedule", "make_schedule", "run_load"]
