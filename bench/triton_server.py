"""A real Triton Inference Server from the `nvidia-pytriton` wheel, serving a plain model repository on loopback.

The wheel carries tritonserver and its Python backend, but keeps the backend's stub for each Python version apart.
`install` assembles them once; `TritonServer` runs one server and leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib.metadata
import importlib.util
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from sidepool.wire.errors import ConfigError, TransportError

WHEEL = "nvidia-pytriton"
SHM = Path("/dev/shm")
# Loading includes importing torch in every model's stub, seconds each on a slow disk.
READY_TIMEOUT_S = 180.0
# Triton's own --exit-timeout is 30 s; a stub that hangs must not hold a test for longer than this.
STOP_TIMEOUT_S = 15.0

# A traceback is about twenty lines; two models may fail.
MAX_ERROR_LINES = 60

_serial = itertools.count()


@dataclass(frozen=True)
class Installation:
    """A tritonserver that can be started: the executable, its backends, and the wheel's libraries."""

    root: Path
    libraries: Path

    @property
    def executable(self) -> Path:
        return self.root / "bin" / "tritonserver"

    @property
    def backends(self) -> Path:
        return self.root / "backends"


def missing() -> str | None:
    """Why no Triton can be installed here, or None where one can."""
    package = _package()
    if package is None:
        return f"the {WHEEL} wheel is not installed in {sys.prefix}"
    if not (package / "tritonserver" / "python_backend_stubs" / _python_version()).is_dir():
        return f"the {WHEEL} wheel has no Python backend stub for Python {_python_version()}"
    return None


def install(into: Path) -> Installation:
    """Assemble the wheel's Triton under `into` unless it is there; raises `ConfigError` where there is no wheel."""
    reason, package = missing(), _package()
    if reason is not None or package is None:
        raise ConfigError(f"Triton: {reason}; install requirements.txt (make venv)")
    libraries = package.parent / "nvidia_pytriton.libs"
    root = into.absolute() / f"{WHEEL}-{importlib.metadata.version(WHEEL)}-py{_python_version()}"
    if not root.is_dir():
        _assemble(package / "tritonserver", root)
    return Installation(root, libraries)


def _assemble(source: Path, root: Path) -> None:
    """Copy into a private folder and rename, so that an interrupted copy is never taken for an installation."""
    root.parent.mkdir(parents=True, exist_ok=True)
    building = root.with_name(f"{root.name}.{os.getpid()}")
    try:
        shutil.copytree(source, building, ignore=shutil.ignore_patterns("python_backend_stubs", "__pycache__"))
        stub = building / "backends" / "python" / "triton_python_backend_stub"
        shutil.copy(source / "python_backend_stubs" / _python_version() / stub.name, stub)
        for program in (stub, building / "bin" / "tritonserver"):
            program.chmod(0o755)
        with contextlib.suppress(OSError):  # another process may have been faster
            building.rename(root)
    finally:
        shutil.rmtree(building, ignore_errors=True)


class TritonServer:
    """One tritonserver process over `repository`, as a context manager.

    Entering starts it and waits until every model is ready (`TransportError` with the log's end if it is not).
    Leaving stops the server and its stubs, and removes its shared memory, whatever happened inside; `TransportError` with the
    log's end where the server was gone already.
    """

    def __init__(
        self,
        repository: Path,
        *,
        work_dir: Path,
        log: Path | None = None,
        arguments: Sequence[str] = (),
        ready_timeout_s: float = READY_TIMEOUT_S,
        stop_timeout_s: float = STOP_TIMEOUT_S,
    ) -> None:
        """`work_dir`: where the installation and the log (`triton.log` unless `log` is given) go; made if absent.

        stop_timeout_s: what leaving grants the server to end by itself, which takes it some seconds; 0: it is ended by force.
        """
        self.repository = repository.absolute()
        self.log = log or work_dir / "triton.log"
        self._installation = install(work_dir / "triton")
        self._arguments = list(arguments)
        self._ready_timeout_s, self._stop_timeout_s = ready_timeout_s, stop_timeout_s
        self.shm_prefix = f"sidepool_{os.getpid()}_{next(_serial)}_"
        self._process: subprocess.Popen[bytes] | None = None
        self._killed = False
        self.http_port, self.grpc_port, self.metrics_port = free_ports(3)

    @property
    def grpc(self) -> str:
        """`host:port` for `tritonclient.grpc`."""
        return f"127.0.0.1:{self.grpc_port}"

    @property
    def http(self) -> str:
        """`host:port` for `tritonclient.http`."""
        return f"127.0.0.1:{self.http_port}"

    @property
    def pid(self) -> int:
        assert self._process is not None, "the server has not been started"
        return self._process.pid

    def models(self) -> list[str]:
        """Names of the models in the repository."""
        return sorted(p.name for p in self.repository.iterdir() if (p / "config.pbtxt").is_file())

    def __enter__(self) -> TritonServer:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self.log.open("wb") as log:
                # A session of its own: Ctrl-C reaches us alone, and the whole group, stubs included, can be ended.
                self._process = subprocess.Popen(
                    self._command(),
                    env=self._environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            self._wait_ready()
        except BaseException:
            self.stop(grace_s=0.0)  # nothing is being answered yet, and Triton ends its loading before it heeds a SIGTERM
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        code = self._process.poll() if self._process is not None and not self._killed else None
        self.stop(self._stop_timeout_s)
        if code is not None:
            raise TransportError(f"Triton: ended by itself with status {code}:\n{self.log_tail(MAX_ERROR_LINES)}")

    def stop(self, grace_s: float = STOP_TIMEOUT_S) -> None:
        """End the server, by force after `grace_s`, then what is left of its process group and its shared memory. Idempotent."""
        process, self._process = self._process, None
        if process is not None:
            try:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(grace_s)
            finally:
                _kill_group(process.pid)
                process.wait()
        for region in SHM.glob(f"{self.shm_prefix}*"):
            region.unlink(missing_ok=True)

    def kill(self) -> None:
        """End the server process as a crash would; its stubs are left to notice. `stop` removes what is left."""
        self._killed = True
        os.kill(self.pid, signal.SIGKILL)

    def get_json(self, path: str) -> Any:
        """GET a path of the HTTP API and decode the JSON answer; raises `TransportError`."""
        status, body = self._get(self.http_port, path)
        if status != 200:
            raise TransportError(f"Triton: GET {path}: status {status}: {body[:200].decode(errors='replace')}")
        return json.loads(body) if body else {}

    def metrics(self) -> str:
        """The text of the Prometheus endpoint."""
        return self._get(self.metrics_port, "/metrics")[1].decode()

    def version(self) -> str:
        """The server's version, as it reports it."""
        return str(self.get_json("/v2")["version"])

    def log_tail(self, lines: int = 25) -> str:
        """The end of the server's log."""
        try:
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
        except OSError as e:
            return f"(no log: {e})"

    def log_errors(self) -> str:
        """The log's error lines, each with its traceback if it has one: what lies between an `E` line and the next `I` or `W`."""
        kept, within = [], False
        for line in self.log.read_text(errors="replace").splitlines():
            if re.match(r"[EIW]\d{4} ", line):
                within = line.startswith("E")
            if within:
                kept.append(line)
        return "\n".join(kept[-MAX_ERROR_LINES:])

    def _command(self) -> list[str]:
        addresses = [f"--{service}-address=127.0.0.1" for service in ("http", "grpc", "metrics")]
        return [
            str(self._installation.executable),
            f"--model-repository={self.repository}",
            f"--backend-directory={self._installation.backends}",
            f"--backend-config=python,shm-region-prefix-name={self.shm_prefix}",
            *addresses,
            f"--http-port={self.http_port}",
            f"--grpc-port={self.grpc_port}",
            f"--metrics-port={self.metrics_port}",
            "--exit-timeout-secs=10",
            *self._arguments,
        ]

    def _environment(self) -> dict[str, str]:
        # The stub takes its packages from the first python3 on PATH; it ignores PYTHONPATH.
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        environment["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
        environment["LD_LIBRARY_PATH"] = str(self._installation.libraries)
        return environment

    def _wait_ready(self) -> None:
        paths = ["/v2/health/ready", *(f"/v2/models/{model}/ready" for model in self.models())]
        deadline = time.monotonic() + self._ready_timeout_s
        while time.monotonic() < deadline:
            assert self._process is not None
            code = self._process.poll()
            if code is not None:
                said = self.log_errors() or self.log_tail()
                raise TransportError(f"Triton: ended with status {code} while loading {self.repository}:\n{said}")
            try:
                if all(self._get(self.http_port, path)[0] == 200 for path in paths):
                    return
            except OSError:
                pass  # not listening yet
            time.sleep(0.1)
        raise TransportError(f"Triton: not ready after {self._ready_timeout_s:g} s:\n{self.log_tail()}")

    @staticmethod
    def _get(port: int, path: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        try:
            connection.request("GET", path)
            reply = connection.getresponse()
            return reply.status, reply.read()
        finally:
            connection.close()


def processes_of_group(group: int) -> list[int]:
    """Process ids that are alive (not zombies) in a process group."""
    return [pid for pid, its_group, state in _processes() if its_group == group and state != "Z"]


def _kill_group(group: int) -> None:
    """End what a server left in its group. Asked only for a group that we made ourselves."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while processes_of_group(group) and time.monotonic() < deadline:
        time.sleep(0.02)


def _processes() -> Iterator[tuple[int, int, str]]:
    """`(pid, process group, state)` of every process, from /proc."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # ended meanwhile
        yield int(stat.parent.name), int(fields[2]), fields[0]


def free_ports(count: int) -> list[int]:
    """Loopback ports that nobody listens on, and that are given to nobody else as long as this process lives.

    Each stays bound here: Linux then chooses it for no other socket, be it a listener's or the near end of a connection, yet a
    server that names it (with SO_REUSEADDR, as servers have it) may listen there, end, and come back.
    """
    ports = []
    for _ in range(count):
        held = socket.socket()
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        ports.append(int(held.getsockname()[1]))
        held.detach()  # open until the process ends
    return ports


def _package() -> Path | None:
    """Where the wheel's package lies; it is not imported, since that costs seconds."""
    spec = importlib.util.find_spec("pytriton")
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


def _python_version() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"
