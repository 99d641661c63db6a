"""The whole way on one machine: a DLRM is trained, partitioned, served by a real Triton, and its scores are compared."""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import MofNCompleteColumn, Progress
from tritonclient.utils import InferenceServerException

from sidepool.bench.criteo import CriteoRows, generate_rows, read_rows
from sidepool.bench.deployment import DISAGGREGATED, MONOLITHIC, Deployment, deployed
from sidepool.bench.measure import Measured, Shape
from sidepool.bench.models import dlrm
from sidepool.bench.serve import make_console, measure_shapes, print_comparison
from sidepool.bench.stage_table import Stages, between, print_stages, snapshot
from sidepool.bench.stop_signals import stopped_by_signals
from sidepool.bench.traffic import Arrays, Caller, concurrently, fixed_request, infer_inputs, jagged_request
from sidepool.bench.training import DlrmBatches, train
from sidepool.wire.errors import SidepoolError, TransportError

SHARED_ROWS = Path("../shared/data/criteo_7200.tsv")
# As many as the real sample has.
GENERATED_ROWS = 7200
# What the issue of equality means in fp32: sums in another order differ by less.
TOLERANCE = 1e-5
MAX_BATCH = 512
# Enough clients that Triton finds several requests to merge.
CLIENTS = 8
MEASURED_BATCHES = (1, 128, 512)
REQUESTS_PER_SHAPE = 16
# What runs where, and what each sidecar holds and sends.
REPORT_PARAGRAPHS = 3


@dataclass(frozen=True)
class VariantResult:
    """What one variant of the model showed."""

    rows: int
    max_abs_error: float
    triton_version: str
    sidecars: int
    stages: Stages
    shapes: Mapping[str, Mapping[str, Measured]]


class Demo:
    """One run of `sidepool demo`."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._console = make_console()

    def run(self, variants: Sequence[str]) -> None:
        """All variants, then the report; raises `SidepoolError`, having stopped everything it started."""
        with stopped_by_signals():
            rows, source = self._rows()
            self._console.print(f"rows: {len(rows)} from {source}")
            try:
                results = {variant: self._variant(variant, rows) for variant in variants}
            except InferenceServerException as e:
                raise TransportError(f"Triton: {e}") from e
        path = self._args.work_dir / "report.json"
        path.write_text(json.dumps(self._report(results, source), indent=1) + "\n", encoding="utf-8")
        worst = max(result.max_abs_error for result in results.values())
        self._console.print(
            f"every score equals the unpartitioned model's: max abs error {worst:.1e}; report: {path}", style="bold green"
        )

    def _rows(self) -> tuple[CriteoRows, str]:
        """The rows to send, and where they come from."""
        path = self._args.data or (SHARED_ROWS if SHARED_ROWS.is_file() else None)
        if path is None:
            return generate_rows(self._args.rows or GENERATED_ROWS, self._args.seed), "the generator"
        return read_rows(path, self._args.rows), str(path)

    def _variant(self, variant: str, rows: CriteoRows) -> VariantResult:
        self._console.rule(f"{variant}: one id per feature" if variant == "single" else f"{variant}: MLPerf's ids per bag")
        model, example_inputs = (dlrm.single_id if variant == "single" else dlrm.multi_hot)(seed=self._args.seed)
        if self._args.train_seconds > 0:
            train(model, rows, seconds=self._args.train_seconds, seed=self._args.seed)
        batches = DlrmBatches(rows, dlrm.table_rows(), multi_hot=variant == "multi")
        work_dir = self._args.work_dir
        with deployed(
            model, example_inputs, directory=work_dir / variant, work_dir=work_dir, lane=self._args.lane, step=self._console.print
        ) as deployment:
            self._console.print("\n".join(deployment.report.text.split("\n\n")[:REPORT_PARAGRAPHS]))
            self._console.print(f"  (every table and feature: {work_dir / variant / 'report.txt'})")
            before = snapshot(deployment.server, DISAGGREGATED)
            scores = self._send_all(deployment, batches)
            stages = between(before, snapshot(deployment.server, DISAGGREGATED))
            error = self._compare(scores, model, batches)
            shapes = measure_shapes(deployment.server.grpc, _shapes(batches), rounds=self._args.rounds, console=self._console)
            version = deployment.server.version()
        print_comparison(self._console, shapes)
        print_stages(self._console, stages)
        return VariantResult(len(batches), error, version, len(deployment.report.plan.sidecars), stages, shapes)

    def _send_all(self, deployment: Deployment, batches: DlrmBatches) -> NDArray[np.float32]:
        """Every row through the plain Triton client, in batches of 1 to 512 from several clients at once."""
        scores = np.full(len(batches), np.nan, np.float32)
        callers = [Caller(deployment.server.grpc, DISAGGREGATED) for _ in range(CLIENTS)]
        try:
            with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=self._console) as progress:
                task = progress.add_task("sending rows", total=len(batches))

                def send(caller: Caller, begin: int, end: int) -> None:
                    scores[begin:end] = caller.infer(infer_inputs(request_for(batches.inputs(begin, end))))
                    progress.advance(task, end - begin)

                jobs = [partial(send, begin=begin, end=end) for begin, end in _ranges(len(batches), self._args.seed)]
                concurrently(callers, jobs)
        finally:
            for caller in callers:
                caller.close()
        return scores

    def _compare(self, scores: NDArray[np.float32], model: torch.nn.Module, batches: DlrmBatches) -> float:
        """Largest difference from the unpartitioned model; raises `SidepoolError` beyond `TOLERANCE`."""
        with torch.inference_mode():
            parts = [
                model(*batches.inputs(i, min(i + MAX_BATCH, len(batches)))).reshape(-1) for i in range(0, len(batches), MAX_BATCH)
            ]
        differences = np.abs(scores - torch.cat(parts).numpy())
        error = float(differences.max())
        if not error <= TOLERANCE:  # NaN too
            row = int(np.argmax(np.nan_to_num(differences, nan=np.inf)))
            raise SidepoolError(
                f"scores: row {row} differs by {differences[row]} from the unpartitioned model; allowed: {TOLERANCE}"
            )
        self._console.print(
            f"{len(scores)} scores compared with the unpartitioned model: max abs error {error:.1e} (allowed {TOLERANCE})"
        )
        return error

    def _report(self, results: Mapping[str, VariantResult], source: str) -> dict[str, Any]:
        """report.json: the whole run first, then each variant; shapes are named `variant/batch`."""
        first = next(iter(results.values()))
        return {
            "rows": first.rows,
            "scores_compared": sum(result.rows for result in results.values()),
            "data": source,
            "max_abs_error": max(result.max_abs_error for result in results.values()),
            "triton_version": first.triton_version,
            "sidecars": first.sidecars,
            "lane": self._args.lane,
            "disaggregated": _by_shape(results, DISAGGREGATED),
            "monolithic": _by_shape(results, MONOLITHIC),
            "variants": {
                variant: {"rows": result.rows, "max_abs_error": result.max_abs_error, "stages": asdict(result.stages)}
                for variant, result in results.items()
            },
        }


def request_for(inputs: tuple[Any, ...]) -> Arrays:
    """A Triton request with the model's own arguments: `(dense, sparse)` or `(dense, values, offsets)`."""
    dense, ids, *offsets = inputs
    if not offsets:
        return fixed_request(dense.numpy(), ids.numpy())
    lengths = np.stack([np.diff(o.numpy(), append=len(v)) for v, o in zip(ids, offsets[0], strict=True)])
    return jagged_request(dense.numpy(), lengths.astype(np.int32), np.concatenate([v.numpy() for v in ids]))


def _ranges(rows: int, seed: int) -> list[tuple[int, int]]:
    """`[begin, end)` ranges that cover all rows, 1 to 512 long and evenly spread over the orders of magnitude."""
    random = np.random.default_rng(seed)
    bounds = [0]
    while bounds[-1] < rows:
        size = int(np.exp(random.uniform(0.0, np.log(MAX_BATCH + 1))))
        bounds.append(min(rows, bounds[-1] + size))
    return list(itertools.pairwise(bounds))


def _shapes(batches: DlrmBatches) -> list[Shape]:
    """Requests of a few batch sizes, made of the rows."""
    shapes = []
    for size in (size for size in MEASURED_BATCHES if size <= len(batches)):
        begins = np.linspace(0, len(batches) - size, REQUESTS_PER_SHAPE).astype(int).tolist()
        requests = [request_for(batches.inputs(begin, begin + size)) for begin in begins]
        shapes.append(Shape(f"{size} sample{'s' if size > 1 else ''}", requests))
    return shapes


def _by_shape(results: Mapping[str, VariantResult], model: str) -> dict[str, dict[str, float]]:
    return {
        f"{variant}/{title}": measured[model].as_json()
        for variant, result in results.items()
        for title, measured in result.shapes.items()
    }
