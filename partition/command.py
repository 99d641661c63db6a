"""`sidepool partition MODEL --out DIR`: partition what a function returns, a saved program or a model of Triton's."""

from __future__ import annotations

import argparse
from pathlib import Path

from sidepool.partition.triton_config import LANES
from sidepool.wire.errors import CutError
from sidepool.wire.plan import OnMissingShard, RowFormat


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `sidepool partition`."""
    parser.add_argument(
        "source",
        nargs="?",
        metavar="MODEL",
        help="MODULE:FUNCTION, a function that returns (model, example_inputs), where MODULE may be a .py file; or a saved "
        "program, FILE.pt2; or the directory of a model in Triton whose Python can be imported",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write; must be empty or not exist")
    parser.add_argument("--check", type=Path, metavar="DIR", help="instead: verify an artifact that was written before")
    parser.add_argument("--calibrate", type=Path, metavar="FILE", help="instead: measure this machine and write its profile")
    parser.add_argument("--name", help="name of the Triton model (default: that of the function, file or directory)")
    parser.add_argument("--sidecars", type=int, default=2, metavar="N", help="number of sidecars (default: 2)")
    parser.add_argument(
        "--sidecar-bytes", type=_positive, metavar="N", help="memory that each sidecar has for rows (default: not checked)"
    )
    parser.add_argument(
        "--address",
        action="append",
        metavar="HOST:PORT",
        help="control plane of a sidecar, once per sidecar in order (default: 127.0.0.1, ports from 50151)",
    )
    parser.add_argument(
        "--lane",
        choices=LANES,
        default="shm",
        help="how the ranker reaches the tables; local: it maps them itself, without sidecars (default: shm)",
    )
    parser.add_argument(
        "--max-batch",
        type=_positive,
        metavar="N",
        help="samples (fixed-width) or requests (jagged) that Triton merges at most (default: 512 or 64)",
    )
    parser.add_argument(
        "--instance-kind", choices=("cpu", "gpu"), default="cpu", help="where the dense program runs (default: cpu)"
    )
    parser.add_argument(
        "--row-format", choices=tuple(map(str, RowFormat)), help="how rows are stored (default: as the model has them)"
    )
    parser.add_argument(
        "--epoch",
        type=_positive,
        default=1,
        metavar="N",
        help="plan epoch; raise it when replacing an artifact in service (default: 1)",
    )
    parser.add_argument(
        "--on-missing-shard",
        type=OnMissingShard,
        choices=tuple(OnMissingShard),
        default=OnMissingShard.FAIL,
        help="a lookup whose sidecar is lost fails, or goes on without its rows and names the features (default: fail)",
    )
    _add_cut_arguments(parser)


def _add_cut_arguments(parser: argparse.ArgumentParser) -> None:
    cut = parser.add_argument_group("the cut (docs/partition.md)")
    cut.add_argument("--link", metavar="NAME", help="profile of the network between ranker and sidecars (default: 100g-roce)")
    cut.add_argument(
        "--objective", choices=("latency", "throughput", "gpu_cost"), help="what the cut makes least (default: latency)"
    )
    cut.add_argument("--cpu", metavar="NAME", help="profile of the CPU nodes, or a file of --calibrate (default: epyc-9654)")
    cut.add_argument("--gpu", metavar="NAME", help="profile of the GPU, or a file of --calibrate (default: a100-80gb)")
    cut.add_argument(
        "--gpu-table-bytes",
        type=int,
        default=0,
        metavar="N",
        help="bytes of tables that may stay with the dense program where that is cheaper (default: 0, every table leaves)",
    )

    cut.add_argument(
        "--no-programs",
        action="store_true",
        help="sidecars run lookups and pooling only (default: also operators that shrink rows)",
    )
    cut.add_argument(
        "--sidecar-torch", action="store_true", help="sidecars may also run operators that take torch, which they must then have"
    )


def run(args: argparse.Namespace) -> int:
    """Partition and print the report, or what is asked for instead; raises a `SidepoolError`."""
    instead = [x for x in (args.check, args.calibrate) if x is not None]
    if len(instead) + (args.source is not None) != 1 or (args.source is not None) != (args.out is not None):
        raise CutError(
            "arguments: allowed: MODEL with --out DIR, or --check DIR alone, or --calibrate FILE alone\n"
            "remedy: sidepool partition --help"
        )
    if args.check is not None:
        return _check(args.check)
    return _calibrate(args.calibrate) if args.calibrate is not None else _partition(args)


def _check(directory: Path) -> int:
    from sidepool.partition.check import check_artifact

    print(check_artifact(directory))
    return 0


def _calibrate(path: Path) -> int:
    from sidepool.partition.calibrate import calibrate
    from sidepool.partition.profiles import save_profiles
    from sidepool.wire.config import dump_yaml

    profiles = calibrate()
    save_profiles(profiles, path)
    print(dump_yaml(profiles), end="")
    print(f"written to {path}; use it as --cpu {path}" + (f" --gpu {path}" if profiles.gpu else ""))
    return 0


def _partition(args: argparse.Namespace) -> int:
    from sidepool.partition.model_sources import load_source
    from sidepool.partition.partitioner import partition_model
    from sidepool.partition.triton_config import TritonOptions

    model, inputs, name = load_source(args.source)
    report = partition_model(
        model,
        inputs,
        args.out,
        name=args.name or name,
        sidecars=args.sidecars,
        addresses=args.address,
        row_format=args.row_format,
        epoch=args.epoch,
        on_missing_shard=args.on_missing_shard,
        triton=TritonOptions(max_batch=args.max_batch, instance_kind=args.instance_kind, lane=args.lane),
        gpu_table_bytes=args.gpu_table_bytes,
        sidecar_bytes=args.sidecar_bytes,
        programs=not args.no_programs,
        sidecar_torch=args.sidecar_torch,
        **{k: v for k in ("link", "objective", "cpu", "gpu") if (v := getattr(args, k)) is not None},
    )
    print(report.text, end="")
    print(f"written to {report.out_dir}")
    return 0


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"found {value}; allowed: 1 or more")
    return value
