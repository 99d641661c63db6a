"""A real etcd of one member on loopback: started, killed, frozen, started again; and etcdctl, to look at it from outside."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest
from sidecar_process import wait_until_stopped

from sidepool.bench.triton_server import free_ports
from sidepool.wire.coordination import Coordination, EtcdTls

SETUP = Path(__file__).resolve().parent / "etcd" / "setup"
CANNOT = 77
SETUP_TIMEOUT_S, START_TIMEOUT_S = 120.0, 60.0
PREFIX = "/shop"


@cache
def programs() -> Path:
    """The directory with etcd and etcdctl; skips the test where they cannot be had."""
    done = subprocess.run([str(SETUP)], capture_output=True, text=True, timeout=SETUP_TIMEOUT_S)
    if done.returncode == CANNOT:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


class EtcdServer:
    """One member. `files`: `cert`, `key` and `ca` for TLS with certificates on both sides; none: plain text."""

    def __init__(self, directory: Path, files: Mapping[str, Path] | None = None) -> None:
        self.directory, self._files = directory, dict(files or {})
        self._port, self._peer_port = free_ports(2)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self._port}"

    def settings(self, tls: EtcdTls | None = None, **more: object) -> Coordination:
        """How to reach it."""
        return Coordination(etcd=(self.endpoint,), prefix=PREFIX, tls=tls, **more)

    def start(self) -> None:
        """Start and wait until it answers."""
        scheme = "https" if self._files else "http"
        client, peer = f"{scheme}://{self.endpoint}", f"http://127.0.0.1:{self._peer_port}"
        command = [str(programs() / "etcd"), "--data-dir", str(self.directory / "data"), "--logger", "zap"]
        command += ["--listen-client-urls", client, "--advertise-client-urls", client]
        command += ["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", f"default={peer}"]
        if self._files:
            command += ["--client-cert-auth", "--trusted-ca-file", str(self._files["ca"])]
            command += ["--cert-file", str(self._files["cert"]), "--key-file", str(self._files["key"])]
        with (self.directory / "etcd.log").open("ab") as log:
            # Tests change a few bytes; waiting for the disk every time would be most of what they take.
            self._process = subprocess.Popen(
                [*command, "--unsafe-no-fsync"] if _knows_no_fsync() else command, stdout=log, stderr=log
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while self.ctl("endpoint", "health", check=False) is None:
            assert self._process.poll() is None, (self.directory / "etcd.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def ctl(self, *words: str, given: bytes | None = None, check: bool = True) -> bytes | None:
        """What etcdctl says; None where it fails and `check` is off."""
        command = [str(programs() / "etcdctl"), "--endpoints", self.endpoint, *words]
        for option, file in (("--cacert", "ca"), ("--cert", "cert"), ("--key", "key")):
            command += [option, str(self._files[file])] if self._files else []
        done = subprocess.run(command, input=given, capture_output=True, env={"ETCDCTL_API": "3"}, timeout=START_TIMEOUT_S)
        assert done.returncode == 0 or not check, done.stderr
        return done.stdout if done.returncode == 0 else None

    def keys_below(self) -> list[str]:
        found = self.ctl("get", "--prefix", "--keys-only", PREFIX)
        assert found is not None
        return found.decode().split()

    def value(self, key: str) -> bytes:
        found = self.ctl("get", "--print-value-only", PREFIX + key)
        assert found is not None
        return found.removesuffix(b"\n")

    def kill(self) -> None:
        """End it as a crash would."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()

    def lose_everything(self) -> None:
        """While it is down: its disk is gone."""
        shutil.rmtree(self.directory / "data")

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Connected, and silent: as its clients see a network that drops everything."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGSTOP)
        try:
            wait_until_stopped(self._process.pid)
            yield
        finally:
            os.kill(self._process.pid, signal.SIGCONT)


@cache
def _knows_no_fsync() -> bool:
    return b"unsafe-no-fsync" in subprocess.run([str(programs() / "etcd"), "--help"], capture_output=True).stdout


@contextlib.contextmanager
def etcd_server(directory: Path, files: Mapping[str, Path] | None = None) -> Iterator[EtcdServer]:
    """A running etcd; ended when the block ends."""
    directory.mkdir(parents=True, exist_ok=True)
    server = EtcdServer(directory, files)
    try:
        server.start()
        yield server
    finally:
        server.kill()
