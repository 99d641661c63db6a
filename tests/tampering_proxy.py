"""A TCP proxy that changes a byte of what the server behind it answers."""

from __future__ import annotations

import contextlib
import socket
import threading
from types import TracebackType
from typing import Self


class TamperingProxy:
    """Forwards every connection to `target`; of an answer, every `period`-th byte is another, `times` times in all."""

    def __init__(self, target: str, *, period: int, times: int) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._period, self._times = period, times
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.tampered = 0
        self._open: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for end in self._open:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for end in self._open:
            end.close()

    def _start(self, work: object, *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near = self._listener.accept()[0]
                far = socket.create_connection(self._target)
                self._open += [near, far]
                self._start(self._forward, near, far, False)
                self._start(self._forward, far, near, True)

    def _forward(self, source: socket.socket, target: socket.socket, tamper: bool) -> None:
        seen = 0
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                at = self._period - 1 - seen % self._period
                if tamper and at < len(data):
                    with self._lock:
                        tampers = self.tampered < self._times
                        self.tampered += tampers
                    if tampers:
                        data = data[:at] + bytes([data[at] ^ 0x40]) + data[at + 1 :]
                seen += len(data)
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
