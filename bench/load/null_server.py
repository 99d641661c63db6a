"""A gRPC server that does nothing (bench/null_grpc.cpp), compiled and run as a child process."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

from sidepool.wire.errors import ConfigError

SOURCE = Path(__file__).resolve().parents[1] / "null_grpc.cpp"
PATH = "/null.Null/Call"


def compile_null_server(directory: Path) -> Path:
    """Compile the server into `directory`; raises `ConfigError` with the compiler's own words."""
    program = directory / "null_grpc"
    command = ["g++", "-std=c++20", "-O2", "-o", str(program), str(SOURCE), "-lnghttp2"]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as e:
        said = e.stderr if isinstance(e, subprocess.CalledProcessError) else str(e)
        raise ConfigError(f"null server: cannot be compiled (g++ and libnghttp2-dev are needed): {said}") from e
    return program


@contextlib.contextmanager
def null_server(program: Path, reply_bytes: int, *, fault: str = "", cpu: int | None = None) -> Iterator[tuple[str, int]]:
    """Run it, on one core if given; gives `(host:port, pid)`. `fault`: what it does wrong, as its source lists."""
    pinned = [] if cpu is None else ["taskset", "-c", str(cpu)]
    command = [*pinned, str(program), str(reply_bytes), *([fault] if fault else [])]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield f"127.0.0.1:{int(process.stdout.readline())}", process.pid
        finally:
            process.kill()
