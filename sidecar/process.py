"""The life of a sidecar process: start, ready, reload (SIGHUP), drain (SIGTERM, SIGINT), gone without a trace."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from sidepool import _native
from sidepool.sidecar import logs
from sidepool.sidecar.balancer import Balancer
from sidepool.sidecar.config import SidecarConfig, is_wildcard, join_endpoint, load_sidecar_config, split_endpoint
from sidepool.sidecar.control import ControlPlane
from sidepool.sidecar.following import InPlace, PlanFollower
from sidepool.sidecar.loader import Loaded, Loader, LoadFailed, promote
from sidepool.sidecar.membership import Membership
from sidepool.sidecar.metrics import MetricsServer
from sidepool.sidecar.moving import Moved, Mover
from sidepool.sidecar.numa import place, usable_nodes
from sidepool.sidecar.serving import Published, Serving
from sidepool.sidecar.socket_directory import private_directory
from sidepool.wire.errors import ConfigError, SidepoolError
from sidepool.wire.plan import Plan

SOCKET_NAME = "lane.sock"
# What SIGHUP applies; everything else is fixed when threads, ports and lanes are made.
RELOADABLE = {"log_level", "plan", "shards", "verify", "promote"}
# Within a second a signal that another thread caught is obeyed; waking so rarely costs nothing.
WAKE_S = 1.0


Event = Loaded | LoadFailed | Moved | InPlace | signal.Signals


class SidecarProcess:
    """One sidecar. Everything happens on the main thread, one event at a time; `run` returns when it is over."""

    def __init__(self, config_path: Path, ready_file: Path | None = None) -> None:
        """`ready_file`: where to also write the ready line; removed at exit."""
        self._config_path = config_path
        self._ready_file = ready_file
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._loader = Loader(self._planned, self._events.put)
        self._reload_wanted = False
        self._loading = False
        self._started = self._listening = self._ready = False
        self._membership: Membership | None = None
        self._stop_signals = 0

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT; raises `ConfigError`, `PlanError` or `ShardCorrupt` when it cannot start."""
        self._config = config = load_sidecar_config(self._config_path)
        logs.start_logging(config.log_level)
        logs.info("configuration", path=str(self._config_path), **config.model_dump(mode="json"))
        with contextlib.ExitStack() as stack:
            self._take_signals(stack)
            self._server = _native.SidecarServer(
                engines=config.engines,
                spin_us=config.spin_us,
                max_lanes=config.max_lanes,
                max_frame_bytes=max(config.request_slot_bytes, config.response_slot_bytes),
                order=config.order,
                cpus=[list(cpus) for cpus in place(config.memory.numa, usable_nodes()).cpus],
            )
            stack.callback(self._server.close)
            self._serving = Serving(config.name, self._server, config.previous_epoch_s)
            self._mover = Mover(lambda: self._config, self._serving, self._events.put)
            stack.callback(self._mover.close)
            self._control = ControlPlane(config, self._serving, self._mover)
            stack.callback(self._control.stop)
            logs.info("control plane listening; loading", grpc=self._control.address)
            self._metrics = MetricsServer(config.listen.metrics, self._serving, self._mover) if config.listen.metrics else None
            if self._metrics is not None:
                stack.callback(self._metrics.close)
            stack.callback(self._loader.close)
            self._load(config)
            self._obey(stack)
            self._drain()
        logs.info("stopped")

    def _take_signals(self, stack: contextlib.ExitStack) -> None:
        def take(number: int, frame: FrameType | None) -> None:
            self._stop_signals += number != signal.SIGHUP
            self._events.put(signal.Signals(number))  # SimpleQueue.put is reentrant: safe in a signal handler

        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            stack.callback(signal.signal, number, signal.signal(number, take))

    def _obey(self, stack: contextlib.ExitStack) -> None:
        """The main loop: one event after the other until a signal asks to stop."""
        while True:
            event = self._next_event()
            if isinstance(event, Loaded):
                self._loading = False
                self._adopt(event, stack)
            elif isinstance(event, LoadFailed):
                self._loading = False
                self._refuse(event.error)
            elif isinstance(event, Moved):
                if event.mover.adopt(event.published):
                    self._serve(event.published, stack)
                    logs.info("prepared", plan_epoch=event.published.plan.epoch)
            elif isinstance(event, InPlace):
                self._hear(event.plan)
            elif event is signal.SIGHUP:
                self._reload_wanted = True
            else:
                logs.info("asked to stop", signal=event.name)
                return
            if self._reload_wanted and not self._loading:
                self._reload_wanted = False
                self._reload()

    def _next_event(self) -> Event:
        # The kernel may give a signal to any thread (one that follows SIGCONT at once, it does); its handler runs when this
        # thread wakes, which nothing but an event or this timeout makes it do.
        while True:
            with contextlib.suppress(queue.Empty):
                return self._events.get(timeout=WAKE_S)
            if (gone := self._serving.drop_if_due()) is not None:
                self._mover.clean(gone)
                self._list_again()

    def _planned(self, plan: Plan) -> None:
        """On the loader's thread: while its shards are loaded, the first plan's model is known and not healthy."""
        if not self._ready:
            self._serving.announce(plan.model)

    def _load(self, config: SidecarConfig) -> None:
        self._loading = True
        self._loader.start(config, self._serving.plans)

    def _reload(self) -> None:
        """Re-read the configuration; what is wrong with it is logged and changes nothing."""
        try:
            config = load_sidecar_config(self._config_path)
        except SidepoolError as e:
            self._refuse(e)
            return
        logs.set_level(config.log_level)
        changed = {key for key, value in config if value != getattr(self._config, key)}
        if changed - RELOADABLE:
            logs.error("these settings change only with a restart; the old values stay", settings=sorted(changed - RELOADABLE))
        if self._mover.unsettled:
            logs.error("the plan is not read again: a change of plans is under way", remedy="sidepool plan apply, or its --undo")
            return
        self._load(self._config.model_copy(update={key: getattr(config, key) for key in RELOADABLE}))

    def _adopt(self, loaded: Loaded, stack: contextlib.ExitStack) -> None:
        """Serve what has been loaded; the first time, also start listening for lanes and say that we are ready."""
        self._config = loaded.config
        first, self._started = not self._started, True
        for published in loaded.published:
            # One that was brought here, and the one it has not replaced yet.
            if (gone := self._serving.publish(published, keep_previous=first)) is not None:
                self._mover.clean(gone)
            self._serve(published, stack)
        if loaded.config.promote:
            promote(loaded.published)
        if first:
            self._mover.resume()
        if first and not loaded.published:
            logs.info("waiting for a plan", grpc=self._control.address)
        elif not loaded.published:
            logs.info("reloaded; the plan is the one already served")
        elif not first:
            logs.info("reloaded", plan_epoch=loaded.published[-1].plan.epoch)

    def _serve(self, published: Published, stack: contextlib.ExitStack) -> None:
        """What is published is there for rankers; the first time, also start listening for lanes and say that we are ready."""
        if not self._listening:
            self._listen(published.plan, stack)
            self._listening = True
        self._serving.open()
        if not self._ready:
            self._ready = True
            if self._config.balance and self._config.engines > 1:
                stack.callback(Balancer(self._server).close)
            self._coordinate(published.plan, stack)
            self._say_ready(published.plan, stack)
        self._list_again()

    def _coordinate(self, plan: Plan, stack: contextlib.ExitStack) -> None:
        """Be listed in etcd, and hear from it which plan is in place; neither is needed for serving."""
        coordination = self._config.coordination
        if coordination is None:
            return
        self._membership = Membership(coordination, self._known_address(plan, self._control.address), self._serving)
        stack.callback(self._membership.close)
        stack.callback(PlanFollower(coordination.plan_source(), self._events.put).close)

    def _list_again(self) -> None:
        """What etcd says of this sidecar has changed."""
        if self._membership is not None:
            self._membership.update()

    def _hear(self, plan: Plan) -> None:
        held = self._serving.held(plan.fingerprint) is not None
        logs.info("plan in place", plan_epoch=plan.epoch, answered=held, placed=self._config.name in plan.sidecar_index)
        try:
            self._mover.in_place(plan)
        except SidepoolError as e:
            logs.error("the plan before stays", code=e.code, reason=str(e))

    def _known_address(self, plan: Plan, bound: str) -> str:
        """A bound `host:port` as others reach it: nobody connects to "every address"; the plan says which one they know."""
        host, port = split_endpoint(bound)
        known = split_endpoint(plan.sidecars[plan.sidecar_index[self._config.name]].address)[0]
        return join_endpoint(known if is_wildcard(host) else host, port)

    def _refuse(self, error: Exception) -> None:
        """A load failed: fatal at start, else the old plan goes on being served."""
        if not self._started:
            raise error
        code = error.code if isinstance(error, SidepoolError) else "INTERNAL"
        logs.error("reload refused; what was served before is served on", code=code, reason=str(error))

    def _listen(self, plan: Plan, stack: contextlib.ExitStack) -> None:
        """Open the data lanes."""
        listen, addresses = self._config.listen, self._control.servicer.lane_addresses
        unix = listen.unix or str(stack.enter_context(private_directory()) / SOCKET_NAME)
        if Path(unix).exists() and not Path(unix).is_socket():
            raise ConfigError(
                f"listen.unix: found {unix!r}, a file that is no socket; allowed: a new path, or a dead process's socket"
            )
        with _as_config_error("listen.unix", unix):
            self._server.listen_unix(unix)
        # Closing removes the socket, and must come before its directory goes: callbacks run last in, first out.
        stack.callback(self._server.close)
        addresses["shm"] = unix
        if listen.tcp is not None:
            host, port = split_endpoint(listen.tcp)
            with _as_config_error("listen.tcp", listen.tcp):
                port = self._server.listen_tcp(host, port, **listen.tcp_credits.native())
            addresses["tcp"] = self._known_address(plan, join_endpoint(host, port))
        if listen.rdma is not None:
            with _as_config_error("listen.rdma.path.device", listen.rdma.path.device):
                addresses["rdma"] = self._server.listen_rdma(listen.rdma.native())

    def _say_ready(self, plan: Plan, stack: contextlib.ExitStack) -> None:
        lanes = self._control.servicer.lane_addresses
        facts = {
            "name": self._config.name,
            "pid": os.getpid(),
            "plan_epoch": plan.epoch,
            "grpc": self._control.address,
            "tcp": lanes.get("tcp"),
            "unix": lanes.get("shm"),
            "rdma": lanes.get("rdma"),
            "metrics": self._metrics.address if self._metrics is not None else None,
        }
        if self._ready_file is not None:
            partial = self._ready_file.with_name(self._ready_file.name + ".partial")
            partial.write_text(json.dumps({"event": "ready", **facts}) + "\n", encoding="utf-8")
            partial.rename(self._ready_file)  # whoever waits for the file never sees half of it
            stack.callback(self._ready_file.unlink, missing_ok=True)
        logs.info("ready", **facts)

    def _drain(self) -> None:
        self._serving.begin_drain()
        self._list_again()
        idle = self._serving.wait_idle(self._config.drain_timeout_s, given_up=lambda: self._stop_signals > 1)
        if not idle:
            logs.error("drain given up", in_flight=self._server.in_flight(), drain_timeout_s=self._config.drain_timeout_s)


@contextlib.contextmanager
def _as_config_error(field: str, found: str) -> Iterator[None]:
    """A listener that cannot be opened is a matter of the configuration."""
    try:
        yield
    except _native.NativeError as e:
        raise ConfigError(f"{field}: found {found!r}: {e.args[1]}") from e
