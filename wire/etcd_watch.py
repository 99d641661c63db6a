"""A thread that keeps what lies in etcd under a key at hand, through lost connections and compaction."""

from __future__ import annotations

import threading
from collections.abc import Callable

import grpc

from sidepool.wire.errors import SidepoolError
from sidepool.wire.etcd import Etcd, Snapshot

# Between attempts to reach a cluster that does not answer: far below what an operator notices, no load for etcd.
RETRY_S = 1.0


class EtcdWatch:
    """Hands over what lies under `key` now, and again whenever it may have changed.

    What changed is not taken from the events but read again: a snapshot is right whatever was missed, after compaction too.
    """

    def __init__(
        self,
        etcd: Etcd,
        key: str,
        found: Callable[[Snapshot], None],
        lost: Callable[[SidepoolError], None],
        *,
        prefix: bool = False,
    ) -> None:
        """`found` and `lost` are called on the thread; `lost` for every attempt that failed."""
        self._etcd, self._key, self._prefix = etcd, key, prefix
        self._found, self._lost = found, lost
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._call: grpc.Call | None = None
        self._thread = threading.Thread(target=self._run, name="sidepool-etcd", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread. Idempotent."""
        self._closed.set()
        with self._lock:
            if self._call is not None:
                self._call.cancel()  # type: ignore[no-untyped-call]
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        while not self._closed.is_set():
            try:
                self._follow()
            except SidepoolError as e:
                if not self._closed.is_set():
                    self._lost(e)
                    self._closed.wait(RETRY_S)

    def _follow(self) -> None:
        snapshot = self._etcd.read(self._key, prefix=self._prefix)
        self._found(snapshot)
        for _ in self._etcd.changes(self._key, snapshot.revision, self._started, prefix=self._prefix):
            self._found(self._etcd.read(self._key, prefix=self._prefix))

    def _started(self, call: grpc.Call) -> None:
        with self._lock:
            self._call = call
        if self._closed.is_set():
            call.cancel()  # type: ignore[no-untyped-call]
