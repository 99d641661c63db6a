"""Train a DLRM briefly, so that the demo compares scores that mean something."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sidepool.bench.criteo import CriteoRows, multi_hot_ids
from sidepool.bench.models.dlrm import MultiHotDlrm, SingleIdDlrm

BATCH = 128
# Plain SGD touches only the rows of a batch; the gradient of one row comes from few samples, hence the high rate.
TABLE_RATE = 2.0
# Adagrad's usual rate.
NET_RATE = 0.01
# The demo leaves the machine usable; both of its cores at most.
THREADS = 2


@dataclass(frozen=True)
class TrainingResult:
    """Mean binary cross-entropy over the rows before and after, steps taken and seconds spent."""

    loss_before: float
    loss_after: float
    steps: int
    seconds: float


class DlrmBatches:
    """Model inputs for row ranges: `(dense, sparse)`, or `(dense, values, offsets)` with MLPerf's ids per bag."""

    def __init__(self, rows: CriteoRows, table_rows: Sequence[int], *, multi_hot: bool) -> None:
        self.labels = torch.from_numpy(rows.labels)
        self._dense = torch.from_numpy(rows.dense())
        self._ids = rows.ids(table_rows)
        self._bags: tuple[NDArray[np.int64], ...] | None = multi_hot_ids(self._ids, table_rows) if multi_hot else None

    def __len__(self) -> int:
        return int(self.labels.shape[0])

    def inputs(self, begin: int, end: int) -> tuple[Tensor, ...] | tuple[Tensor, list[Tensor], list[Tensor]]:
        """The model's arguments for rows `[begin, end)`."""
        dense = self._dense[begin:end]
        if self._bags is None:
            return dense, torch.from_numpy(self._ids[begin:end])
        bags = [bag[begin:end] for bag in self._bags]
        values = [torch.from_numpy(bag.reshape(-1)) for bag in bags]
        offsets = [torch.arange(0, bag.size, bag.shape[1]) for bag in bags]
        return dense, values, offsets


def train(model: SingleIdDlrm | MultiHotDlrm, rows: CriteoRows, *, seconds: float, seed: int = 0) -> TrainingResult:
    """Train in place for at most `seconds`, and at most one pass over the rows; prints the loss before and after.

    Leaves the model in eval mode and torch's thread count as it was.
    """
    table_rows = [weight.shape[0] for weight in model.tables.parameters()]
    batches = DlrmBatches(rows, table_rows, multi_hot=isinstance(model, MultiHotDlrm))
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        before = _loss(model, batches)
        started = time.monotonic()
        # The gradients come from torch itself; checking their indices again would cost more than the step.
        with torch.sparse.check_sparse_tensor_invariants(enable=False):  # type: ignore[no-untyped-call]
            steps = _one_pass(model, batches, started + seconds, seed)
        spent = time.monotonic() - started
        after = _loss(model, batches)
    finally:
        torch.set_num_threads(threads)
        model.eval()
    print(f"trained {steps} steps of {BATCH} rows in {spent:.1f} s: loss {before:.4f} -> {after:.4f}")
    return TrainingResult(before, after, steps, spent)


def _one_pass(model: SingleIdDlrm | MultiHotDlrm, batches: DlrmBatches, until: float, seed: int) -> int:
    model.train()
    tables = torch.optim.SGD(model.tables.parameters(), lr=TABLE_RATE)
    nets = torch.optim.Adagrad([*model.bottom.parameters(), *model.top.parameters()], lr=NET_RATE)
    order = np.random.default_rng(seed).permutation(max(1, len(batches) // BATCH))
    for step, position in enumerate(order.tolist()):
        if time.monotonic() >= until:
            return step
        begin, end = position * BATCH, min((position + 1) * BATCH, len(batches))
        tables.zero_grad()
        nets.zero_grad()
        scores = model(*batches.inputs(begin, end)).squeeze(1)
        torch.autograd.backward(torch.nn.functional.binary_cross_entropy(scores, batches.labels[begin:end]))
        tables.step()
        nets.step()
    return len(order)


def _loss(model: SingleIdDlrm | MultiHotDlrm, batches: DlrmBatches) -> float:
    """Mean loss over at most the first 4096 rows: enough to compare, quick on any machine."""
    model.eval()
    end = min(len(batches), 4096)
    with torch.inference_mode():
        scores = model(*batches.inputs(0, end)).squeeze(1)
        return float(torch.nn.functional.binary_cross_entropy(scores, batches.labels[:end]))
