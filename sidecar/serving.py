"""What the process serves at this moment, and how it stops: shared by the control plane, the metrics and the main loop."""

from __future__ import annotations

import enum
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from grpc_health.v1 import health, health_pb2

from sidepool import _native
from sidepool.wire.errors import Overloaded
from sidepool.wire.plan import Plan
from sidepool.wire.shard_reader import shards_of
from sidepool.wire.shards import ShardFile

CONTROL_SERVICE = "sidepool.v1.Sidecar"
# How often a drain looks whether the last lookup has finished: far below what an operator notices, far above its cost.
DRAIN_POLL_S = 0.005


class State(enum.StrEnum):
    """Life of a sidecar; only forwards, but for one that loses the only plan it held: it waits for another."""

    LOADING = "loading"
    SERVING = "serving"
    DRAINING = "draining"


@dataclass(frozen=True, eq=False)
class Published:
    """A plan with the table set that answers lookups under it, and the directory that its rows are mapped from."""

    plan: Plan
    tables: _native.TableSet
    shards: Path

    @cached_property
    def files(self) -> dict[str, list[ShardFile]]:
        """The manifest's entries, by table."""
        found: dict[str, list[ShardFile]] = {}
        for shard in shards_of(self.plan, self.shards):
            found.setdefault(shard.table, []).append(shard)
        return found


class Serving:
    """The state machine loading → serving → draining, with its health. Thread-safe; owns nothing but the health servicer."""

    def __init__(self, name: str, server: _native.SidecarServer, previous_epoch_s: float = 0.0) -> None:
        """previous_epoch_s: how long a replaced plan goes on being answered."""
        self.name = name
        self.server = server
        # Watch must not hold one of the few RPC threads for as long as a client watches.
        self.health = health.HealthServicer(experimental_non_blocking=True)
        self._lock = threading.Lock()
        self._state = State.LOADING
        self._published: Published | None = None
        self._previous: Published | None = None
        self.previous_epoch_s = previous_epoch_s
        self._leaving: Published | None = None
        self._leaves_at = 0.0
        self._model: str | None = None
        self._shown: dict[str, int] = {}
        self._set_health()

    @property
    def state(self) -> State:
        return self._state

    @property
    def published(self) -> Published | None:
        """What is being served, or None while loading."""
        return self._published

    def announce(self, model: str) -> None:
        """Give `model`, which will be served, its own health service name."""
        with self._lock:
            if self._model not in (None, model):
                self._show(self._model, health_pb2.HealthCheckResponse.SERVICE_UNKNOWN)
            self._model = model
            self._set_health()

    @property
    def plans(self) -> tuple[Published, ...]:
        """Everything that is answered, the newest first."""
        return tuple(p for p in (self._published, self._previous) if p is not None)

    def held(self, fingerprint: str) -> Published | None:
        """What is answered under a plan, if it is."""
        return next((p for p in self.plans if p.plan.fingerprint == fingerprint), None)

    def leaves_in_s(self, published: Published) -> float:
        """Seconds until it is answered no longer; below 0: it stays."""
        return max(0.0, self._leaves_at - time.monotonic()) if published is self._leaving else -1.0

    def publish(self, published: Published, *, keep_previous: bool = False) -> Published | None:
        """Serve `published` from the next lookup on. Lookups under the plan before it are answered for `previous_epoch_s` more,
        with `keep_previous` until one of the two is dropped. Returns what is answered no longer."""
        with self._lock:
            self.server.publish(published.tables)
            self._previous, self._published, self._leaving = self._published, published, None
            if self._previous is not None and not keep_previous:
                self._leave(self._previous, self.previous_epoch_s)
        gone = self.drop_if_due()
        self.announce(published.plan.model)
        return gone

    def drop(self, published: Published, after_s: float) -> Published | None:
        """Answer no longer under one of the plans after `after_s`; of two, any may go. Returns it where that is now."""
        with self._lock:
            if published in self.plans:
                self._leave(published, after_s)
        return self.drop_if_due()

    def keep(self, published: Published) -> None:
        """Take back what `drop` began."""
        with self._lock:
            if published is self._leaving:
                self._leaving = None

    def drop_if_due(self) -> Published | None:
        """Do what was asked of `drop` or `publish` once its time has come; returns what is answered no longer if that is now."""
        with self._lock:
            leaving = self._leaving
            if leaving is None or time.monotonic() < self._leaves_at:
                return None
            self._leaving = None
            if leaving is self._published:  # the other one becomes the present one, so that this one is the previous
                self._published, self._previous = self._previous, leaving
                self.server.publish(self._published.tables if self._published is not None else _nothing())
            self._previous = None
            self.server.retire_previous()
            if self._published is None and self._state is State.SERVING:
                self._state = State.LOADING
                self._set_health()
        return leaving

    def _leave(self, published: Published, after_s: float) -> None:
        self._leaving, self._leaves_at = published, time.monotonic() + after_s

    def open(self) -> None:
        """Everything listens and tables are published: tell the world."""
        with self._lock:
            if self._state is State.LOADING:
                self._state = State.SERVING
                self._set_health()

    def begin_drain(self) -> None:
        """Refuse new lookups as retryable from now on; those in flight go on."""
        with self._lock:
            self._state = State.DRAINING
            self._set_health()
        self.server.drain()

    def wait_idle(self, timeout_s: float, given_up: Callable[[], bool] = lambda: False) -> bool:
        """Wait until no lookup is in flight; False when `timeout_s` has passed or `given_up()` is true first."""
        deadline = time.monotonic() + timeout_s
        while self.server.in_flight() > 0:
            if given_up() or time.monotonic() >= deadline:
                return False
            time.sleep(DRAIN_POLL_S)
        return True

    def require_published(self, epoch: int | None = None) -> Published:
        """What is being served (under `epoch`, if it still is); `Overloaded` (retryable) while loading."""
        published, previous = self._published, self._previous
        if published is None or self._state is State.LOADING:
            raise Overloaded(f"sidecar {self.name!r} is still loading its shards")
        return previous if previous is not None and previous.plan.epoch == epoch != published.plan.epoch else published

    def _set_health(self) -> None:
        healthy = health_pb2.HealthCheckResponse.SERVING
        status = healthy if self._state is State.SERVING else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in ("", CONTROL_SERVICE, self._model):
            if service is not None:
                self._show(service, status)

    def _show(self, service: str, status: int) -> None:
        if self._shown.get(service) != status:  # watchers are told of changes only
            self._shown[service] = status
            self.health.set(service, status)


def _nothing() -> _native.TableSet:
    tables = _native.TableSet(0, 0, 0)
    tables.seal()
    return tables
