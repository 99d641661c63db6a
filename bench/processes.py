"""Sidecars as child processes: started from their configuration, ready when they say so, gone when the block ends."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sidepool.bench.namespaces import Machine
from sidepool.wire.errors import TransportError

# Mapping and verifying checksums of a few GB takes seconds; a minute means something is wrong.
READY_TIMEOUT_S = 60.0
# A sidecar drains for at most a few seconds after SIGTERM.
STOP_TIMEOUT_S = 10.0


class Sidecar:
    """One `sidepool sidecar` process, which can be stopped and started again."""

    def __init__(self, config: Path, *, log: Path, ready: Path, machine: Machine | None = None) -> None:
        """`log` collects its output over all starts; `ready` is its ready file. `machine`: where it runs, if not just here."""
        command = [sys.executable, "-m", "sidepool", "sidecar", "--config", str(config), "--ready-file", str(ready)]
        self._command = command if machine is None else machine.command(command)
        self._log, self._ready = log, ready
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    def start(self) -> None:
        """Start the process; does not wait. A session of its own: Ctrl-C reaches only us, and the order of stopping is ours."""
        self._ready.unlink(missing_ok=True)
        with self._log.open("ab") as output:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )

    def wait_ready(self) -> None:
        """Wait for the ready file; raises `TransportError` if the process ends or takes too long."""
        assert self._process is not None
        deadline = time.monotonic() + READY_TIMEOUT_S
        while not self._ready.exists():
            code = self._process.poll()
            if code is not None or time.monotonic() > deadline:
                what = f"ended with status {code}" if code is not None else f"was not ready after {READY_TIMEOUT_S:g} s"
                tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-15:])
                raise TransportError(f"{self._log.stem}: {what}:\n{tail}")
            time.sleep(0.02)

    def facts(self) -> dict[str, Any]:
        """What the ready file says: pid and the addresses bound (docs/sidecar.md). Only while the process is ready."""
        facts: dict[str, Any] = json.loads(self._ready.read_text(encoding="utf-8"))
        return facts

    def begin_stop(self) -> None:
        """Ask the process to end, without waiting for it: `stop` does."""
        if self._process is not None:
            self._process.terminate()

    def stop(self) -> None:
        """End the process: SIGTERM, then SIGKILL. Idempotent."""
        process, self._process = self._process, None
        if process is not None:
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def kill(self) -> None:
        """End the process as a crash would."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()


@contextlib.contextmanager
def running_sidecars(configs: Sequence[Path], *, work_dir: Path, machines: Sequence[Machine] = ()) -> Iterator[list[Sidecar]]:
    """Start one sidecar per configuration file and wait until all are ready; raises `TransportError` with a log's end.

    machines: one for each, if not all just here. Logs and ready files go to `work_dir`, named `sidecar-N`. Leaving stops them.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    sidecars: list[Sidecar] = []
    try:
        for i, config in enumerate(configs):
            log = work_dir / f"sidecar-{i}.log"
            log.unlink(missing_ok=True)
            sidecar = Sidecar(config, log=log, ready=work_dir / f"sidecar-{i}.ready", machine=machines[i] if machines else None)
            sidecars.append(sidecar)
            sidecar.start()
        for sidecar in sidecars:
            sidecar.wait_ready()
        yield sidecars
    finally:
        for sidecar in sidecars:  # at the same time: each takes half a second
            sidecar.begin_stop()
        for sidecar in sidecars:
            sidecar.stop()
