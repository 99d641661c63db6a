"""Requests through the plain Triton client: what is sent, how it is timed, and by how many clients at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]

DATATYPES = {"float32": "FP32", "int64": "INT64", "int32": "INT32", "float16": "FP16", "float64": "FP64", "bool": "BOOL"}
"""What Triton calls NumPy's types."""
# A server that does not answer at all must not hang a benchmark.
CLIENT_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Percentiles:
    """Latencies of one block of requests, in microseconds, and its rate in requests per second."""

    p50_us: float
    p95_us: float
    p99_us: float
    qps: float


def fixed_request(dense: NDArray[np.float32], ids: NDArray[np.int64]) -> Arrays:
    """Inputs of the single-id variant: `dense [B, 13]`, `sparse [B, 26]`."""
    return {"dense": np.ascontiguousarray(dense), "sparse": np.ascontiguousarray(ids)}


def jagged_request(dense: NDArray[np.float32], lengths: NDArray[np.int32], values: NDArray[np.int64]) -> Arrays:
    """Inputs of the multi-hot variant; Triton's batch dimension counts requests, so each array gets a leading 1.

    dense `[B, 13]`, lengths `[26, B]`, values `[nnz]` feature-major.
    """
    return {
        "dense": np.ascontiguousarray(dense)[None],
        "sparse.lengths": np.ascontiguousarray(lengths)[None],
        "sparse.values": np.ascontiguousarray(values)[None],
    }


def infer_inputs(arrays: Arrays) -> list[Any]:
    """The Triton client's form of a request's inputs."""
    inputs = []
    for name, array in arrays.items():
        entry = triton.InferInput(name, list(array.shape), DATATYPES[array.dtype.name])
        entry.set_data_from_numpy(array)
        inputs.append(entry)
    return inputs


class Caller:
    """One client with a connection of its own, calling one model."""

    def __init__(self, address: str, model: str) -> None:
        self._client = triton.InferenceServerClient(address, channel_args=[("grpc.use_local_subchannel_pool", 1)])
        self._model = model
        self._output = str(self._client.get_model_metadata(model).outputs[0].name)

    def infer(self, inputs: list[Any], **options: Any) -> NDArray[np.float32]:
        """Send one request; returns its scores, flattened to one per sample. Raises `InferenceServerException`."""
        options.setdefault("client_timeout", CLIENT_TIMEOUT_S)
        scores: NDArray[np.float32] = self._client.infer(self._model, inputs, **options).as_numpy(self._output)
        return scores.reshape(-1)

    def close(self) -> None:
        self._client.close()


def time_block(caller: Caller, requests: Sequence[list[Any]]) -> NDArray[np.int64]:
    """Latencies in nanoseconds of `requests`, sent one after another."""
    times = np.empty(len(requests), np.int64)
    for i, inputs in enumerate(requests):
        begin = time.perf_counter_ns()
        caller.infer(inputs)
        times[i] = time.perf_counter_ns() - begin
    return times


def summarise(latencies_ns: NDArray[np.int64], elapsed_s: float) -> Percentiles:
    """Percentiles of a block that took `elapsed_s` in all."""
    p50, p95, p99 = np.percentile(latencies_ns, (50, 95, 99)) / 1e3
    return Percentiles(round(p50, 1), round(p95, 1), round(p99, 1), round(len(latencies_ns) / elapsed_s, 1))


def concurrently(callers: Sequence[Caller], jobs: Iterable[Callable[[Caller], None]]) -> float:
    """Run `jobs` on a thread per caller, each taking the next one; returns the seconds it took. The first error is raised."""
    waiting, lock = iter(jobs), threading.Lock()
    failures: list[BaseException] = []

    def work(caller: Caller) -> None:
        while not failures:
            with lock:
                job = next(waiting, None)
            if job is None:
                return
            try:
                job(caller)
            except BaseException as e:
                failures.append(e)

    threads = [threading.Thread(target=work, args=(caller,), daemon=True) for caller in callers]
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except BaseException as e:
        failures.append(e)  # Ctrl-C: let the threads finish their request and end
        raise
    if failures:
        raise failures[0]
    return time.perf_counter() - begin
