"""Settings of one model side by side on this machine: sidecars of their own for each, one Triton for all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from sidepool.bench.processes import running_sidecars
from sidepool.bench.triton_server import TritonServer, free_ports
from sidepool.bench.tuning.knobs import Knobs, sidecar_config, triton_config
from sidepool.client.pipeline import model_directory
from sidepool.wire.model import PLAN_FILE
from sidepool.wire.plan import load_plan, save_plan

# Configurations are whole: Triton need not start every model once more to ask what is missing.
COMPLETE = ("--disable-auto-complete-config",)


@dataclass(frozen=True)
class Variant:
    """A setting of an artifact, or of a model's directory in a Triton repository, which needs no sidecars (`artifact` None)."""

    knobs: Knobs
    model: Path
    """Holds `config.pbtxt`."""
    artifact: Path | None = None

    @classmethod
    def of(cls, artifact: Path, knobs: Knobs) -> Variant:
        """Raises `ConfigError` where `artifact` is none."""
        return cls(knobs, model_directory(artifact).parent, artifact)


@contextlib.contextmanager
def served(
    variants: Mapping[str, Variant], *, least_batch: int, limit_ms: float, directory: Path, work_dir: Path
) -> Iterator[TritonServer]:
    """Serve `variants` under their names from copies in `directory` (replaced); files are linked, ports are this machine's.

    least_batch: of Triton's `max_batch_size`. limit_ms: of all of them. work_dir: keeps the Triton installation. Logs lie in
    `directory`. Raises `TransportError` where something does not start.
    """
    shutil.rmtree(directory, ignore_errors=True)
    repository, logs = directory / "repository", directory / "logs"
    with contextlib.ExitStack() as stack:
        for name, variant in variants.items():
            _copy(variant.model, repository / name)
            text = (variant.model / "config.pbtxt").read_text(encoding="utf-8")
            config = triton_config(text, variant.knobs, name=name, least_batch=least_batch, limit_ms=limit_ms)
            _replace(repository / name / "config.pbtxt", config)
            if variant.artifact is not None:
                plan = repository / name / "1" / PLAN_FILE
                configs = _copy_sidecars(variant.artifact, variant.knobs, directory / name, plan)
                stack.enter_context(running_sidecars(configs, work_dir=logs / name))
        # A climb leaves many servers, and nothing in one is worth the seconds that it takes to unload.
        server = TritonServer(repository, work_dir=work_dir, log=logs / "triton.log", arguments=COMPLETE, stop_timeout_s=0.0)
        yield stack.enter_context(server)


def _copy_sidecars(artifact: Path, knobs: Knobs, directory: Path, plan_of_ranker: Path) -> list[Path]:
    """The artifact's sidecars with ports of their own; returns their configurations."""
    plan = load_plan(artifact / PLAN_FILE)
    addresses = [f"127.0.0.1:{port}" for port in free_ports(len(plan.sidecars))]
    sidecars = tuple(s.model_copy(update={"address": a}) for s, a in zip(plan.sidecars, addresses, strict=True))
    moved = plan.model_copy(update={"sidecars": sidecars})
    _copy(artifact / "sidecars", directory / "sidecars")
    configs = []
    for sidecar in sidecars:
        config = directory / "sidecars" / sidecar.name / "sidecar.yaml"
        _replace(config, sidecar_config(config.read_text(encoding="utf-8"), knobs, sidecar.address))
        configs.append(config)
    save_plan(moved, directory / PLAN_FILE)
    plan_of_ranker.unlink()  # linked to the artifact's, which stays as it is
    save_plan(moved, plan_of_ranker)
    return configs


def _copy(source: Path, target: Path) -> None:
    """A copy of a directory whose files are links where the file system allows it."""

    def link(file: str, to: str) -> None:
        try:
            os.link(file, to)
        except OSError:
            shutil.copyfile(file, to)

    shutil.copytree(source, target, copy_function=link, ignore=shutil.ignore_patterns("__pycache__"))


def _replace(file: Path, text: str) -> None:
    file.unlink()  # it may be a link
    file.write_text(text, encoding="utf-8")
