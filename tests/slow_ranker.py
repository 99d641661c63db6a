"""A ranker in a process of its own, so that a test can stop it while a response is on its way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sidecar_process import PATIENCE_S

from sidepool.client.embedding import EmbeddingClient
from sidepool.wire.plan import Plan


def look_up_once(plan: Plan, ids: NDArray[np.int64], lengths: NDArray[np.int32], out: Path) -> None:
    """One lookup over tcp; the pooled vectors go to the file `out`."""
    with EmbeddingClient.connect(plan, lane="tcp") as client:
        np.save(out, client.lookup(ids, lengths, deadline_ms=1000 * PATIENCE_S).out)
