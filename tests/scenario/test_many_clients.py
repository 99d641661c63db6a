"""A short soak: many processes and threads at full load, two stopped among them (`sidepool bench soak` is the long one)."""

from __future__ import annotations

from pathlib import Path

import pytest

from sidepool.bench.soak import soak

# Of one process within the second half of a few seconds. A hundred bytes lost per lookup would already show as more.
GROWTH_MB = 4.0


@pytest.mark.slow
def test_many_clients_get_right_values_and_leave_nothing(tmp_path: Path) -> None:
    seen = soak(tmp_path, minutes=0.1, processes=8, threads=10, say=print)
    kept = seen["kept"]
    del kept["memory"]  # a slope over three seconds says nothing; the growth below does
    assert kept == dict.fromkeys(kept, True), seen
    assert seen["lookups"] > 1000
    assert [name for name, (begin, end) in seen["rss_mb"].items() if end - begin > GROWTH_MB] == [], seen
