"""One `sidepool tune`: from its options to files that sidepool and Triton take as they are."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from sidepool.bench import machine
from sidepool.bench.load import sizes
from sidepool.bench.load.model_requests import PartitionedModel, generated_requests
from sidepool.bench.serve import make_console
from sidepool.bench.stop_signals import stopped_by_signals
from sidepool.bench.tune_command import limit_of
from sidepool.bench.tuning.climb import Climb
from sidepool.bench.tuning.knobs import Knobs, Queries, sidecar_config, triton_config
from sidepool.bench.tuning.tune import Job, Limit
from sidepool.client.pipeline import model_directory

# What rates depend on, of what is known of the machine.
MACHINE = ("cpu", "cores", "torch", "seed")
# Of the length of a load, under --quick.
QUICK = 0.25


def tune(args: argparse.Namespace) -> int:
    """Climb, report, write; raises `SidepoolError`."""
    console = make_console()
    limit = Limit(*limit_of(args.slo))
    out = args.out or args.model.with_name(f"{args.model.name}-tuned")
    model = PartitionedModel(args.model)
    found = sizes.parse_sizes(args.sizes)(args.requests, args.seed)
    given = generated_requests(model, found, ids=args.ids, ids_per_bag=args.ids_per_bag, seed=args.seed)
    asked = {"sizes": args.sizes, "ids": args.ids, "ids_per_bag": args.ids_per_bag, "requests": args.requests, "quick": args.quick}
    here = {key: value for key, value in machine.describe(args.seed).items() if key in MACHINE}
    about = {"model": model.model.name, "plan": model.plan.fingerprint, **asked, **here}
    job = Job(
        model=args.model,
        limit=limit,
        requests=[model.triton(inputs) for inputs in given],
        queries=Queries(int(found.max()), model.model.jagged, divisible=not model.model.dense_reads_bags),
        about=about,
        directory=out / "climb",
        work_dir=args.work_dir,
        seed=args.seed,
        scale=QUICK if args.quick else 1.0,
    )
    with stopped_by_signals():
        climb = job.climb(minutes=args.minutes, told=console.print)
        best = climb.run()
    write_settings(args.model, out, best, least_batch=job.queries.least_batch, limit_ms=limit.ms, online=args.online)
    report = report_of(climb, limit)
    (out / "tune.json").write_text(json.dumps(about | report, indent=1) + "\n", encoding="utf-8")
    text = "\n".join(report_lines(climb, limit, args.model, out)) + "\n"
    (out / "tune.txt").write_text(text, encoding="utf-8")
    console.print(text, end="")
    return 0 if climb.best_score else 1


def write_settings(artifact: Path, out: Path, knobs: Knobs, *, least_batch: int, limit_ms: float, online: bool) -> None:
    """The artifact's `config.pbtxt` and `sidecar.yaml` files with these knobs, at the same places below `out`."""
    model = model_directory(artifact).parent
    text = (model / "config.pbtxt").read_text(encoding="utf-8")
    text = triton_config(text, knobs, name=model.name, least_batch=least_batch, limit_ms=limit_ms, online=online)
    config = out / "model_repository" / model.name / "config.pbtxt"
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(text, encoding="utf-8")
    for source in sorted((artifact / "sidecars").glob("*/sidecar.yaml")):
        target = out / source.relative_to(artifact)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(sidecar_config(source.read_text(encoding="utf-8"), knobs), encoding="utf-8")


def report_of(climb: Climb, limit: Limit) -> dict[str, Any]:
    """What was found, as plain data."""
    assert climb.best is not None
    first = climb.tried[climb.starts[0].settled()]
    return {
        "limit": str(limit),
        "finished": climb.finished,
        "best": climb.best.as_json(),
        "best_qps": round(climb.best_score, 2),
        "static_qps": round(first, 2),
        "tried": [{**knobs.as_json(), "qps": round(rate, 2) or None} for knobs, rate in climb.tried.items()],
    }


def report_lines(climb: Climb, limit: Limit, artifact: Path, out: Path) -> list[str]:
    """The same for a person."""
    found = report_of(climb, limit)
    if not found["best_qps"]:
        return [f"no setting that was tried serves anything within {limit}: {len(climb.tried)} settings"]
    end = "no step pays any more" if climb.finished else "time was up: the same command goes on from here"
    static = f"{found['static_qps']:g}/s with the largest query split evenly over the cores, "
    return [
        f"{found['best_qps']:g}/s within {limit}; {static}{len(climb.tried)} settings tried, {end}",
        "settings: " + "  ".join(f"{key} {value}" for key, value in found["best"].items()),
        f"files with these lie in {out}; to take them: cp -r {out}/model_repository {out}/sidecars {artifact}/",
    ]
