"""The dense forward of a batch as sub-batches on several cores, and which batches are worth the GPU."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sidepool.client.dense import DenseGraph

if TYPE_CHECKING:
    from torch import Tensor

Arrays = list[NDArray[Any]]


class SplitDense:
    """Runs a `DenseGraph` on a batch in sub-batches of about equal size. Used by one thread, which does a share of the work.

    A sub-batch on a core of its own makes one batch faster; larger ones cost less per sample, and leave the cores to other
    batches. Which is better depends on model and load: `sidepool tune` finds it out, and `split_samples` may change at any time.
    """

    def __init__(
        self,
        dense: DenseGraph,
        *,
        workers: int,
        split_samples: int,
        torch_threads: int,
        cpu: DenseGraph | None,
        gpu_min_samples: int,
    ) -> None:
        """split_samples: a sub-batch has at most so many samples; 0: batches stay whole. workers: threads that share sub-batches.

        torch_threads: of each worker's forward; 0: torch's choice. cpu: the same program there, for batches of fewer than
        `gpu_min_samples` samples; None: all go to `dense`. A GPU's own batches stay whole.
        """
        import torch

        self.split_samples = split_samples
        self._dense, self._cpu, self._gpu_min_samples = dense, cpu, gpu_min_samples
        self._workers = workers
        # OpenMP counts threads per calling thread: each worker has to say it again.
        settle = (lambda: torch.set_num_threads(torch_threads)) if torch_threads else None
        self._pool = ThreadPoolExecutor(workers - 1, "sidepool-dense", settle) if workers > 1 else None

    def close(self) -> None:
        """End the workers. Idempotent."""
        if self._pool is not None:
            self._pool.shutdown()

    def run(self, pooled: Tensor, sequences: Sequence[NDArray[Any]], inputs: Mapping[str, Tensor]) -> Arrays:
        """The outputs of `DenseGraph.run` as arrays, of the whole batch."""
        samples = len(pooled)
        dense = self._cpu if self._cpu is not None and samples < self._gpu_min_samples else self._dense
        if not 0 < self.split_samples < samples or dense.device.type != "cpu":
            return [tensor.numpy() for tensor in dense.run(pooled, sequences, inputs)]
        pieces = -(-samples // self.split_samples)
        bounds = [samples * i // pieces for i in range(pieces + 1)]
        results: list[Arrays] = [[] for _ in range(pieces)]
        waiting, lock = iter(range(pieces)), threading.Lock()

        def work() -> None:
            for i in _taken(waiting, lock):
                begin, end = bounds[i], bounds[i + 1]
                cut = [rows[len(rows) // samples * begin : len(rows) // samples * end] for rows in sequences]
                given = {name: tensor[begin:end] for name, tensor in inputs.items()}
                results[i] = [tensor.numpy() for tensor in dense.run(pooled[begin:end], cut, given)]

        helpers = [self._pool.submit(work) for _ in range(min(self._workers, pieces) - 1)] if self._pool is not None else []
        try:
            work()
        finally:
            for helper in helpers:  # they read this batch's memory: none may outlive it, whatever happens here
                helper.exception()
        for helper in helpers:
            helper.result()
        return [np.concatenate(parts) for parts in zip(*results, strict=True)]


def _taken(waiting: Iterator[int], lock: threading.Lock) -> Iterator[int]:
    while True:
        with lock:
            i = next(waiting, None)
        if i is None:
            return
        yield i
