"""`sidepool bench slo`: how many requests per second eight models serve within their published latency limits.

Each is served whole by Triton, disaggregated with DeepRecSys's static baseline, and disaggregated and tuned: three models of one
Triton, under the same Poisson loads in turns.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from sidepool.bench import machine
from sidepool.bench.energy import Energy, read_energy
from sidepool.bench.load import LoadResult, sizes
from sidepool.bench.serve import make_console
from sidepool.bench.slo_models import LIMITS_MS, MAX_ROWS, build, requests
from sidepool.bench.slo_overload import overloaded
from sidepool.bench.slo_report import SYSTEMS, plot, print_summary, summary
from sidepool.bench.stage_table import between, snapshot
from sidepool.bench.stop_signals import stopped_by_signals
from sidepool.bench.traffic import Arrays
from sidepool.bench.triton_server import TritonServer
from sidepool.bench.tuning.knobs import Knobs, Queries, static_baseline
from sidepool.bench.tuning.probing import BUSY, IDLE, Prober, prober
from sidepool.bench.tuning.rates import Meets, Search, in_turns, search
from sidepool.bench.tuning.tune import Job, Limit
from sidepool.bench.tuning.variants import Variant, served
from sidepool.wire.durable import replace_text
from sidepool.wire.errors import ConfigError

WHOLE, STATIC, TUNED = SYSTEMS
# Limits beside the published one, as shares of it.
SHARES = (1.0, 0.5, 1.5)
# Of each model's time for climbing, the whole one's: it has four of the nine knobs.
WHOLE_SHARE = 0.3
# Loads at half of the highest rate, in turns.
FIXED_TURNS, FIXED_S = 2, 5.0

Measured = TypeVar("Measured")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `sidepool bench slo`."""
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="results; models that are in it are not repeated")
    parser.add_argument("--models", default=",".join(LIMITS_MS), metavar="NAMES", help="separated by commas (default: all eight)")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw what is in FILE")
    parser.add_argument("--sizes", default="lognormal", metavar="KIND", help="samples: lognormal (default), mlperf, N, a file")
    parser.add_argument("--limits", default=",".join(f"{s:g}" for s in SHARES), metavar="S", help="shares of the published limit")
    parser.add_argument("--tune-minutes", type=float, default=6.0, metavar="M", help="per model, monolithic included (default: 6)")
    parser.add_argument("--overload-seconds", type=float, default=0.0, metavar="S", help="also twice the highest rate for so long")
    parser.add_argument(
        "--shared-memory", action="store_true", help="tensors of all three in system shared memory, not in gRPC messages"
    )
    parser.add_argument("--quick", action="store_true", help="loads a quarter as long: for trying the command, not for figures")
    parser.add_argument("--work-dir", type=Path, default=Path("build/bench"), metavar="DIR", help="default: build/bench")
    parser.add_argument("--seed", type=int, default=1)


def run(args: argparse.Namespace) -> int:
    """Build, tune and measure each model that is not in the file yet; raises `ConfigError`."""
    console = make_console()
    names = args.models.split(",")
    if unknown := set(names) - set(LIMITS_MS):
        raise ConfigError(f"--models: found {min(unknown)!r}; allowed: {', '.join(LIMITS_MS)}")
    results = json.loads(args.json.read_text(encoding="utf-8")) if args.json.exists() else {"models": {}}
    failed: dict[str, str] = results.setdefault("failed", {})
    with stopped_by_signals():
        for name in names:
            if name in results["models"]:
                continue
            try:
                results["models"][name] = Model(name, args, console).measure()
                failed.pop(name, None)
            except Exception as e:  # whatever is wrong with one, the others are still to be measured
                failed[name] = f"{type(e).__name__}: {e}"
                console.print(f"{name}: failed: {failed[name]}", markup=False)
            results["summary"] = summary(results["models"])
            args.json.parent.mkdir(parents=True, exist_ok=True)
            replace_text(args.json, json.dumps(results, indent=1) + "\n")
    print_summary(console, results["models"])
    if args.plot is not None:
        plot(results["models"], args.plot)
    for name in failed:
        console.print(f"{name}: failed, see {args.json}; the same command tries it again")
    return 1 if failed else 0


class Model:
    """One of the eight, from nothing to figures."""

    def __init__(self, name: str, args: argparse.Namespace, console: Console) -> None:
        self._name, self._args, self._console = name, args, console
        self._limit = Limit(95.0, LIMITS_MS[name])
        self._shares = list(dict.fromkeys([1.0, *(float(share) for share in args.limits.split(","))]))
        self._scale = 0.25 if args.quick else 1.0
        self._cores = len(os.sched_getaffinity(0))
        self._directory: Path = args.work_dir / "slo" / name
        self._directory.mkdir(parents=True, exist_ok=True)
        self._say("building")
        built = build(name, self._directory / "built", args.seed)
        self._artifact, self._whole = built / "artifact", built / "whole" / name
        self._requests: Sequence[Arrays] = requests(name, self._artifact, sizes.parse_sizes(args.sizes), args.seed)
        self._sizes = [len(next(iter(arrays.values()))) for arrays in self._requests]
        self._queries = Queries(max(self._sizes))

    def measure(self) -> dict[str, Any]:
        """Everything about the model, as plain data."""
        whole, whole_climb = self._tuned(whole=True, minutes=WHOLE_SHARE * self._args.tune_minutes)
        tuned, climb = self._tuned(whole=False, minutes=(1 - WHOLE_SHARE) * self._args.tune_minutes)
        knobs = {WHOLE: whole, STATIC: static_baseline(self._cores, self._queries).settled(), TUNED: tuned}
        variants = {WHOLE: Variant(whole, self._whole), TUNED: Variant.of(self._artifact, tuned)}
        # Where no step paid, two measurements of one setting would differ by noise alone.
        if tuned != knobs[STATIC]:
            variants[STATIC] = Variant.of(self._artifact, knobs[STATIC])
        self._say("measuring")
        with contextlib.ExitStack() as stack:
            directory = self._directory / "served"
            server = stack.enter_context(
                served(
                    variants,
                    least_batch=self._queries.least_batch,
                    limit_ms=self._limit.ms,
                    directory=directory,
                    work_dir=self._args.work_dir,
                )
            )
            probes = {
                name: stack.enter_context(
                    prober(
                        server.grpc,
                        name,
                        self._requests,
                        seed=self._args.seed,
                        scale=self._scale,
                        shared_memory=self._args.shared_memory,
                    )
                )
                for name in SYSTEMS
                if name in variants
            }
            highest, unmet = self._highest(probes)
            published = highest["1"]
            found = {
                "machine": machine.describe(self._args.seed),
                "limit": asdict(self._limit),
                "rows": f"at most {MAX_ROWS} per table",
                "sizes": sizes.describe(self._sizes),
                "requests": len(self._requests),
                "shared_memory": self._args.shared_memory,
                "settings": {name: k.as_json() for name, k in knobs.items()},
                "climbs": {WHOLE: whole_climb, TUNED: climb},
                "static_is_tuned": STATIC not in variants,
                "highest_qps": highest,
                "unmet": unmet,
                "fixed_rate": self._fixed(probes, (published[WHOLE] or published[TUNED]) / 2, server),
            }
            if self._args.overload_seconds and published[TUNED]:
                found["overload"] = overloaded(
                    server,
                    TUNED,
                    self._requests,
                    highest_qps=published[TUNED],
                    limit_ms=self._limit.ms,
                    seconds=self._args.overload_seconds,
                    seed=self._args.seed,
                    shared_memory=self._args.shared_memory,
                )
        return found

    def _tuned(self, *, whole: bool, minutes: float) -> tuple[Knobs, dict[str, Any]]:
        kind = WHOLE if whole else TUNED
        self._say(f"tuning {kind}")
        climb = Job(
            model=self._whole if whole else self._artifact,
            limit=self._limit,
            requests=self._requests,
            queries=self._queries,
            about={key: getattr(self._args, key) for key in ("sizes", "quick", "shared_memory")}
            | {"model": self._name, "rows": MAX_ROWS},
            directory=self._directory / f"climb-{kind}{'-quick' * self._args.quick}{'-shm' * self._args.shared_memory}",
            work_dir=self._args.work_dir,
            seed=self._args.seed,
            scale=self._scale,
            whole=whole,
            shared_memory=self._args.shared_memory,
        ).climb(minutes=minutes, told=self._console.print)
        best = climb.run()
        return best, {"settings_tried": len(climb.tried), "finished": climb.finished}

    def _highest(self, probes: Mapping[str, tuple[Prober, float]]) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
        """By share of the limit and by system: the highest rate within it; and by system why there is none within all of it."""
        loads: dict[str, list[tuple[float, LoadResult]]] = {name: [] for name in probes}
        found: dict[str, dict[str, float]] = {}
        unmet: dict[str, str] = {}
        for share in self._shares:
            limit_ms = share * self._limit.ms

            def meets(name: str, rate: float, limit_ms: float = limit_ms) -> bool:
                return probes[name][0].meets(rate, limit_ms=limit_ms, percent=self._limit.percent, kept=loads[name])

            searches: dict[str, tuple[Search, Meets]] = {}
            for name, (_, alone_s) in probes.items():
                low, high = self._known(loads[name], limit_ms)
                start = BUSY / alone_s if not loads[name] else max(low, high)
                searches[name] = (search(start, low=low, high=high, least=IDLE / alone_s), partial(meets, name))
            rates = in_turns(searches)
            found[f"{share:g}"] = _of_all({name: round(rates[name], 2) for name in probes})
            self._say(f"requests/s with p95 within {limit_ms:g} ms: {found[f'{share:g}']}")
            if share == 1.0:
                unmet = {name: self._why_none(loads[name], probes[name][1]) for name in probes if not rates[name]}
        return found, unmet

    def _why_none(self, loads: Sequence[tuple[float, LoadResult]], alone_s: float) -> str:
        rate, result = min(loads, key=lambda pair: pair[0])
        p95_ms = result.percentile_ms(self._limit.percent)
        return f"p95 {p95_ms:.1f} ms at {rate:.2g} requests/s, not {self._limit.ms:g}; a request alone takes {alone_s * 1e3:.1f} ms"

    def _known(self, loads: Sequence[tuple[float, LoadResult]], limit_ms: float) -> tuple[float, float]:
        """What loads that ran for another limit say of this one: a rate that meets it and one that misses it."""
        low, high = 0.0, 0.0
        for rate, result in sorted(loads, key=lambda pair: pair[0]):
            within = (result.latency_ns <= limit_ms * 1e6).sum() / max(result.scheduled, 1)
            if within < self._limit.percent / 100:
                return low, rate
            low = rate
        return low, high

    def _fixed(self, probes: Mapping[str, tuple[Prober, float]], rate: float, server: TritonServer) -> dict[str, Any]:
        """Latencies of all at one rate, in turns; the ranker's stages of the tuned one; energy where it can be read."""
        if not rate:
            return {"skipped": "neither the monolithic model nor the tuned one meets its limit at any rate"}
        latencies: dict[str, list[dict[str, float]]] = {name: [] for name in probes}
        energy: dict[str, Any] = {}  # by source: by system, or why there is none
        before = snapshot(server, TUNED)
        for _ in range(FIXED_TURNS):
            for name, (probe, _) in probes.items():
                begun = read_energy()
                result = probe.load(rate, slo_ms=self._limit.ms, seconds=FIXED_S * self._scale + 1)
                ended = read_energy()
                latencies[name].append({f"p{p}_ms": round(result.percentile_ms(p), 3) for p in (50, 95, 99)})
                for source, before_energy in begun.items():
                    after_energy = ended[source]
                    if isinstance(before_energy, Energy) and isinstance(after_energy, Energy):
                        joules = before_energy.joules_until(after_energy)
                        energy.setdefault(source, {})[name] = round(joules / max(result.scheduled, 1), 3)
                    else:
                        energy[source] = before_energy if isinstance(before_energy, str) else after_energy
        stages = asdict(between(before, snapshot(server, TUNED)))
        return {"qps": round(rate, 2), "latencies": _of_all(latencies), "joules_per_request": energy, "tuned_stages": stages}

    def _say(self, what: str) -> None:
        self._console.print(f"{self._name}: {what}")


def _of_all(measured: dict[str, Measured]) -> dict[str, Measured]:
    """The same for every system: a static setting that is the tuned one was measured as that."""
    return {name: measured[name if name in measured else TUNED] for name in SYSTEMS}
