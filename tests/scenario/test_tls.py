"""A control plane under mutual TLS, from configuration files to pooled vectors: known clients get in, others do not."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import numpy as np
import pytest
from certificates import Authority
from changing_world import deployed
from lookup_world import expected, random_bags
from sidecar_process import ready
from small_artifact import SmallArtifact, write_small_artifact

from sidepool.client import EmbeddingClient
from sidepool.client.lanes import Lane, TlsFiles
from sidepool.triton_backend.settings import read_settings
from sidepool.wire.errors import ConfigError, TransportError


@pytest.fixture
def artifact(tmp_path: Path) -> SmallArtifact:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    return write_small_artifact(tmp_path, address=address)


@pytest.fixture
def authority(artifact: SmallArtifact, tmp_path: Path) -> Authority:
    """Its certificates are what the sidecar has, and asks for."""
    authority = Authority(tmp_path / "authority")
    server = authority.sign("server")
    tls = {"cert": str(server.cert), "key": str(server.key), "client_ca": str(authority.cert)}
    artifact.write_config(listen={"grpc": artifact.plan.sidecars[0].address}, tls=tls)
    return authority


def assert_answers(artifact: SmallArtifact, lane: Lane, tls: TlsFiles | None) -> None:
    with EmbeddingClient.connect(artifact.plan, lane=lane, tls=tls) as client:
        np.testing.assert_array_equal(client.lookup([3], [1, 0], deadline_ms=60_000).out[0, :8], artifact.rows["users"][3])


def test_only_clients_with_a_certificate_of_the_authority_get_in(
    artifact: SmallArtifact, authority: Authority, tmp_path: Path
) -> None:
    client = authority.sign("client")
    stranger = Authority(tmp_path / "strangers").sign("stranger")
    known = TlsFiles(ca=authority.cert, cert=client.cert, key=client.key)
    refused = {
        "no TLS": None,
        "no certificate": TlsFiles(ca=authority.cert),
        "a stranger's certificate": TlsFiles(ca=authority.cert, cert=stranger.cert, key=stranger.key),
        "a server it does not trust": TlsFiles(ca=tmp_path / "strangers" / "ca.pem", cert=client.cert, key=client.key),
    }
    lanes: list[Lane] = ["shm", "tcp", "grpc"]
    with ready(artifact.config):
        for lane in lanes:
            assert_answers(artifact, lane, known)
        for tls in refused.values():
            with pytest.raises(
                TransportError, match=r"sidecar 'sc0' \(127\.0\.0\.1:\d+\): cannot be connected: unavailable"
            ) as error:
                EmbeddingClient.connect(artifact.plan, tls=tls)
            assert ("may want it: tls=" in str(error.value)) == (tls is None)
        assert_answers(artifact, "shm", known)


def test_sidecars_fetch_shards_from_each_other_with_their_own_certificates(tmp_path: Path) -> None:
    (tmp_path / "world").mkdir()
    authority = Authority(tmp_path / "authority")
    server, tool = authority.sign("server"), authority.sign("tool")
    tls = {"cert": str(server.cert), "key": str(server.key), "client_ca": str(authority.cert)}
    with deployed(tmp_path / "world", tls=tls) as deployment:
        plan = deployment.spread(4, ("left", "right"))
        assert "[TRANSPORT] sidecar 'left'" in deployment.apply("apply", plan).stderr
        known = ("--ca", authority.cert, "--cert", tool.cert, "--key", tool.key)
        ran = deployment.apply("apply", plan, *known)
        assert ran.returncode == 0, ran.stderr
        files = TlsFiles(ca=authority.cert, cert=tool.cert, key=tool.key)
        with EmbeddingClient.connect(deployment.plan, lane="tcp", tls=files) as client:
            assert client.plan.epoch == 4
            bags = random_bags(client.plan, 4, seed=1)
            wanted, _ = expected(client.plan, deployment.world.rows, bags)
            np.testing.assert_allclose(client.lookup(*bags.part, deadline_ms=60_000).out, wanted, rtol=1e-5, atol=1e-5)


def ranker_settings(directory: Path, **parameters: str) -> TlsFiles | None:
    config = {"parameters": {key: {"string_value": value} for key, value in parameters.items()}}
    return read_settings(
        {
            "model_config": json.dumps(config),
            "model_name": "m",
            "model_repository": str(directory),
            "model_version": "1",
            "model_instance_kind": "CPU",
            "model_instance_device_id": "0",
        }
    ).tls


def test_a_ranker_takes_its_certificates_from_its_parameters(artifact: SmallArtifact, authority: Authority) -> None:
    client = authority.sign("client")
    tls = ranker_settings(
        artifact.directory, tls_ca="../authority/ca.pem", tls_cert="../authority/client.pem", tls_key=str(client.key)
    )
    (artifact.directory / "1").mkdir()  # the version directory, which paths are relative to
    with ready(artifact.config):
        assert_answers(artifact, "shm", tls)
    assert ranker_settings(artifact.directory) is None
    with pytest.raises(ConfigError, match="tls_ca: missing"):
        ranker_settings(artifact.directory, tls_cert="client.pem", tls_key="client.key")
