"""One `sidepool load`: from its options to a report."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from sidepool.bench import machine
from sidepool.bench.criteo import read_rows
from sidepool.bench.load import arrivals, sizes
from sidepool.bench.load.calls import CallTarget
from sidepool.bench.load.live import end_view, live_view
from sidepool.bench.load.lookups import LookupTarget
from sidepool.bench.load.model_requests import Inputs, PartitionedModel, criteo_requests, generated_requests
from sidepool.bench.load.result import PERCENTILES, LoadResult
from sidepool.bench.load.running import run_load
from sidepool.bench.load.schedule import Schedule, make_schedule
from sidepool.bench.load.target import Target
from sidepool.bench.load.triton import TritonTarget
from sidepool.bench.serve import make_console
from sidepool.bench.stop_signals import stopped_by_signals
from sidepool.client import EmbeddingClient
from sidepool.client.pipeline import Pipeline
from sidepool.wire.errors import ConfigError
from sidepool.wire.model import PLAN_FILE


class Session:
    """The options, checked, and what follows from them."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Raises `ConfigError` naming the option."""
        self._args = args
        if args.target is None:
            args.target = "triton" if args.triton else None
        if args.target is None or (args.target == "triton") != (args.triton is not None):
            raise ConfigError("--triton: a gRPC address goes with --target triton, and with no other; allowed: one of the two")
        for option in ("rate", "seconds", "requests", "ids_per_bag"):
            if not getattr(args, option) > 0:
                raise ConfigError(f"--{option.replace('_', '-')}: found {getattr(args, option)}; allowed: above 0")
        if args.mlperf and args.target != "triton":
            raise ConfigError("--mlperf: found another target than Triton; allowed: with --triton")
        self._model = PartitionedModel(args.artifact)
        self._sizes = sizes.parse_sizes(args.sizes)(args.requests, args.seed)

    def run(self) -> int:
        console = make_console()
        requests = self._requests()
        with stopped_by_signals():
            if self._args.mlperf:
                return self._mlperf(console, requests)
            with contextlib.closing(self._target(requests)) as target:
                return self._load(console, target)

    def _load(self, console: Console, target: Target) -> int:
        args = self._args
        try:
            result = run_load(target, self._schedule(), warmup_s=args.warmup, slo_ms=args.slo_ms, view=live_view())
        finally:
            end_view()
        about = machine.describe(args.seed) | {"arrivals": args.arrivals, "sizes": sizes.describe(self._sizes), "ids": args.ids}
        print_report(console, result, about)
        if args.json is not None:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(about | result.as_json(), indent=1) + "\n", encoding="utf-8")
            console.print(f"written to {args.json}")
        if args.plot is not None:
            from sidepool.bench.load.picture import plot

            plot(result, args.plot)
            console.print(f"drawn to {args.plot}")
        return 0 if result.latency_ns.size else 1

    def _schedule(self) -> Schedule:
        args = self._args
        if args.arrivals in arrivals.ARRIVALS:
            due_ns = arrivals.ARRIVALS[args.arrivals](args.rate, args.seconds, args.seed)
            return make_schedule(due_ns, args.requests, args.seed, seconds=args.seconds)
        if not Path(args.arrivals).exists():
            allowed = f"{', '.join(arrivals.ARRIVALS)}, or a file of timestamps"
            raise ConfigError(f"--arrivals: found {args.arrivals!r}; allowed: {allowed}")
        return make_schedule(arrivals.replay(Path(args.arrivals)), args.requests, args.seed)

    def _requests(self) -> list[Inputs]:
        args = self._args
        kind, _, file = args.ids.partition(":")
        if kind == "criteo":
            return criteo_requests(self._model, self._sizes, read_rows(Path(file)), ids_per_bag=args.ids_per_bag)
        return generated_requests(self._model, self._sizes, ids=args.ids, ids_per_bag=args.ids_per_bag, seed=args.seed)

    def _target(self, requests: list[Inputs]) -> Target:
        args = self._args
        if args.target == "triton":
            return TritonTarget(
                args.triton,
                args.model or self._model.model.name,
                [self._model.triton(inputs) for inputs in requests],
                deadline_ms=args.deadline_ms,
                shared_memory=args.shared_memory,
                connections=args.connections,
            )
        limits: dict[str, Any] = {} if args.deadline_ms is None else {"deadline_ms": args.deadline_ms}
        if args.target == "pipeline":
            return _PipelineTarget(args.artifact, self._model, requests, 1 if args.callers is None else args.callers, limits)
        if args.callers is not None:
            limits["callers"] = args.callers
        lane = "local" if args.target == "lookups" else args.lane
        return _ClientTarget(args.artifact, self._model, requests, lane, limits)

    def _mlperf(self, console: Console, requests: list[Inputs]) -> int:
        from sidepool.bench.load.mlperf import LATENCY_MS, run_mlperf

        args = self._args
        done = run_mlperf(
            args.triton,
            args.model or self._model.model.name,
            [self._model.triton(inputs) for inputs in requests],
            scenario=args.mlperf,
            rate=args.rate,
            seconds=args.seconds,
            directory=args.mlperf_dir,
            latency_ms=args.slo_ms or LATENCY_MS,
            deadline_ms=args.deadline_ms,
        )
        for name, value in done.summary.items():
            console.print(f"{name}: {value}")
        if done.failed:
            console.print(f"failed requests, which LoadGen counts as answered: {done.failed}")
        console.print(f"LoadGen's files are in {done.directory}")
        return 0 if done.valid else 1


class _ClientTarget(LookupTarget):
    """A `LookupTarget` with a client of its own."""

    def __init__(self, artifact: Path, model: PartitionedModel, requests: list[Inputs], lane: Any, limits: dict[str, Any]) -> None:
        shards = artifact if lane == "local" else None
        self._own = EmbeddingClient.connect(
            model.directory / PLAN_FILE, lane=lane, shards_dir=shards, fixed_columns=model.router.fixed_columns, name="load"
        )
        super().__init__(self._own, [model.part(inputs) for inputs in requests], **limits)

    def close(self) -> None:
        self._own.close()


class _PipelineTarget(CallTarget):
    """A `CallTarget` over pipelines of its own, one per caller."""

    def __init__(
        self, artifact: Path, model: PartitionedModel, requests: list[Inputs], callers: int, limits: dict[str, Any]
    ) -> None:
        tensors = [model.tensors(inputs) for inputs in requests]
        self._stack = contextlib.ExitStack()

        def answer(pipeline: Pipeline, request: int) -> object:
            return pipeline.run(tensors[request], **limits)

        pipelines = [self._stack.enter_context(Pipeline.open(artifact)) for _ in range(callers)]
        answers: list[Callable[[int], object]] = [partial(answer, pipeline) for pipeline in pipelines]
        super().__init__(answers, len(requests))

    def close(self) -> None:
        self._stack.close()


def print_report(console: Console, result: LoadResult, about: dict[str, Any]) -> None:
    """What a person wants to know, a line each."""
    console.print("  ".join(f"{key}: {value}" for key, value in about.items()))
    for text in report_lines(result):
        console.print(text)


def report_lines(result: LoadResult) -> Iterator[str]:
    target = "  ".join(f"{key}: {value}" for key, value in result.target.items())
    yield f"target: {target}"
    yield f"measured: {result.seconds:g} s after {result.warmup_s:g} s of warm-up, {result.scheduled} requests"
    yield f"offered {result.offered_qps:.1f}/s, answered {result.answered_qps:.1f}/s"
    latencies = "  ".join(f"p{p:g} {result.percentile_ms(p):.3f}" for p in PERCENTILES)
    yield f"latency from when requests were due, ms: {latencies}"
    if result.slo_ms is not None:
        share = f"{100 * result.attainment:.2f} % of all requests"
        yield f"goodput within {result.slo_ms:g} ms: {result.goodput_qps:.1f}/s, {share}"
    for name, count in result.errors.items():
        example = result.examples.get(name, "")
        yield f"{count} requests: {name}{f', such as: {example}' if example else ''}"
    generator = result.as_json()["generator"]
    yield "generator: " + "  ".join(f"{key}: {value}" for key, value in generator.items())
