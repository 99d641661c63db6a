"""What the process serves at this moment, and how it stops: shared by the control plane, the metrics and the main loop."""

from __future__ import annotations

import enum
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from grpc_health.v1 import health, health_pb2

from sidepool import _native
from sidepool.wire.errors import Overloaded
from sidepool.wire.plan import Plan

CONTROL_SERVICE = "sidepool.v1.Sidecar"
# How often a drain looks whether the last lookup has finished: far below what an operator notices, far above its cost.
DRAIN_POLL_S = 0.005


class State(enum.StrEnum):
    """Life of a sidecar; only forwards."""

    LOADING = "loading"
    SERVING = "serving"
    DRAINING = "draining"


@dataclass(frozen=True)
class Published:
    """A plan with the table set that answers lookups under it."""

    plan: Plan
    tables: _native.TableSet


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
        self._previous_epoch_s = previous_epoch_s
        self._retire_at = 0.0
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

    def publish(self, published: Published) -> None:
        """Serve `published` from the next lookup on; lookups under the plan before it are answered for some time."""
        self.server.publish(published.tables)
        self._retire_at = time.monotonic() + self._previous_epoch_s
        self._previous, self._published = self._published, published
        self.retire_if_due()
        self.announce(published.plan.model)

    def retire_if_due(self) -> int | None:
        """Stop answering under the plan before the present one once its time is over; returns its epoch if that is now."""
        previous = self._previous
        if previous is None or time.monotonic() < self._retire_at:
            return None
        self._previous = None
        self.server.retire_previous()
        return previous.plan.epoch

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
