"""The errors of sidepool: one root, stable codes, and the native status numbers they stand for.

A code is what a caller may match on; it never changes. ``retryable`` says whether the same
call can succeed later without being changed. The native core reports numbers (`Status`), which
are translated to these classes here and nowhere else.
"""

from __future__ import annotations

import enum
from typing import ClassVar


class Status(enum.IntEnum):
    """Outcome of a lookup or of one of its parts, as the native core and the frames carry it."""

    OK = 0
    REJECTED = 1
    OVERLOADED = 2
    DEADLINE = 3
    TRANSPORT = 4
    FRAME = 5
    PLAN = 6
    SHARD = 7
    DRAINING = 8
    INTERNAL = 9


class SidepoolError(Exception):
    """Root of every error that sidepool raises on purpose."""

    code: ClassVar[str] = "INTERNAL"
    retryable: ClassVar[bool] = False


class ConfigError(SidepoolError):
    """A configuration file or option is wrong; the message names the field, what was found and what is allowed."""

    code = "CONFIG"


class PlanError(SidepoolError):
    """A plan is inconsistent in itself, with its shards, or with the plan of the peer."""

    code = "PLAN"


class CutError(SidepoolError):
    """A model cannot be partitioned as asked; the message says what to change."""

    code = "CUT"


class LookupRejected(SidepoolError):
    """The caller's input is wrong; sending it again cannot help."""

    code = "REJECTED"


class Overloaded(SidepoolError):
    """No credit was free, or the sidecar is draining; the same call may succeed later or elsewhere."""

    code = "OVERLOADED"
    retryable = True


class DeadlineExceeded(SidepoolError):
    """The budget ran out, or was too small for the work to be finished within it."""

    code = "DEADLINE"
    retryable = True


class TransportError(SidepoolError):
    """A lane could not be connected, or its peer was lost."""

    code = "TRANSPORT"
    retryable = True


class FrameError(SidepoolError):
    """Bytes that are not a valid frame."""

    code = "FRAME"


class ShardCorrupt(SidepoolError):
    """A shard file does not hold what its manifest says; the message names file and tensor."""

    code = "SHARD"


_BY_STATUS: dict[Status, type[SidepoolError]] = {
    Status.REJECTED: LookupRejected,
    Status.OVERLOADED: Overloaded,
    Status.DEADLINE: DeadlineExceeded,
    Status.TRANSPORT: TransportError,
    Status.FRAME: FrameError,
    Status.PLAN: PlanError,
    Status.SHARD: ShardCorrupt,
    Status.DRAINING: Overloaded,
    Status.INTERNAL: SidepoolError,
}


def error_for(status: int, message: str) -> SidepoolError:
    """The exception for a native status that is not OK; an unknown number becomes `SidepoolError`."""
    try:
        known = Status(status)
    except ValueError:
        return SidepoolError(f"unknown native status {status}: {message}")
    return _BY_STATUS.get(known, SidepoolError)(message)


def error_with_code(code: str, message: str) -> SidepoolError:
    """The exception whose stable `code` a peer sent; an unknown code becomes `SidepoolError`."""
    return _BY_CODE.get(code, SidepoolError)(message)


_KINDS: tuple[type[SidepoolError], ...] = (*_BY_STATUS.values(), ConfigError, CutError)
_BY_CODE = {kind.code: kind for kind in _KINDS}
CODES = tuple(_BY_CODE)
"""Every stable code."""
