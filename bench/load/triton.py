"""Triton as a target: `ModelInfer` calls over gRPC, sent by the native core as tritonclient would serialise them."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import grpc
import numpy as np
import tritonclient.grpc as tritonclient
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2, service_pb2_grpc

from sidepool import _native
from sidepool.bench.load.target import OUTCOMES, SPIN_US, Driver, check_at_once
from sidepool.bench.traffic import DATATYPES, Arrays
from sidepool.client.arguments import deadline_ns
from sidepool.client.lanes import is_this_host, split_address
from sidepool.client.shared_regions import Region, SharedRegions
from sidepool.wire.errors import CODES, ConfigError, TransportError

PATH = "/inference.GRPCInferenceService/ModelInfer"
# One connection is what a tritonclient has; Triton serves many on one as well as on several.
CONNECTIONS = 1
# What requests outstanding may take in this process, about a kilobyte each: a million of them, far beyond what Triton survives.
MEMORY_BYTES = 1 << 30
# Loading a model's first request may compile things.
FIRST_ANSWER_S = 60.0
# How often a request is sent before the load: a queue that refuses what is late may do so while the machine stalls for a moment.
FIRST_ATTEMPTS = 20

# The ranker's parameter for an absolute deadline; what stands for it in a message until it is sent: a time in the year 3000, which
# takes as many bytes as any other.
DEADLINE, _PLACE = "deadline_unix_us", 32_503_680_000_123_457

_GRPC_NAMES = {code.value[0]: code.name for code in grpc.StatusCode}


class GrpcTarget:
    """Any unary gRPC method, with requests that are serialised already."""

    def __init__(
        self,
        address: str,
        path: str,
        messages: Sequence[bytes],
        *,
        deadline_ms: float = 0.0,
        deadlines_at: Sequence[int] | None = None,
        connections: int = CONNECTIONS,
        memory_bytes: int = MEMORY_BYTES,
        spin_us: int = SPIN_US,
    ) -> None:
        """`address`: `host:port`; `path`: `/package.Service/Method`. Raises `ConfigError` where libnghttp2 is missing.

        deadlines_at: per message, the place of a protobuf integer of eight bytes, or -1; each call has its deadline there,
        `deadline_ms` after it was due, in microseconds since 1970.
        """
        reason = _native.grpc_load_unavailable()
        if reason:
            raise ConfigError(reason)
        if not messages:
            raise ConfigError("messages: found none; allowed: at least one request")
        self._host, self._port = split_address(address)
        self._address, self._path, self._deadline_ms = address, path, deadline_ms
        self._messages = list(zip(messages, deadlines_at or [-1] * len(messages), strict=True))
        self._connections = check_at_once("connections", connections)
        self._memory_bytes, self._spin_us = memory_bytes, spin_us

    @property
    def requests(self) -> int:
        return len(self._messages)

    def driver(self) -> Driver:
        return _native.grpc_load(
            host=self._host,
            port=self._port,
            path=self._path,
            messages=self._messages,
            deadline_ns=int(self._deadline_ms * 1e6),
            words=list(CODES),
            connections=self._connections,
            memory_bytes=self._memory_bytes,
            spin_us=self._spin_us,
        )

    def status_name(self, status: int) -> str:
        """gRPC's name, and the code that a ranker put into its message."""
        if status in OUTCOMES:
            return OUTCOMES[status]
        word, code = divmod(status, 256)
        return _GRPC_NAMES.get(code, str(code)) + (f" [{CODES[word - 1]}]" if word else "")

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "grpc",
            "address": self._address,
            "requests": len(self._messages),
            "message_bytes": round(float(np.mean([len(m) for m, _ in self._messages])), 1),
            "deadline_ms": self._deadline_ms or None,
            "connections": self._connections,
            "memory_limit_bytes": self._memory_bytes,
        }

    def close(self) -> None:
        """Nothing outlives a run."""


class TritonTarget(GrpcTarget):
    """A model in Triton, and the distinct requests that it is asked."""

    def __init__(
        self,
        address: str,
        model: str,
        requests: Sequence[Arrays],
        *,
        deadline_ms: float | None = None,
        parameters: Mapping[str, int | str | bool] | None = None,
        shared_memory: bool = False,
        **limits: int,
    ) -> None:
        """Ask `model` at `address` (`host:port`, gRPC) once, so that what comes is a load and not its loading.

        requests: input arrays by name, as Triton takes them. deadline_ms: the request's `timeout`, as tritonclient sets it, which
        rankers take as their budget; where Triton runs on this host, whose clock it reads, also `deadline_unix_us`, counted from
        when the request was due, so that time in Triton's queue is part of it. parameters: further request parameters.
        shared_memory: inputs and outputs lie in system shared memory; a request that is outstanding twice then has its outputs
        written to the same place. `limits`: see `GrpcTarget`.
        Raises `TransportError` (no answer to the first request), `ConfigError`.
        """
        self._model = model
        self._stack = contextlib.ExitStack()
        self._shared = shared_memory
        given = dict(parameters or {})
        if deadline_ms is not None:
            given["timeout"] = max(1, deadline_ns(deadline_ms) // 1000)
            if is_this_host(split_address(address)[0]):
                given[DEADLINE] = _PLACE
        encoded = [_request(model, arrays, given) for arrays in requests]
        with self._stack:
            if encoded:
                self._prepare(address, encoded, requests)
            messages = [m.SerializeToString() for m in encoded]
            super().__init__(
                address,
                PATH,
                messages,
                deadline_ms=deadline_ms or 0.0,
                deadlines_at=[_place(message) if DEADLINE in given else -1 for message in messages],
                **limits,
            )
            self._stack = self._stack.pop_all()

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"kind": "triton", "model": self._model, "shared_memory": self._shared}

    def close(self) -> None:
        self._stack.close()

    def _prepare(self, address: str, encoded: list[Any], requests: Sequence[Arrays]) -> None:
        unlimited = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
        with grpc.insecure_channel(address, options=unlimited) as channel:
            infer = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer

            def ask(message: Any) -> Any:
                for left in reversed(range(FIRST_ATTEMPTS)):
                    try:
                        return infer(message, timeout=FIRST_ANSWER_S)
                    except grpc.RpcError as e:
                        if e.code() is not grpc.StatusCode.UNAVAILABLE or not left:
                            what = f"{e.code().name}: {e.details()}"
                            raise TransportError(f"Triton at {address}, model {self._model!r}: {what}") from e
                return None

            if not self._shared:
                ask(encoded[0])
                return
            # The size of each request's outputs is what its answer has.
            answers = [ask(message) for message in encoded]
            self._share(address, encoded, requests, answers)
            ask(encoded[0])

    def _share(self, address: str, encoded: list[Any], requests: Sequence[Arrays], answers: list[Any]) -> None:
        """Move inputs and outputs of all requests into one region."""
        client = self._stack.enter_context(contextlib.closing(tritonclient.InferenceServerClient(address)))
        regions = self._stack.enter_context(contextlib.closing(SharedRegions(lambda: client)))
        tensors: dict[str, NDArray[Any]] = {}
        for i, (arrays, answer) in enumerate(zip(requests, answers, strict=True)):
            tensors |= {f"{i} in {name}": array for name, array in arrays.items()}
            outputs = zip(answer.outputs, answer.raw_output_contents, strict=True)
            tensors |= {f"{i} out {output.name}": np.zeros(len(raw), np.uint8) for output, raw in outputs}
        region = self._stack.enter_context(regions.borrow(tensors))
        if region is None:
            raise ConfigError(f"shared_memory: Triton at {address} cannot map this host's shared memory")
        places = region.write(tensors)
        for i, (message, answer) in enumerate(zip(encoded, answers, strict=True)):
            del message.raw_input_contents[:]
            for tensor in message.inputs:
                _refer(tensor, region, places[f"{i} in {tensor.name}"])
            for output in answer.outputs:
                _refer(message.outputs.add(name=output.name), region, places[f"{i} out {output.name}"])


def _request(model: str, arrays: Arrays, parameters: Mapping[str, int | str | bool]) -> Any:
    message = service_pb2.ModelInferRequest(model_name=model)
    for name, value in parameters.items():
        kind = "bool_param" if isinstance(value, bool) else "int64_param" if isinstance(value, int) else "string_param"
        setattr(message.parameters[name], kind, value)
    for name, array in arrays.items():
        message.inputs.add(name=name, datatype=DATATYPES[array.dtype.name], shape=array.shape)
        message.raw_input_contents.append(np.ascontiguousarray(array).tobytes())
    return message


def _place(message: bytes) -> int:
    """Where `_PLACE` lies in a message."""
    digits = bytes(_PLACE >> 7 * i & 0x7F | (0x80 if i < 7 else 0) for i in range(8))
    return message.index(digits, message.index(DEADLINE.encode()))


def _refer(tensor: Any, region: Region, place: tuple[int, int]) -> None:
    tensor.parameters["shared_memory_region"].string_param = region.name
    tensor.parameters["shared_memory_offset"].int64_param = place[0]
    tensor.parameters["shared_memory_byte_size"].int64_param = place[1]
