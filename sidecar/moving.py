"""A change of plans at one sidecar, as `sidepool plan apply` asks for it: bring shards, answer under both plans, drop one.

What is under way is told by the directories here (`sidepool.sidecar.epochs`) and by what is served; the tool keeps nothing.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sidepool.sidecar import logs
from sidepool.sidecar.config import SidecarConfig
from sidepool.sidecar.epochs import (
    Before,
    MoveRecord,
    MoveState,
    complete_directories,
    complete_directory,
    load_record,
    partial_directories,
    remove_directory,
    save_record,
)
from sidepool.sidecar.fetching import COPY_SPEED, Fetcher, MoveStopped, Order, Progress
from sidepool.sidecar.loader import copy_rows, load_source
from sidepool.sidecar.pacing import Pacer
from sidepool.sidecar.serving import Published, Serving, State
from sidepool.wire.control_channel import ClientTls
from sidepool.wire.control_pb2 import MoveReply
from sidepool.wire.errors import ConfigError, Overloaded, PlanError, SidepoolError
from sidepool.wire.plan import Plan, check_successor, pack_plan

# A move's thread gives way to engines that wake, and still gets a tenth of a core where they are busy all the time: while it has
# the interpreter, the control plane waits for it.
MOVE_NICENESS = 10


@dataclass(frozen=True)
class Moved:
    """A new plan's shards are here and loaded."""

    published: Published
    mover: Mover


class Move:
    """Bringing one plan here, on a thread of its own."""

    def __init__(self, plan: Plan, fetcher: Fetcher) -> None:
        self.plan = plan
        self.fetcher = fetcher
        self.phase = "fetching"
        self.error: SidepoolError | None = None
        self.thread: threading.Thread | None = None


class Mover:
    """Answers `Prepare`, `Progress` and `Drop`. Thread-safe. One move at a time; of its plans a sidecar holds two at most."""

    def __init__(self, config: Callable[[], SidecarConfig], serving: Serving, report: Callable[[Moved], None]) -> None:
        """config: what is in force. report: is told, on the move's thread, when a plan is loaded; calls `adopt` in its own time."""
        self._config = config
        self._serving = serving
        self._report = report
        self._pacer = Pacer()
        self._lock = threading.RLock()
        self._move: Move | None = None
        self._last: tuple[Path, MoveRecord] | None = None
        """The record read or written last; that of a large plan takes a while to read."""

    @property
    def unsettled(self) -> bool:
        """Whether a plan is on its way, or answered beside another until one of them is dropped."""
        with self._lock:
            if self._move is not None and self._move.error is None:
                return True
            record = self._record_of_present("prepared", "switched")
            return record is not None and (record.state == "prepared" or len(self._serving.plans) == 2)

    def prepare(self, plan: Plan, present: Plan, bytes_per_s: float) -> None:
        """Begin to bring `plan` here, or go on; nothing to do where it is answered already. Raises `PlanError`, `ConfigError`."""
        name = self._serving.name
        if self._serving.state is State.DRAINING:
            raise Overloaded(f"sidecar {name!r} is draining")
        check_successor(present, plan)
        if plan.epoch <= present.epoch:
            raise PlanError(f"epoch: found {plan.epoch}; allowed: above {present.epoch}, that of the present plan")
        if name not in plan.sidecar_index:
            raise PlanError(f"sidecar {name!r} is not in the plan; allowed: one of {sorted(plan.sidecar_index)}")
        with self._lock:
            if (held := self._serving.held(plan.fingerprint)) is not None:
                self._serving.keep(held)
                self._mark("prepared", of=held)
                return
            if self._move is not None and self._move.error is None:
                if self._move.plan.fingerprint != plan.fingerprint:
                    raise PlanError(
                        f"epoch: found {plan.epoch}, while epoch {self._move.plan.epoch} is on its way; allowed: that one"
                    )
                return
            own = self._make_room(plan, present)
            self._start(plan, present, own, bytes_per_s)

    def _make_room(self, plan: Plan, present: Plan) -> Published | None:
        """A sidecar answers two plans: of two that are held, the one before the present one goes. Returns what is held of that."""
        plans = self._serving.plans
        if any(p.plan.epoch == plan.epoch for p in plans):
            raise PlanError(f"epoch: found {plan.epoch}, which stands for another plan here; allowed: one that was not used yet")
        own = self._serving.held(present.fingerprint)
        if own is None and self._serving.name in present.sidecar_index:
            found = [p.plan.epoch for p in plans]
            raise PlanError(f"present plan: found epoch {present.epoch}; allowed: what this sidecar answers, {found}")
        if own is not None and plans[0] is not own:
            raise PlanError(
                f"epoch: found {plan.epoch}, while epoch {plans[0].plan.epoch} is prepared; allowed: that one, or undo it"
            )
        for older in plans[1:]:
            self._drop(older, at_once=True)
        return own

    def _start(self, plan: Plan, present: Plan, own: Published | None, bytes_per_s: float) -> None:
        config = self._config()
        order = Order(
            name=config.name,
            new=plan,
            present=present,
            base=Path(config.shards),
            own=own,
            bytes_per_s=bytes_per_s or config.move_rate,
            promote=config.promote,
            tls=_client_tls(config),
        )
        before = self._serving.published
        kept = Before(plan=before.plan, shards=before.shards.name) if before is not None else None
        record = MoveRecord(state="prepared", plan=plan, replaces=present.fingerprint, before=kept)
        move = self._move = Move(plan, Fetcher(order, self._pacer))
        logs.info("a new plan is on its way here", plan_epoch=plan.epoch, bytes_per_s=order.bytes_per_s)
        move.thread = threading.Thread(target=self._run, args=(move, record, config), name="move")
        move.thread.start()

    def _run(self, move: Move, record: MoveRecord, config: SidecarConfig) -> None:
        """On the move's thread."""
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), MOVE_NICENESS)  # of this thread alone
        try:
            directory = move.fetcher.run(record)
            move.phase = "loading"
            # Every row was checked on its way and summed where it lies; reading all of them again would slow lookups.
            beside = self._serving.published
            published = load_source(config, move.plan, directory, verify=False, beside=beside)
            if config.promote:  # before the first lookup, which would otherwise pay for mapped pages
                copy_rows(published, beside, lambda count: move.fetcher.take_turn(count / COPY_SPEED))
        except MoveStopped:
            return
        except Exception as e:  # a thread has no caller: whoever asks for progress is told
            move.error = e if isinstance(e, SidepoolError) else SidepoolError(f"{type(e).__name__}: {e}")
            logs.error("the new plan is not here", plan_epoch=move.plan.epoch, code=move.error.code, reason=str(e))
        else:
            self._report(Moved(published, self))

    def adopt(self, published: Published) -> bool:
        """Answer lookups under a plan that was loaded, beside the one before it; False where it was given up meanwhile."""
        with self._lock:
            if self._move is None or self._move.plan is not published.plan:
                return False
            self._serving.publish(published, keep_previous=True)
            self._move = None
            return True

    def resume(self) -> None:
        """After a start: the plan that was on its way out goes on leaving, and what is older than all that is served goes."""
        with self._lock:
            served = [p.shards for p in self._serving.plans]
            found = complete_directories(Path(self._config().shards))
            for older in found[1:] if found[:1] == served[:1] else ():
                if older not in served:
                    remove_directory(older)
            if self._record_of_present("switched") is not None and len(plans := self._serving.plans) == 2:
                self._serving.drop(plans[1], self._serving.previous_epoch_s)

    def drop(self, fingerprint: str, *, at_once: bool) -> None:
        """Answer no longer under a plan, at once or after `previous_epoch_s`, or give up bringing it here; what was brought for
        it goes too. Nothing to do where there is nothing of it. Raises `PlanError` for the only plan, unless it was just brought.
        """
        with self._lock:
            if self._move is not None and self._move.plan.fingerprint == fingerprint:
                self._give_up()
            for directory in partial_directories(Path(self._config().shards)):
                marker = directory / "plan"
                if self._move is None and marker.is_file() and marker.read_text(encoding="utf-8") == fingerprint:
                    remove_directory(directory)
            record = self._record_of_present("prepared", "switched")
            if (held := self._serving.held(fingerprint)) is not None:
                self._drop(held, at_once=at_once)
            elif record is not None and fingerprint == record.replaces:  # this sidecar was not in that plan
                self._mark("switched", of=self._serving.plans[0])
                for older in self._serving.plans[1:]:
                    self._drop(older, at_once=at_once)

    def in_place(self, plan: Plan) -> None:
        """The deployment is under `plan` now: where it was prepared here, what it replaces goes, as if `drop` had been asked."""
        with self._lock:
            record = self._record_of_present("prepared")
            if record is not None and record.plan.fingerprint == plan.fingerprint:
                self.drop(record.replaces, at_once=False)

    def _drop(self, published: Published, *, at_once: bool) -> None:
        plans = self._serving.plans
        if len(plans) == 1 and self._record_of_present("prepared", "switched") is None:
            raise PlanError(f"plan epoch {published.plan.epoch}: is the only one here; allowed: to drop one of two")
        self._mark("abandoned" if published is plans[0] else "switched", of=plans[0])
        if (gone := self._serving.drop(published, 0.0 if at_once else self._serving.previous_epoch_s)) is not None:
            self.clean(gone)

    def _give_up(self) -> None:
        move, self._move = self._move, None
        assert move is not None
        assert move.thread is not None
        move.fetcher.stop()
        move.thread.join()
        remove_directory(complete_directory(Path(self._config().shards), move.plan.epoch))  # where it was just being loaded
        logs.info("the new plan is given up", plan_epoch=move.plan.epoch)

    def clean(self, gone: Published) -> None:
        """Remove what was brought here for a plan that is answered no longer; the one that stays needs nothing of it."""
        with self._lock:
            base = Path(self._config().shards)
            if (present := self._serving.published) is not None:
                self._mark("settled", of=present)
            if gone.shards != base and gone.shards == complete_directory(base, gone.plan.epoch):
                remove_directory(gone.shards)
            logs.info("retired", plan_epoch=gone.plan.epoch)

    def progress(self) -> MoveReply:
        """How far a move is, and what is answered."""
        with self._lock:
            reply = MoveReply(name=self._serving.name, phase="idle")
            if (move := self._move) is not None:
                reply.phase, reply.epoch, reply.fingerprint = move.phase, move.plan.epoch, move.plan.fingerprint
                reply.done_bytes, reply.total_bytes = move.fetcher.progress.done_bytes, move.fetcher.progress.total_bytes
                if move.error is not None:
                    reply.phase, reply.code, reply.reason = "failed", move.error.code, str(move.error)
            elif (record := self._record_of_present("prepared", "switched")) is not None:
                reply.phase, reply.epoch, reply.fingerprint = "ready", record.plan.epoch, record.plan.fingerprint
            plans = self._serving.plans
            for held in plans:
                leaves = self._serving.leaves_in_s(held)
                reply.plans.add(epoch=held.plan.epoch, fingerprint=held.plan.fingerprint, leaves_in_s=leaves)
            if len(plans) == 2:
                reply.previous = pack_plan(plans[1].plan)
            return reply

    def counters(self) -> Progress:
        """Bytes of the move under way; zeros where there is none."""
        move = self._move
        return move.fetcher.progress if move is not None else Progress()

    def close(self) -> None:
        """Give up what is under way, and wait for its thread; what has arrived stays on the disk."""
        with self._lock:
            move = self._move
        if move is not None and move.thread is not None:
            move.fetcher.stop()
            move.thread.join()

    def _record_of_present(self, *states: MoveState) -> MoveRecord | None:
        """The record of what is served, if it was brought here and is in one of `states`."""
        present = self._serving.published
        if present is None or present.shards != complete_directory(Path(self._config().shards), present.plan.epoch):
            return None
        record = self._record(present.shards)
        return record if record.state in states else None

    def _record(self, directory: Path) -> MoveRecord:
        if self._last is None or self._last[0] != directory:
            self._last = (directory, load_record(directory))
        return self._last[1]

    def _mark(self, state: MoveState, *, of: Published) -> None:
        if of.shards == complete_directory(Path(self._config().shards), of.plan.epoch):
            record = self._record(of.shards).model_copy(update={"state": state})
            save_record(record, of.shards)
            self._last = (of.shards, record)


def _client_tls(config: SidecarConfig) -> ClientTls:
    """What this sidecar shows to others, and trusts them by."""
    tls = config.tls
    if tls is None:
        return ClientTls()
    authority = tls.peer_ca or tls.client_ca
    if authority is None:
        raise ConfigError("tls.peer_ca: missing; allowed: the authorities of the other sidecars, to fetch shards from them")
    return ClientTls(Path(authority), Path(tls.cert), Path(tls.key))
