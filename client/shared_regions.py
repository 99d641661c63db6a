"""System shared memory for large requests to a Triton on this host.

A region is created, registered with Triton and unlinked at once: both ends keep their mapping, and nothing is left in
/dev/shm however either process ends.
"""

from __future__ import annotations

import logging
import mmap
import os
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sidepool.wire.errors import DeadlineExceeded

# POSIX shared memory as Linux mounts it; `shm_open("/name")` is this folder.
SHM_FOLDER = "/dev/shm"
# Tensors begin on cache lines.
ALIGN_BYTES = 64
# Regions kept for the next request; more requests than this at once use (and drop) regions of their own.
MAX_IDLE_REGIONS = 8

_log = logging.getLogger("sidepool.client")


class Unanswered(DeadlineExceeded):
    """The budget is spent and Triton's answer is still on its way: until `answer` is done it may read the request's memory."""

    def __init__(self, message: str, answer: Future[Any]) -> None:
        super().__init__(message)
        self.answer = answer


@dataclass(frozen=True, slots=True)
class Region:
    """A registered region. `memory` stays mapped as long as the object lives."""

    name: str
    memory: mmap.mmap

    def write(self, tensors: Mapping[str, NDArray[Any]]) -> dict[str, tuple[int, int]]:
        """Copy `tensors` in; returns `(offset, bytes)` of each."""
        places, at = {}, 0
        for name, array in tensors.items():
            target = np.frombuffer(self.memory, array.dtype, array.size, at).reshape(array.shape)
            np.copyto(target, array)
            places[name] = (at, array.nbytes)
            at += _aligned(array.nbytes)
        return places


class SharedRegions:
    """Regions registered with one Triton. Thread-safe."""

    def __init__(self, client: Callable[[], Any]) -> None:
        """`client` gives the tritonclient `InferenceServerClient` that the calling thread may use."""
        self._client = client
        self._idle: list[Region] = []
        self._lock = threading.Lock()
        self.usable = True
        """False once Triton could not map a region: it runs elsewhere, or as another user."""

    @contextmanager
    def borrow(self, tensors: Mapping[str, NDArray[Any]]) -> Iterator[Region | None]:
        """A region that `tensors` fit into, or None where Triton cannot map one. After `Unanswered` it is kept until the answer."""
        needed = sum(_aligned(array.nbytes) for array in tensors.values())
        region = self._take(needed) or self._create(1 << (needed - 1).bit_length())
        answer: Future[Any] | None = None
        try:
            yield region
        except Unanswered as e:
            answer = e.answer
            raise
        finally:
            if region is not None and answer is None:
                self._give_back(region)
            elif region is not None and answer is not None:
                answer.add_done_callback(lambda _: self._give_back(region))

    def forget(self) -> None:
        """Triton was restarted and knows none of the regions any more."""
        with self._lock:
            self._idle.clear()

    def close(self) -> None:
        """Unregister every idle region. Idempotent."""
        with self._lock:
            idle, self._idle = self._idle, []
        for region in idle:
            self._unregister(region)

    def _take(self, needed: int) -> Region | None:
        with self._lock:
            for i, region in enumerate(self._idle):
                if len(region.memory) >= needed:
                    return self._idle.pop(i)
        return None

    def _give_back(self, region: Region) -> None:
        with self._lock:
            self._idle.append(region)
            self._idle.sort(key=lambda r: len(r.memory))
            surplus = self._idle.pop(0) if len(self._idle) > MAX_IDLE_REGIONS else None
        if surplus is not None:
            self._unregister(surplus)

    def _create(self, size: int) -> Region | None:
        if not self.usable:
            return None
        name = f"sidepool-{secrets.token_hex(8)}"
        path = f"{SHM_FOLDER}/{name}"
        try:
            file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
            try:
                os.posix_fallocate(file, 0, size)  # a full /dev/shm is an error here, a SIGBUS at the first write otherwise
                memory = mmap.mmap(file, size)
                self._client().register_system_shared_memory(name, f"/{name}", size)
            finally:
                os.close(file)
                os.unlink(path)
        except Exception as e:  # tritonclient's own errors and gRPC's, besides OSError
            self.usable = False
            _log.warning("large requests go without shared memory: %s", e)
            return None
        return Region(name, memory)

    def _unregister(self, region: Region) -> None:
        try:
            self._client().unregister_system_shared_memory(region.name)
        except Exception as e:  # Triton is gone, and its mapping with it
            _log.debug("shared memory region %s: %s", region.name, e)


def _aligned(size: int) -> int:
    return max(-(-size // ALIGN_BYTES), 1) * ALIGN_BYTES
