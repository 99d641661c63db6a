"""The one place where errors become gRPC statuses."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NoReturn, TypeVar

import grpc

from sidepool._native import NativeError
from sidepool.wire.control_channel import CODE_KEY
from sidepool.wire.errors import SidepoolError, error_for

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
        except (NativeError, SidepoolError) as e:
            _abort(context, e)

    return call


def translated_stream(
    method: Callable[[Servicer, Request, grpc.ServicerContext], Iterator[Reply]],
) -> Callable[[Servicer, Request, grpc.ServicerContext], Iterator[Reply]]:
    """`translated`, for a method that yields its replies."""

    @functools.wraps(method)
    def call(servicer: Servicer, request: Request, context: grpc.ServicerContext) -> Iterator[Reply]:
        try:
            yield from method(servicer, request, context)
        except (NativeError, SidepoolError) as e:
            _abort(context, e)

    return call


def _abort(context: grpc.ServicerContext, e: NativeError | SidepoolError) -> NoReturn:
    error = e if isinstance(e, SidepoolError) else error_for(*e.args)
    context.set_trailing_metadata(((CODE_KEY, error.code),))
    context.abort(status_for(error), str(error))
    raise AssertionError("abort raises")
