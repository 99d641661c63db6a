"""The command line of `sidepool plan apply` and `sidepool plan rollback`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from sidepool.partition.apply import Places, Show, apply, rollback, undo
from sidepool.partition.etcd_command import coordination_of
from sidepool.wire.control_channel import ClientTls, check_rate
from sidepool.wire.control_pb2 import MoveReply
from sidepool.wire.errors import ConfigError
from sidepool.wire.model import PLAN_FILE
from sidepool.wire.plan import Plan, load_plan
from sidepool.wire.plan_source import FilePlanSource, PlanSource

ACTIONS = ("apply", "rollback")


def run(action: str, words: Sequence[str], args: argparse.Namespace) -> int:
    """Run one action; raises `ConfigError`, `PlanError`, `TransportError`, `ShardCorrupt`."""
    if len(words) != (action == "apply"):
        raise ConfigError(f"{action}: found {list(words)}; allowed: {'one plan' if action == 'apply' else 'no plan'}")
    if not args.deployment and not args.etcd:
        raise ConfigError(f"{action}: found neither --deployment nor --etcd; allowed: where rankers read the plan")
    check_rate("bytes-per-s", args.bytes_per_s)
    with closing(coordination_of(args).plan_source()) if args.etcd else nullcontext() as etcd:
        return _change(action, words, args, etcd)


def _change(action: str, words: Sequence[str], args: argparse.Namespace, etcd: PlanSource | None) -> int:
    tls = ClientTls(args.ca, args.cert, args.key)
    if action == "rollback":
        places = find_places(args.deployment or (), None, etcd)
        new = places.read()
        old = rollback(places, tls)
        print(f"plan epoch {old.epoch} is in place again; epoch {new.epoch} is answered for previous_epoch_s more")
        _say_leaving(new, old)
        return 0
    new = load_plan(_plan_file(Path(words[0])))
    places = find_places(args.deployment or (), new, etcd)
    if args.undo:
        undo(places, new, tls)
        print(f"nothing is left of plan epoch {new.epoch}")
        return 0
    try:
        with _bars() as show:
            old = apply(places, new, tls, bytes_per_s=args.bytes_per_s, show=show)
    except KeyboardInterrupt:
        print("interrupted; the sidecars go on. Run it again to go on, or with --undo")
        raise
    print(f"plan epoch {new.epoch} is in place; sidepool plan rollback goes back as long as epoch {old.epoch} is answered")
    _say_leaving(old, new)
    return 0


def find_places(deployment: Sequence[Path], new: Plan | None, etcd: PlanSource | None = None) -> Places:
    """The plan files of a deployment: those given, or in a directory `plan.yaml` and its copies in `model_repository`. What counts
    is the plan in `etcd`, or without it the first file.

    Copies of another plan, such as those of other model versions, are not the deployment's.
    """
    sources: list[PlanSource] = []
    for path in deployment:
        root = _plan_file(path)
        ours = {load_plan(root).fingerprint, *((new.fingerprint,) if new is not None else ())}
        copies = sorted(path.glob(f"model_repository/*/*/{PLAN_FILE}")) if path.is_dir() else []
        sources += [FilePlanSource(copy) for copy in copies if load_plan(copy).fingerprint in ours]
        sources.append(FilePlanSource(root))
    if etcd is not None:
        return Places([*sources, etcd])
    first = next(i for i, s in enumerate(sources) if isinstance(s, FilePlanSource) and s.path == _plan_file(deployment[0]))
    return Places([*sources[:first], *sources[first + 1 :], sources[first]])


def _plan_file(path: Path) -> Path:
    return path / PLAN_FILE if path.is_dir() else path


def _say_leaving(old: Plan, new: Plan) -> None:
    for sidecar in old.sidecars:
        if sidecar.name not in new.sidecar_index:
            print(f"sidecar {sidecar.name!r} holds nothing of it: stop it once rankers have left it (previous_epoch_s)")


@contextmanager
def _bars() -> Iterator[Show]:
    """A bar per sidecar, with bytes, speed and remaining time."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[phase]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bars: dict[str, TaskID] = {}

        def show(replies: Sequence[MoveReply]) -> None:
            for reply in replies:
                bar = bars.get(reply.name)
                if bar is None:
                    bar = bars[reply.name] = progress.add_task(reply.name, total=None, phase="")
                if reply.total_bytes:
                    progress.update(bar, total=reply.total_bytes, completed=reply.done_bytes, phase=reply.phase)
                elif reply.phase == "ready":
                    progress.update(bar, completed=progress.tasks[bar].total, phase=reply.phase)

        yield show
