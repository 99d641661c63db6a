"""`sidepool plan apply`, its undo, and `rollback`: the deployment's plan changes while lookups go on.

Everything that is known about a change is asked of the sidecars and read from the plan's place: the tool may be killed at any
moment, and run again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import grpc

from sidepool.wire.control_channel import ClientTls, fault_of
from sidepool.wire.control_pb2 import DropRequest, MoveReply, PrepareRequest, ProgressRequest
from sidepool.wire.control_pb2_grpc import SidecarStub
from sidepool.wire.errors import PlanError, SidepoolError, TransportError, error_with_code
from sidepool.wire.plan import Plan, SidecarAddress, check_successor, pack_plan, unpack_plan
from sidepool.wire.plan_source import PlanSource

# Every call is answered at once; a machine under full load may take a few seconds for it.
CALL_TIMEOUT_S = 10.0
# How often sidecars are asked how far they are: small moves are over soon, large ones are watched by people, and every question
# takes a millisecond of each machine.
FIRST_POLL_S, LAST_POLL_S = 0.05, 1.0
# A sidecar that does not answer may be starting again; its start reads and checks all it has.
PATIENCE_S = 60.0
# Calls are waits; more threads gain nothing even for hundreds of sidecars.
CALL_THREADS = 16

Show = Callable[[Sequence[MoveReply]], None]


@dataclass
class Places:
    """Where readers of the deployment's plan find it; the last one is what counts."""

    sources: Sequence[PlanSource]

    def read(self) -> Plan:
        """The deployment's present plan. It is replaced last, so that the one before is known until everything is done."""
        return self.sources[-1].read()

    def replace(self, old: Plan, new: Plan) -> None:
        """`new` everywhere, or where one place refuses it, `old` again in those that had taken it; raises `PlanError`."""
        done: list[PlanSource] = []
        try:
            for source in self.sources:
                source.replace(old, new)
                done.append(source)
        except SidepoolError:
            for source in done:
                source.replace(new, old)
            raise


class Peers:
    """The control planes of some sidecars."""

    def __init__(self, sidecars: Iterable[SidecarAddress], tls: ClientTls) -> None:
        self.sidecars = {s.name: s for s in sidecars}
        self._channels = {name: tls.channel(s.address) for name, s in self.sidecars.items()}
        self._threads = ThreadPoolExecutor(min(len(self.sidecars), CALL_THREADS))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._threads.shutdown(cancel_futures=True)
        for channel in self._channels.values():
            channel.close()

    def ask(self, method: str, request: Any, names: Iterable[str] | None = None) -> dict[str, MoveReply | SidepoolError]:
        """The same call to all, or to some: what each answers, or why it does not."""
        chosen = list(self.sidecars if names is None else names)
        return dict(zip(chosen, self._threads.map(lambda name: self._call(name, method, request), chosen), strict=True))

    def insist(self, method: str, request: Any) -> dict[str, MoveReply]:
        """The same, of all; raises what the first failed with."""
        answers = {}
        for name, answer in self.ask(method, request).items():
            if isinstance(answer, SidepoolError):
                raise answer
            answers[name] = answer
        return answers

    def _call(self, name: str, method: str, request: Any) -> MoveReply | SidepoolError:
        stub = SidecarStub(self._channels[name])  # type: ignore[no-untyped-call]
        try:
            reply: MoveReply = getattr(stub, method)(request, timeout=CALL_TIMEOUT_S)
        except grpc.RpcError as e:
            return fault_of(e, f"sidecar {name!r} ({self.sidecars[name].address})")
        if reply.name != name:  # rankers would ask it for what another one holds
            return PlanError(f"sidecar {name!r}: address: found {reply.name!r} at {self.sidecars[name].address}; allowed: {name!r}")
        return reply


def apply(places: Places, new: Plan, tls: ClientTls, *, bytes_per_s: float = 0.0, show: Show = lambda replies: None) -> Plan:
    """Change the deployment to `new`; returns the plan before it, which goes on being answered for `previous_epoch_s`.

    Bring every sidecar of `new` what it lacks; then replace the plan, which rankers follow; then let the old one go. What goes
    wrong before the plan is replaced is undone. Again after an interruption: goes on. Raises `PlanError`, `TransportError`,
    `ShardCorrupt`.
    """
    old = places.read()
    with Peers(new.sidecars, tls) as peers:
        if old.fingerprint == new.fingerprint:
            old = _previous(peers.insist("Progress", ProgressRequest()).values(), new) or new
        else:
            check_successor(old, new)
            if new.epoch <= old.epoch:
                raise PlanError(f"epoch: found {new.epoch}; allowed: above {old.epoch}, that of the deployment's plan")
            try:
                _prepare(peers, old, new, bytes_per_s, show)
                places.replace(old, new)
            except SidepoolError as e:
                left = [str(a) for a in peers.ask("Drop", _drop(new, at_once=True)).values() if isinstance(a, TransportError)]
                raise type(e)(f"{e}; undone" + (f", but for what cannot be reached: {'; '.join(left)}" if left else "")) from e
        if old is not new:
            peers.insist("Drop", _drop(old))
    return old


def undo(places: Places, new: Plan, tls: ClientTls) -> None:
    """Give up the change to `new`, however far it came before its plan was in place; raises `PlanError` after that."""
    old = places.read()
    if old.fingerprint == new.fingerprint:
        raise PlanError(f"epoch: found {new.epoch}, which is in place; allowed: one that is not, or sidepool plan rollback")
    switched = [s for s in places.sources if s.read().fingerprint == new.fingerprint]
    for source in switched:
        source.replace(new, old)
    with Peers(new.sidecars, tls) as peers:
        # Rankers that read one of the places have followed already, and take a moment to come back.
        peers.insist("Drop", _drop(new, at_once=not switched))


def rollback(places: Places, tls: ClientTls) -> Plan:
    """Change the deployment back to the plan before, as long as all its sidecars still answer it; returns that plan.

    Raises `PlanError` where one does not any more: nothing has changed then.
    """
    new = places.read()
    with Peers(new.sidecars, tls) as peers:
        old = _previous(peers.insist("Progress", ProgressRequest()).values(), new)
        if old is None:
            raise PlanError(
                f"rollback: found nothing but epoch {new.epoch} on its sidecars; allowed: before the one before it is gone"
            )
        with Peers(old.sidecars, tls) as before:
            for name, reply in before.insist("Progress", ProgressRequest()).items():
                if old.fingerprint not in {held.fingerprint for held in reply.plans}:
                    raise PlanError(f"rollback: sidecar {name!r} answers epoch {old.epoch} no longer; allowed: all of them do")
        # First it is the new plan that leaves, so that the old one cannot go in the middle of this.
        peers.insist("Drop", _drop(new))
        try:
            places.replace(new, old)
        except SidepoolError:
            peers.insist("Prepare", PrepareRequest(plan=pack_plan(new), present=pack_plan(old)))
            raise
    return old


def _prepare(peers: Peers, old: Plan, new: Plan, bytes_per_s: float, show: Show) -> None:
    """Return once every sidecar of `new` answers it; raises where that cannot be."""
    request = PrepareRequest(plan=pack_plan(new), present=pack_plan(old), bytes_per_s=bytes_per_s)
    answers = peers.insist("Prepare", request)  # one that is not there now is an error at once
    heard, pause_s = dict.fromkeys(answers, time.monotonic()), FIRST_POLL_S
    while True:
        show(list(answers.values()))
        ready = [name for name, reply in answers.items() if new.fingerprint in {held.fingerprint for held in reply.plans}]
        if len(ready) == len(peers.sidecars):
            return
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, LAST_POLL_S)
        answers = {}
        for name, answer in peers.ask("Progress", ProgressRequest()).items():
            if isinstance(answer, MoveReply) and answer.phase == "idle":  # it was started again
                answer = peers.ask("Prepare", request, [name])[name]
            if isinstance(answer, SidepoolError):
                if not answer.retryable or time.monotonic() - heard[name] > PATIENCE_S:
                    raise answer
                continue
            if answer.phase == "failed":
                raise error_with_code(answer.code, f"sidecar {name!r}: {answer.reason}")
            answers[name], heard[name] = answer, time.monotonic()


def _previous(replies: Iterable[MoveReply], new: Plan) -> Plan | None:
    """The plan that is still answered beside `new`."""
    for reply in replies:
        if reply.previous and reply.plans[0].fingerprint == new.fingerprint:
            return unpack_plan(reply.previous, f"sidecar {reply.name!r}: previous plan")
    return None


def _drop(plan: Plan, *, at_once: bool = False) -> DropRequest:
    return DropRequest(plan_fingerprint=plan.fingerprint, at_once=at_once)
