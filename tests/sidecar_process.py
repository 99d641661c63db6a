"""A real `sidepool sidecar` process under test: started, watched through its log, always ended."""

from __future__ import annotations

import json
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from sidepool.wire import control_pb2_grpc

# Far above any step of these tests on a busy machine; reached only when something is broken.
PATIENCE_S = 60.0


class RunningSidecar:
    """The process, its parsed log lines, and clients for what it serves."""

    def __init__(self, config: Path, *options: str) -> None:
        command = [sys.executable, "-m", "sidepool", "sidecar", "--config", str(config), *options]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.stderr: list[str] = []
        self._lines: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self._channel: grpc.Channel | None = None

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.stderr.append(line)
            try:
                self._lines.put(json.loads(line))
            except ValueError:
                continue
        self._lines.put(None)

    def wait_for(self, event: str) -> dict[str, Any]:
        """The next log line whose event begins with `event`."""
        deadline = time.monotonic() + PATIENCE_S
        while (left := deadline - time.monotonic()) > 0:
            line = self._lines.get(timeout=left)
            if line is None:
                raise AssertionError(f"the sidecar ended before it logged {event!r}:\n{''.join(self.stderr)}")
            if line["event"].startswith(event):
                return line
        raise AssertionError(f"{event!r} was not logged:\n{''.join(self.stderr)}")

    def connect(self, address: str) -> grpc.Channel:
        self._channel = grpc.insecure_channel(address)
        return self._channel

    @property
    def channel(self) -> grpc.Channel:
        assert self._channel is not None
        return self._channel

    @property
    def control(self) -> control_pb2_grpc.SidecarStub:
        return control_pb2_grpc.SidecarStub(self.channel)  # type: ignore[no-untyped-call]

    def health(self, service: str = "") -> int:
        """The status that a health `Check` gives."""
        stub = health_pb2_grpc.HealthStub(self.channel)
        status: int = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=PATIENCE_S).status
        return status

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        """The exit status; everything it wrote to stderr is in `stderr` afterwards."""
        status = self.process.wait(PATIENCE_S)
        self._reader.join()
        return status

    def close(self) -> None:
        if self._channel is not None:
            self._channel.close()
        if self.process.poll() is None:
            self.process.terminate()  # not killed, so that it removes what it made
        try:
            self.wait()
        finally:
            self.process.kill()
            self.process.wait()
            assert self.process.stderr is not None
            self.process.stderr.close()


def wait_until_stopped(pid: int) -> None:
    """Until every thread of the process has taken its SIGSTOP."""
    tasks = Path(f"/proc/{pid}/task")
    deadline = time.monotonic() + PATIENCE_S
    while any((task / "stat").read_text().rpartition(")")[2].split()[0] not in "Tt" for task in tasks.iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.001)


@contextmanager
def started(config: Path, *options: str) -> Iterator[RunningSidecar]:
    """A sidecar that may not have come far yet; asked to stop at the end if it still runs."""
    sidecar = RunningSidecar(config, *options)
    try:
        yield sidecar
    finally:
        sidecar.close()


@contextmanager
def ready(config: Path, *options: str) -> Iterator[tuple[RunningSidecar, dict[str, Any]]]:
    """A serving sidecar with a connected channel, and its ready line."""
    with started(config, *options) as sidecar:
        line = sidecar.wait_for("ready")
        sidecar.connect(line["grpc"])
        yield sidecar, line
