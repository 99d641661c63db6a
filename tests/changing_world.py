"""A deployment of running sidecars whose plan changes: the world of `lookup_world`, a large table, and room for a third sidecar."""

from __future__ import annotations

import contextlib
import io
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import yaml
from lookup_world import SIDECARS, World, expected, random_bags, write_world
from sidecar_process import PATIENCE_S, RunningSidecar

from sidepool import __main__ as entry
from sidepool.bench.triton_server import free_ports
from sidepool.client import EmbeddingClient
from sidepool.wire.plan import Plan, Shard, SidecarAddress, Table, save_plan

# 8 MB: its moves take seconds at the slowest rate, so that there is time to disturb them.
LARGE = Table(name="large", rows=32_000, dim=64)
NAMES = (*SIDECARS, "third")
SLOWLY = 4_000_000.0


@dataclass(frozen=True)
class Ran:
    """How a command ended, and what it said."""

    returncode: int
    stdout: str
    stderr: str


@dataclass
class Deployment:
    """Files under `directory`; `plan.yaml` there is what rankers follow."""

    world: World
    addresses: dict[str, str]
    running: dict[str, RunningSidecar] = field(default_factory=dict)

    @property
    def directory(self) -> Path:
        return self.world.directory

    @property
    def plan(self) -> Path:
        return self.directory / "plan.yaml"

    def config(self, name: str) -> Path:
        return self.directory / name / "sidecar.yaml"

    def start(self, name: str, event: str = "ready") -> RunningSidecar:
        """A sidecar that has logged `event`; the third has nothing at first: `waiting for a plan`."""
        sidecar = self.running[name] = RunningSidecar(self.config(name))
        sidecar.wait_for(event)
        return sidecar

    def kill(self, name: str) -> None:
        """End a sidecar as a crash would."""
        sidecar = self.running.pop(name)
        sidecar.process.kill()
        sidecar.close()

    def spread(self, epoch: int, names: tuple[str, ...], *, shift: int = 0) -> Path:
        """Write a plan of every table cut by rows over some sidecars, as far as it has rows; `shift` moves all cuts."""
        shards = []
        for t in self.world.plan.tables:
            cuts = [t.rows * i // len(names) + shift for i in range(1, len(names))]
            edges = sorted({0, t.rows, *(cut for cut in cuts if 0 < cut < t.rows)})
            shards += [
                Shard(table=t.name, sidecar=names[i], rows=rows, columns=(0, t.dim)) for i, rows in enumerate(pairwise(edges))
            ]
        sidecars = tuple(SidecarAddress(name=n, address=self.addresses[n]) for n in names)
        content = {"epoch": epoch, "sidecars": sidecars, "shards": tuple(shards)}
        path = self.directory / f"plan-{epoch}.yaml"
        save_plan(Plan.model_validate(self.world.plan.model_copy(update=content).model_dump(), strict=False), path)
        return path

    def command(self, *words: str | Path) -> list[str]:
        """`sidepool plan` on this deployment."""
        return ["plan", *map(str, words), "--deployment", str(self.plan)]

    def apply(self, *words: str | Path) -> Ran:
        """`sidepool plan` in this process, which has imported what it takes."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = entry.main(self.command(*words))
        return Ran(status, out.getvalue(), err.getvalue())

    def brought(self, name: str) -> list[str]:
        """The directories that moves have made at a sidecar, and not removed."""
        return sorted(path.name for path in (self.directory / name).glob("shards.*"))


@contextlib.contextmanager
def deployed(directory: Path, **settings: object) -> Iterator[Deployment]:
    """Two sidecars that serve; ended, with every other that a test starts, when the block ends."""
    ports = free_ports(3)
    listen = {"previous_epoch_s": 4.0, "log_level": "debug", **settings}
    world = write_world(directory, ports=(ports[0], ports[1]), settings=listen, more=(LARGE,))
    addresses = {name: f"127.0.0.1:{port}" for name, port in zip(NAMES, ports, strict=True)}
    deployment = Deployment(world, addresses)
    (directory / "third").mkdir()
    third = {"name": "third", "plan": None, "shards": "shards", **listen, "listen": {"grpc": addresses["third"]}}
    deployment.config("third").write_text(yaml.safe_dump(third), encoding="utf-8")
    save_plan(world.at(addresses["left"], addresses["right"]), deployment.plan)
    try:
        for name in SIDECARS:
            deployment.start(name)
        yield deployment
    finally:
        for sidecar in deployment.running.values():
            sidecar.close()


class Load:
    """Callers that look up without pause through whatever client is current, and compare every value with torch's."""

    THREADS = 2

    def __init__(self, client: EmbeddingClient, world: World) -> None:
        self.client = client
        self.world = world
        self.looked: list[int] = [0] * self.THREADS
        self.problems: list[str] = []
        self.asked: set[tuple[str, ...]] = set()
        """The sidecars of the plans that lookups were under."""
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._look, args=(t,)) for t in range(self.THREADS)]
        for thread in self._threads:
            thread.start()

    def _look(self, thread: int) -> None:
        bags = [random_bags(self.world.plan, 4, seed=seed) for seed in range(thread, 20, self.THREADS)]
        wanted = [expected(self.world.plan, self.world.rows, b) for b in bags]
        while not self._stop.is_set():
            at = self.looked[thread] % len(bags)
            try:
                found = self.client.lookup_parts([bags[at].part], deadline_ms=PATIENCE_S * 1e3)
                assert found.errors == [None]
                np.testing.assert_allclose(found.out, wanted[at][0], rtol=1e-5, atol=1e-5)
                for rows, same in zip(found.sequences, wanted[at][1].values(), strict=True):
                    np.testing.assert_array_equal(rows, same)
                assert found.degraded == ()
                self.asked.add(found.sidecars)
            except Exception as e:
                self.problems.append(repr(e))
            self.looked[thread] += 1

    def until_epoch(self, epoch: int) -> None:
        """Return once new lookups are under a plan, and every caller has ended one since."""
        until = time.monotonic() + PATIENCE_S
        while self.client.plan.epoch != epoch:
            assert time.monotonic() < until
            time.sleep(0.01)
        self.go_on()

    def go_on(self) -> None:
        """Return once every caller has begun and ended a lookup since now."""
        before, until = list(self.looked), time.monotonic() + PATIENCE_S
        while any(now < then + 2 for now, then in zip(self.looked, before, strict=True)):
            assert time.monotonic() < until
            time.sleep(0.001)

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
