"""Programs behind a real sidecar process: right under load on every lane, hostile records refused, an end without rests."""

from __future__ import annotations

import contextlib
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from sidecar_process import RunningSidecar, ready
from torch import Tensor, nn

from sidepool.bench.triton_server import free_ports
from sidepool.client import EmbeddingClient, Pipeline
from sidepool.partition import partition_model
from sidepool.wire.errors import LookupRejected
from sidepool.wire.plan import Plan

ROWS, LENGTH = 60, 20


class History(nn.Module):
    """What of a history goes with an item; `squashed`: through an operator that only torch has."""

    def __init__(self, *, squashed: bool) -> None:
        super().__init__()
        self.items, self.squashed = nn.Embedding(ROWS, 12), squashed
        self.layer, self.top = nn.Linear(24, 1), nn.Linear(24, 1)

    def forward(self, history: Tensor, item: Tensor) -> Tensor:
        rows, one = self.items(history), self.items(item)
        scores = self.layer(torch.cat([rows, rows * one.unsqueeze(1)], dim=2))
        scores = torch.erfinv(torch.tanh(scores) / 2) if self.squashed else scores
        return self.top(torch.cat([(rows * torch.softmax(scores, 1)).sum(1), one], dim=1))


def given(batch: int) -> tuple[Tensor, Tensor]:
    return torch.randint(0, ROWS, (batch, LENGTH)), torch.randint(0, ROWS, (batch,))


@pytest.mark.parametrize("squashed", [False, True])
def test_a_program_serves_many_threads_on_every_lane_and_its_sidecar_ends_in_order(tmp_path: Path, squashed: bool) -> None:
    torch.manual_seed(7)
    model, out = History(squashed=squashed).eval(), tmp_path / "out"
    address = f"127.0.0.1:{free_ports(1)[0]}"
    report = partition_model(
        model, given(4), out, name="m", sidecars=1, addresses=[address], link="10g-tcp", sidecar_torch=squashed
    )
    assert [t.name for t in report.plan.tables if t.program is not None] == ["items.program"]
    config = out / "sidecars/sidecar-0/sidecar.yaml"
    settings = yaml.safe_load(config.read_text(encoding="utf-8"))
    config.write_text(yaml.safe_dump({**settings, "engines": 2}), encoding="utf-8")
    with ready(config) as (process, _):
        for lane in ("shm", "tcp", "grpc"):
            with contextlib.ExitStack() as stack:
                opened = [stack.enter_context(Pipeline.open(out, lane=lane)) for _ in range(3)]  # type: ignore[arg-type]
                list(stack.enter_context(ThreadPoolExecutor(3)).map(lambda p: score(p, model), opened))
        refuses_hostile_records(report.plan, process)
        process.send(signal.SIGTERM)
        assert process.wait() == 0


def score(pipeline: Pipeline, model: nn.Module) -> None:
    """Compare with the model; batches beyond what one engine takes alone."""
    with torch.no_grad():
        for batch in (1, 5, 600):
            arguments = given(batch)
            torch.testing.assert_close(pipeline(*arguments, deadline_ms=10_000), model(*arguments), rtol=1e-5, atol=1e-6)


def refuses_hostile_records(plan: Plan, process: RunningSidecar) -> None:
    """Records of other lengths and with wild ids, past the checks of the ranker's index program."""
    computed = [f.name for f in plan.features].index("items.program")
    words = next(t.program.words for t in plan.tables if t.program is not None)
    with EmbeddingClient.connect(plan, lane="tcp") as client:

        def look_up(length: int, word: int) -> None:
            lengths = np.ones((len(plan.features), 2), np.int32)
            lengths[computed] = length
            values = np.zeros(int(lengths.sum()), np.int64)
            values[-length:] = word
            client.lookup(values, lengths)

        look_up(words, 0)
        for length, word in ((words - 1, 0), (words + 1, 0), (words, ROWS), (words, -1), (words, 1 << 62)):
            with pytest.raises(LookupRejected):
                look_up(length, word)
        look_up(words, ROWS - 1)
    assert process.process.poll() is None
