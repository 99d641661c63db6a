"""Which lane a client takes, how it retries, and what it says about wrong options."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from sidepool.client.lanes import LaneOptions, TlsFiles, is_this_host, retry_delay_s, split_address
from sidepool.wire.errors import ConfigError, TransportError


def test_retries_back_off_to_a_third_of_a_second_and_are_spread() -> None:
    first = [retry_delay_s(1) for _ in range(200)]
    late = [retry_delay_s(50) for _ in range(200)]
    assert all(0.01 <= delay <= 0.02 for delay in first)
    assert all(0.15 <= delay <= 0.3 for delay in late)
    assert max(late) - min(late) > 0.05
    assert retry_delay_s(5000) <= 0.3


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.9", "::1", "localhost", socket.gethostname()])
def test_loopback_and_the_own_name_are_this_host(host: str) -> None:
    assert is_this_host(host)


@pytest.mark.parametrize("host", ["10.0.0.1", "sidecar-0.embeddings.svc", "0.0.0.0", "fe80::1"])
def test_any_other_address_may_be_another_host(host: str) -> None:
    assert not is_this_host(host)


def test_addresses_are_split_at_the_last_colon() -> None:
    assert split_address("sidecar:50151") == ("sidecar", 50151)
    assert split_address("[::1]:7") == ("::1", 7)
    for wrong in ("", "sidecar", ":7", "sidecar:x"):
        with pytest.raises(TransportError, match="address: found"):
            split_address(wrong)


def test_wrong_options_are_named() -> None:
    with pytest.raises(ConfigError, match="lane: found 'rdmaa'; allowed: shm, tcp, grpc, rdma, local, auto"):
        LaneOptions(lane="rdmaa")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="allowed: only with lane 'local'"):
        LaneOptions(lane="tcp", shards=(Path("x"),))
    with pytest.raises(ConfigError, match="shards_dir: missing"):
        LaneOptions(lane="local")
    with pytest.raises(ConfigError, match=r"window_delay_us: found -1; allowed: 0 \(off\) to 1000000"):
        LaneOptions(window_delay_us=-1)
    with pytest.raises(ConfigError, match=r"max_ids: found -1; allowed: 0 \(no bound\)"):
        LaneOptions(max_ids=-1)
    with pytest.raises(ConfigError, match="connect_timeout_s: found 0"):
        LaneOptions(connect_timeout_s=0)


def test_tls_files_are_named_when_they_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tls: cannot be read: .*ca\.pem"):
        TlsFiles(ca=tmp_path / "ca.pem").credentials()
    with pytest.raises(ConfigError, match="only one of cert and key"):
        TlsFiles(ca=tmp_path / "ca.pem", cert=tmp_path / "cert.pem").credentials()


def test_the_client_package_imports_neither_torch_nor_tritonclient() -> None:
    code = "import sys, sidepool.client; print([m for m in ('torch', 'tritonclient') if m in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
