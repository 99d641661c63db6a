"""An authority with certificates for a server and a client, made by the openssl command."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Signed:
    """A certificate and its key, PEM files."""

    cert: Path
    key: Path


class Authority:
    """Signs certificates for loopback, with files in a directory; skips the test where there is no openssl."""

    def __init__(self, directory: Path) -> None:
        if shutil.which("openssl") is None:
            pytest.skip("needs the openssl command to make certificates")
        directory.mkdir()
        self._directory = directory
        own = Signed(directory / "ca.pem", directory / "ca.key")
        _openssl("req", "-x509", *_KEY, "-subj", f"/CN={directory.name}", "-keyout", own.key, "-out", own.cert, "-days", "2")
        self._own = own
        self.cert = own.cert

    def sign(self, name: str) -> Signed:
        """A certificate for 127.0.0.1 and localhost."""
        signed, asked = Signed(self._directory / f"{name}.pem", self._directory / f"{name}.key"), self._directory / f"{name}.csr"
        extensions = self._directory / "extensions"
        extensions.write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
        _openssl("req", "-new", *_KEY, "-subj", f"/CN={name}", "-keyout", signed.key, "-out", asked)
        by = ("-CA", self._own.cert, "-CAkey", self._own.key, "-CAcreateserial", "-extfile", extensions, "-days", "2")
        _openssl("x509", "-req", "-in", asked, "-out", signed.cert, *by)
        return signed


_KEY = ("-newkey", "rsa:2048", "-nodes")


def _openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)
