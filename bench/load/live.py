"""What a person sees while a load runs: one line, rewritten twice a second. Nothing where there is no terminal."""

from __future__ import annotations

import sys
from typing import TextIO

import numpy as np

from sidepool.bench.load.result import LoadResult
from sidepool.bench.load.running import View
from sidepool.bench.load.target import OK, WAITING

# What is shown is of the last seconds: more jumps about, less hides a change.
WINDOW_S = 5.0
# ANSI: back to the first column, and clear to the end of the line.
_REWRITE = "\r\x1b[K"


def live_view(stream: TextIO = sys.stderr) -> View | None:
    """A view for `run_load` that writes to `stream`, or None where that is no terminal."""
    if not stream.isatty():
        return None

    def show(result: LoadResult) -> None:
        stream.write(_REWRITE + line(result))
        stream.flush()

    return show


def end_view(stream: TextIO = sys.stderr) -> None:
    """Take the line away."""
    if stream.isatty():
        stream.write(_REWRITE)
        stream.flush()


def line(result: LoadResult) -> str:
    """The state of a load that is running, in at most 100 characters."""
    sent, status = result.sent_ns >= 0, result.status
    over = status != WAITING
    now_ns = int(max(result.sent_ns.max(initial=0), result.done_ns.max(initial=0)))
    recent_ns = max(0, now_ns - int(WINDOW_S * 1e9))
    answered = (status == OK) & (result.done_ns >= recent_ns)
    latency = (result.done_ns - result.schedule.due_ns)[answered] / 1e6
    p50, p99 = np.percentile(latency, (50, 99)) if latency.size else (float("nan"), float("nan"))
    per_s = latency.size / max((now_ns - recent_ns) / 1e9, 1e-9)
    outstanding, errors = int((sent & ~over).sum()), int((over & (status != OK)).sum())
    at = f"{now_ns / 1e9:5.1f}/{result.schedule.seconds:.0f} s"
    return f"{at}  {per_s:8.0f}/s  p50 {p50:.2f}  p99 {p99:.2f} ms  outstanding {outstanding}  errors {errors}"
