"""`sidepool bench pool`: gathering and pooling beside FBGEMM, torch and the speed at which the same rows can be read at all.

- ours: what an engine does between a parsed frame's arrival and its response: parse, look up, pool into the payload.
- FBGEMM: its table-batched CPU operator for inference, the faster of its two on this hardware; `fbgemm_module` is the same
  called through its Python module, as its users do.
- torch: one `embedding_bag` per table.
- the ceiling: every cache line of the same rows is read, in the same order, and nothing computed.
- `ours_cached`: ours over rows that lie in the core's own cache, that is, the price of the instructions.

Each in turn, a few short blocks of which the best counts; medians over the rounds. With two threads each of them works through
all batches on its half of the tables.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

import torch
from rich.progress import track

from sidepool.bench import machine
from sidepool.bench.ids import GENERATORS
from sidepool.bench.pool_cases import SHAPES, Batch, Shape, make_batches, make_traces
from sidepool.bench.pool_contenders import (
    CEILING,
    NULL_BATCHES,
    SPARSE_TYPES,
    Contender,
    Run,
    make_contenders,
    make_tables,
    null_contenders,
)
from sidepool.bench.pool_report import Case, plot, print_report, summarise
from sidepool.bench.serve import make_console
from sidepool.wire.plan import RowFormat

# An odd number, so that the median is a measurement; so many that half of them may be disturbed.
ROUNDS = 11
QUICK_ROUNDS = 5
# A round's figure is the best of this many blocks in a row: on a machine that others use too, most interruptions are
# shorter than a block and hit anyone.
BLOCKS = 3
# Short, so that blocks fit between two interruptions by a scheduler; far above what starting two threads costs.
BLOCK_S = 0.003
# A first guess at how many batches fill a block is good enough once it has run this long.
CALIBRATION_S = BLOCK_S / 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `sidepool bench pool`."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="also draw them")
    parser.add_argument("--quick", action="store_true", help="uniform ids and fewer rounds: about a minute")
    parser.add_argument("--seed", type=int, default=1)


def run(args: argparse.Namespace) -> int:
    """Measure, print a table, write JSON and plot."""
    console = make_console()
    torch.set_num_threads(1)
    about = machine.describe(args.seed)
    console.print("  ".join(f"{key}: {value}" for key, value in about.items()))
    rounds, kinds = (QUICK_ROUNDS, ("uniform",)) if args.quick else (ROUNDS, tuple(GENERATORS))
    with ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,)) as workers:
        nothing = null_contenders()
        null = dict(zip((c.name for c in nothing), _measure(nothing, NULL_BATCHES, 1, rounds, workers), strict=True))
        console.print("null system, µs per batch: " + ", ".join(f"{name} {us:.2f}" for name, us in null.items()))
        total = len(SHAPES) * len(kinds) * len(SPARSE_TYPES) * 2
        measured = track(measure(kinds, rounds, args.seed, workers), "measuring", total=total, console=console, transient=True)
        cases = list(measured)
    print_report(console, cases)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        results = about | {"null_us": null, "summary": summarise(cases), "cases": [case.as_json() for case in cases]}
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        console.print(f"written to {args.json}")
    if args.plot is not None:
        plot(cases, args.plot)
        console.print(f"drawn to {args.plot}")
    return 0


def measure(kinds: Sequence[str], rounds: int, seed: int, workers: Executor) -> Iterator[Case]:
    """All cases; shapes whose tables are alike share them."""
    for _, group in itertools.groupby(SHAPES, key=lambda s: (s.tables, s.rows, s.dim)):
        shapes = list(group)
        batches = {(s.name, kind): make_batches(s, make_traces(kind, s, seed)) for kind in kinds for s in shapes}
        for row_format in SPARSE_TYPES:
            tables = make_tables(shapes[0], row_format, seed)
            for shape, kind in itertools.product(shapes, kinds):
                contenders = make_contenders(dataclasses.replace(tables, shape=shape), batches[shape.name, kind])
                for threads in (1, 2):
                    yield _case(shape, kind, row_format, threads, contenders, batches[shape.name, kind], rounds, workers)
            del tables  # before the next ones are made: one pair of copies at a time


def _case(
    shape: Shape,
    kind: str,
    row_format: RowFormat,
    threads: int,
    contenders: Sequence[Contender],
    batches: Sequence[Batch],
    rounds: int,
    workers: Executor,
) -> Case:
    present = [c for c in contenders if threads == 1 or c.halves is not None]
    medians = dict(zip((c.name for c in present), _measure(present, len(batches), threads, rounds, workers), strict=True))
    return Case(
        shape=shape,
        ids=kind,
        row_format=str(row_format),
        threads=threads,
        ours_us=medians["ours"],
        fbgemm_us=medians["fbgemm"],
        fbgemm_module_us=medians.get("fbgemm_module"),
        torch_us=medians.get("torch"),
        ours_cached_us=medians.get("ours_cached"),
        ceiling_us=min(us for name, us in medians.items() if name.startswith(CEILING)),
    )


def _measure(contenders: Sequence[Contender], batches: int, threads: int, rounds: int, workers: Executor) -> list[float]:
    """Median µs per batch of each contender."""
    blocks = [_Blocks(c, batches, threads, workers) for c in contenders]
    for turn in range(rounds):
        for block in blocks if turn % 2 == 0 else reversed(blocks):
            block.run()
    return [statistics.median(b.taken_us) for b in blocks]


class _Blocks:
    """One contender's rounds; each block goes on in the cycle of batches where the one before it ended."""

    def __init__(self, contender: Contender, batches: int, threads: int, workers: Executor) -> None:
        self.taken_us: list[float] = []
        self._batches = batches
        self._next = 0
        self._run = _both_halves(contender, workers) if threads == 2 else _whole(contender)
        self._size = self._calibrate()

    def run(self) -> None:
        best = min(self._time(self._size) for _ in range(BLOCKS))
        self.taken_us.append(best / self._size * 1e6)

    def _calibrate(self) -> int:
        """Batches of a block; running them warms the contender up."""
        size = 1
        # The best of several: one hiccup must not pass for the time of a block, or blocks are of a few batches and all overhead.
        while (seconds := min(self._time(size) for _ in range(BLOCKS))) < CALIBRATION_S:
            size *= 2
        return max(1, math.ceil(size * BLOCK_S / seconds))

    def _time(self, count: int) -> float:
        stretches = []
        while count > 0:
            length = min(count, self._batches - self._next)
            stretches.append((self._next, length))
            self._next = (self._next + length) % self._batches
            count -= length
        begin = time.perf_counter()
        self._run(stretches)
        return time.perf_counter() - begin


Stretches = Sequence[tuple[int, int]]


def _whole(contender: Contender) -> Callable[[Stretches], None]:
    def run(stretches: Stretches) -> None:
        _go(contender.whole, stretches)

    return run


def _both_halves(contender: Contender, workers: Executor) -> Callable[[Stretches], None]:
    halves = contender.halves
    assert halves is not None

    def run(stretches: Stretches) -> None:
        for done in [workers.submit(_go, half, stretches) for half in halves]:
            done.result()

    return run


def _go(run: Run, stretches: Stretches) -> None:
    for first, count in stretches:
        run(first, count)
