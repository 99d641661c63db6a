"""One client process of `sidepool bench soak`: threads that look up without pause and check every value.

Speaks JSON lines: prints what it has counted when told so by a line on stdin, and ends at the end of stdin.
"""

from __future__ import annotations

import json
import sys
import threading
from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sidepool.client import EmbeddingClient
from sidepool.client.lanes import Lane
from sidepool.wire.errors import SidepoolError

TABLES, ROWS, DIM = 8, 10_000, 32
BATCHES = (1, 8, 64)
# Two hundred lookups share a few cores: a healthy one may wait long for its turn, a lost one for ever.
DEADLINE_MS = 20_000.0


def row_value(table: Any, row: Any) -> Any:
    """What every element of a row is: exact in float32, different for every row of every table."""
    return table * ROWS + row


class Looker(threading.Thread):
    """Looks random ids up, one per table and sample, until told to stop."""

    def __init__(self, client: EmbeddingClient, seed: int, stop: threading.Event) -> None:
        super().__init__(name=f"looker-{seed}")
        self._client, self._stop = client, stop
        self._random = np.random.default_rng(seed)
        self.right = self.wrong = 0
        self.errors: Counter[str] = Counter()

    def run(self) -> None:
        outputs = {batch: np.empty((batch, TABLES * DIM), np.float32) for batch in BATCHES}
        while not self._stop.is_set():
            out = outputs[int(self._random.choice(BATCHES))]
            ids = self._random.integers(0, ROWS, (len(out), TABLES))
            out.fill(-1)
            try:
                self._client.lookup_fixed(ids, out, deadline_ms=DEADLINE_MS)
            except SidepoolError as e:
                self.errors[e.code] += 1
                continue
            if self._is_right(ids, out):
                self.right += 1
            else:
                self.wrong += 1

    @staticmethod
    def _is_right(ids: NDArray[np.int64], out: NDArray[np.float32]) -> bool:
        expected = row_value(np.arange(TABLES), ids)
        return bool((out.reshape(len(ids), TABLES, DIM) == expected[:, :, None]).all())


def main(plan: str, lane: Lane, threads: int, seed: int) -> None:
    """Run until stdin ends."""
    stop = threading.Event()
    with EmbeddingClient.connect(plan, lane=lane, name=f"soak {seed}") as client:
        lookers = [Looker(client, seed * 1000 + i, stop) for i in range(threads)]
        for looker in lookers:
            looker.start()
        try:
            for _ in sys.stdin:
                errors = sum((looker.errors for looker in lookers), Counter())
                counted = {"right": sum(k.right for k in lookers), "wrong": sum(k.wrong for k in lookers), "errors": dict(errors)}
                print(json.dumps(counted), flush=True)
        finally:
            stop.set()
            for looker in lookers:
                looker.join()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))  # type: ignore[arg-type]
