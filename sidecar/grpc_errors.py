"""The one place where errors become gRPC statuses."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import grpc

from sidepool._native import NativeError
from sidepool.wire.errors import SidepoolError, error_for

# Trailing metadata of every failed call: the stable code, for clients that match on it rather than on the gRPC status.
CODE_KEY = "sidepool-code"

_STATUSES = {
    "CONFIG": grpc.StatusCode.FAILED_PRECONDITION,
    "PLAN": grpc.StatusCode.FAILED_PRECONDITION,
    "REJECTED": grpc.StatusCode.INVALID_ARGUMENT,
    "FRAME": grpc.StatusCode.INVALID_ARGUMENT,
    # UNAVAILABLE is the one status that gRPC's own retry policies take up, here or at another replica.
    "OVERLOADED": grpc.StatusCode.UNAVAILABLE,
    "TRANSPORT": grpc.StatusCode.UNAVAILABLE,
    "DEADLINE": grpc.StatusCode.DEADLINE_EXCEEDED,
    "SHARD": grpc.StatusCode.DATA_LOSS,
}

Servicer = TypeVar("Servicer")
Request = TypeVar("Request")
Reply = TypeVar("Reply")


def status_for(error: SidepoolError) -> grpc.StatusCode:
    """The gRPC status of an error; INTERNAL for a code without one."""
    return _STATUSES.get(error.code, grpc.StatusCode.INTERNAL)


def translated(
    method: Callable[[Servicer, Request, grpc.ServicerContext], Reply],
) -> Callable[[Servicer, Request, grpc.ServicerContext], Reply]:
    """Wrap an RPC method: a `SidepoolError` or `NativeError` ends the call with its status, code and message."""

    @functools.wraps(method)
    def call(servicer: Servicer, request: Request, context: grpc.ServicerContext) -> Reply:
        try:
            return method(servicer, request, context)
        except NativeError as e:
            status, message = e.args
            error = error_for(status, message)
        except SidepoolError as e:
            error = e
        context.set_trailing_metadata(((CODE_KEY, error.code),))
        return context.abort(status_for(error), str(error))  # raises

    return call
