"""`ScoreClient`: scores of a partitioned model from Triton, over tritonclient."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, wait
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from sidepool.client.arguments import deadline_ns, priority_level
from sidepool.client.lanes import is_this_host
from sidepool.client.shared_regions import SharedRegions, Unanswered
from sidepool.client.triton_inputs import ModelInputs, read_model_inputs
from sidepool.wire.errors import (
    CODES,
    ConfigError,
    DeadlineExceeded,
    LookupRejected,
    Overloaded,
    SidepoolError,
    TransportError,
    error_with_code,
)

# Below about a megabyte an inline tensor costs less than the bookkeeping; at 8 MB gRPC takes 9 ms, shared memory 1.6 ms.
DEFAULT_SHARED_MEMORY_BYTES = 1 << 20

# Calls are not cancelled when their budget is spent: Triton before 24.12 may crash on a cancelled gRPC call (its issue 7368), and
# answers soon after a deadline anyway. Who has not answered by then is not there any more.
LATE_ANSWER_S = 5.0

_KINDS: dict[str, type[SidepoolError]] = {
    "StatusCode.INVALID_ARGUMENT": LookupRejected,
    "400": LookupRejected,
    "StatusCode.DEADLINE_EXCEEDED": DeadlineExceeded,
    "StatusCode.RESOURCE_EXHAUSTED": Overloaded,
    "503": Overloaded,
    "StatusCode.UNAVAILABLE": TransportError,
    "StatusCode.CANCELLED": TransportError,
    "StatusCode.NOT_FOUND": ConfigError,
    "404": ConfigError,
}


class ScoreClient:
    """Asks a model in Triton for scores. Any thread may call `score`; a client must not be used after a fork."""

    def __init__(
        self,
        url: str,
        model: str,
        *,
        protocol: Literal["grpc", "http"] = "grpc",
        shared_memory_bytes_threshold: int | None = DEFAULT_SHARED_MEMORY_BYTES,
        features: Sequence[str] = (),
    ) -> None:
        """Connect to `url` (`host:port`) and read the model's configuration, once.

        shared_memory_bytes_threshold: requests from this size on go through system shared memory if Triton runs on this
        host; None switches that off. features: your own names for the sparse columns, in
        model order, for arrays given by name; jagged features have the model's names without it.
        Raises `TransportError` (no Triton there), `ConfigError` (no such model, or tritonclient is not installed).
        """
        if protocol not in ("grpc", "http"):
            raise ConfigError(f"protocol: found {protocol!r}; allowed: grpc, http")
        try:
            if protocol == "grpc":
                import tritonclient.grpc as triton
            else:
                import tritonclient.http as triton
        except ImportError as e:
            raise ConfigError(f"tritonclient: not installed ({e}); pip install 'sidepool[client]'") from e
        self._triton: Any = triton
        self._url = url
        self._model = model
        self._grpc = protocol == "grpc"
        self._same_host = is_this_host(url.rpartition(":")[0].removeprefix("[").removesuffix("]"))
        self._threshold = shared_memory_bytes_threshold
        self._clients: list[Any] = []
        self._late: set[Future[Any]] = set()
        self._of_thread = threading.local()
        self._shared = triton.InferenceServerClient(url) if self._grpc else None
        self._regions = SharedRegions(self._client)
        try:
            self.inputs: ModelInputs = read_model_inputs(self._read_config(), features)
        except BaseException:
            self.close()
            raise

    def score(
        self,
        inputs: Mapping[str, Any],
        *,
        deadline_ms: float | None = None,
        priority: int = 0,
        request_id: str = "",
        traceparent: str | None = None,
    ) -> dict[str, NDArray[Any]]:
        """The model's outputs by name, one row per sample. `inputs`: see `ModelInputs.encode`.

        deadline_ms: budget, also told to the ranker; what Triton's queue takes of it counts where Triton runs on this host, whose
        clock both read. priority: the higher goes first where lookups wait, at a sidecar or for the network.
        traceparent: W3C trace context, passed on to Triton and the ranker.
        Raises `LookupRejected` (before sending, where the fault shows here), `Overloaded`, `DeadlineExceeded`,
        `TransportError`, and whatever else the ranker names by its code.
        """
        tensors = self.inputs.encode(inputs)
        budget_ns = None if deadline_ms is None else deadline_ns(deadline_ms)
        options: dict[str, Any] = {"request_id": request_id}
        parameters: dict[str, Any] = {}
        if priority:
            parameters["lookup_priority"] = priority_level(priority)
        if budget_ns is not None:
            options["timeout"] = max(budget_ns // 1000, 1)
            if self._grpc:
                options["budget_s"] = budget_ns / 1e9
            if self._same_host:
                parameters["deadline_unix_us"] = (time.time_ns() + budget_ns) // 1000
        if traceparent:
            # The header is for Triton's own tracing, the parameter for the ranker when that is off.
            options["headers"] = {"traceparent": traceparent}
            parameters["traceparent"] = traceparent
        if parameters:
            options["parameters"] = parameters
        large = self._threshold is not None and sum(t.nbytes for t in tensors.values()) >= self._threshold
        return self._infer_shared(tensors, options) if large and self._regions.usable else self._infer_inline(tensors, options)

    def close(self) -> None:
        """Unregister shared memory and close the connections, once answers on their way have come (5 s at most). Idempotent."""
        wait(set(self._late), LATE_ANSWER_S)
        self._regions.close()
        for client in [c for c in (self._shared, *self._clients) if c is not None]:
            client.close()
        self._shared, self._clients = None, []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _client(self) -> Any:
        """The gRPC client is shared; tritonclient's HTTP client belongs to one thread."""
        if self._grpc:
            if self._shared is None:
                raise TransportError(f"Triton at {self._url}: this client is closed")
            return self._shared
        client = getattr(self._of_thread, "client", None)
        if client is None:
            client = self._of_thread.client = self._triton.InferenceServerClient(self._url)
            self._clients.append(client)
        return client

    def _read_config(self) -> Mapping[str, Any]:
        try:
            if self._grpc:
                return dict(self._client().get_model_config(self._model, as_json=True)["config"])
            return dict(self._client().get_model_config(self._model))
        except Exception as e:
            raise translate(e, f"Triton at {self._url}, model {self._model!r}") from e

    def _infer_inline(self, tensors: Mapping[str, NDArray[Any]], options: dict[str, Any]) -> dict[str, NDArray[Any]]:
        given = [self._input(name, array) for name, array in tensors.items()]
        for item, array in zip(given, tensors.values(), strict=True):
            item.set_data_from_numpy(array)
        return self._infer(given, options)

    def _infer_shared(self, tensors: Mapping[str, NDArray[Any]], options: dict[str, Any]) -> dict[str, NDArray[Any]]:
        with self._regions.borrow(tensors) as region:
            if region is not None:
                places = region.write(tensors)
                given = [self._input(name, array) for name, array in tensors.items()]
                for item, (at, size) in zip(given, places.values(), strict=True):
                    item.set_shared_memory(region.name, size, at)
                try:
                    return self._infer(given, options)
                except SidepoolError as e:
                    if "shared memory region" not in str(e).lower():
                        raise
        self._regions.forget()
        return self._infer_inline(tensors, options)

    def _input(self, name: str, array: NDArray[Any]) -> Any:
        datatype = next(spec.datatype for spec in self.inputs.inputs if spec.name == name)
        return self._triton.InferInput(name, list(array.shape), datatype)

    def _infer(self, given: list[Any], options: dict[str, Any]) -> dict[str, NDArray[Any]]:
        try:
            if "budget_s" in options:
                result = self._infer_within(given, **options)
            else:
                result = self._client().infer(self._model, given, **options)
        except SidepoolError:
            raise
        except Exception as e:
            raise translate(e, f"Triton at {self._url}, model {self._model!r}") from e
        outputs: dict[str, NDArray[Any]] = {}
        for name in self.inputs.outputs:
            array: NDArray[Any] | None = result.as_numpy(name)
            if array is None:
                raise SidepoolError(f"Triton at {self._url}, model {self._model!r}: no output {name!r} in the response")
            outputs[name] = np.array(array[0] if self.inputs.jagged else array)
        return outputs

    def _infer_within(self, given: list[Any], budget_s: float, **options: Any) -> Any:
        """gRPC: waits for the answer so long; raises `Unanswered` then."""
        answer: Future[Any] = Future()

        def settle(result: Any, error: Exception | None) -> None:
            if error is None:
                answer.set_result(result)
            else:
                answer.set_exception(error)

        self._client().async_infer(self._model, given, settle, client_timeout=budget_s + LATE_ANSWER_S, **options)
        try:
            return answer.result(budget_s)
        except TimeoutError:
            self._late.add(answer)
            answer.add_done_callback(self._late.discard)
            raise Unanswered(
                f"Triton at {self._url}, model {self._model!r}: no answer within {budget_s * 1e3:g} ms", answer
            ) from None


def translate(error: Exception, where: str) -> SidepoolError:
    """The error for what tritonclient raised: by the ranker's code where the message holds one, else by status.

    tritonclient's exceptions are recognised by their methods, so that it need not be imported here.
    """
    message_of, status_of = getattr(error, "message", None), getattr(error, "status", None)
    if not callable(message_of) or not callable(status_of):
        if isinstance(error, TimeoutError):
            return DeadlineExceeded(f"{where}: {error}")
        return TransportError(f"{where}: {type(error).__name__}: {error}")
    message, status = str(message_of()), str(status_of() or "")
    # The ranker begins its messages with the code in brackets; Triton may put the request id in front.
    for code in CODES:
        if (at := message.find(f"[{code}] ")) >= 0:
            return error_with_code(code, message[at + len(code) + 3 :])
    if "xceeds maximum queue size" in message:
        return Overloaded(f"{where}: {message}")
    if "timeout" in message.lower() and "expired" in message.lower():
        return DeadlineExceeded(f"{where}: {message}")
    return _KINDS.get(status, SidepoolError)(f"{where}: {message}")
