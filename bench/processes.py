"""Sidecars as child processes: started from their configuration, ready when they say so, gone when the block ends."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from sidepool.wire.errors import TransportError

# Mapping and verifying checksums of a few GB takes seconds; a minute means something is wrong.
READY_TIMEOUT_S = 60.0
# A sidecar drains for at most a few seconds after SIGTERM.
STOP_TIMEOUT_S = 10.0


@contextlib.contextmanager
def running_sidecars(configs: Sequence[Path], *, work_dir: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Start one sidecar per configuration file and wait until all are ready; raises `TransportError` with a log's end.

    Logs and ready files go to `work_dir`, named `sidecar-N`. Leaving stops them, by SIGTERM first.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        started = []
        for i, config in enumerate(configs):
            log, ready = work_dir / f"sidecar-{i}.log", work_dir / f"sidecar-{i}.ready"
            ready.unlink(missing_ok=True)
            process = start_sidecar(config, log=log, ready=ready)
            stack.callback(stop_process, process)
            started.append((process, log, ready))
        for process, log, ready in started:
            wait_ready(process, log=log, ready=ready)
        yield [process for process, _, _ in started]


def start_sidecar(config: Path, *, log: Path, ready: Path) -> subprocess.Popen[bytes]:
    """Start `sidepool sidecar` in a session of its own, so that Ctrl-C reaches only us and the order of stopping is ours."""
    command = [sys.executable, "-m", "sidepool", "sidecar", "--config", str(config), "--ready-file", str(ready)]
    with log.open("wb") as output:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True)


def wait_ready(process: subprocess.Popen[bytes], *, log: Path, ready: Path) -> None:
    """Wait for the ready file; raises `TransportError` if the process ends or takes too long."""
    deadline = time.monotonic() + READY_TIMEOUT_S
    while not ready.exists():
        code = process.poll()
        if code is not None or time.monotonic() > deadline:
            what = f"ended with status {code}" if code is not None else f"was not ready after {READY_TIMEOUT_S:g} s"
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            raise TransportError(f"sidecar {log.stem}: {what}:\n{tail}")
        time.sleep(0.02)


def stop_process(process: subprocess.Popen[bytes]) -> None:
    """End a child: SIGTERM, then SIGKILL. Idempotent."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait()
