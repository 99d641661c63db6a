"""`sidecar.yaml` is strict, explains what is wrong with it, and its reference cannot go stale."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from sidepool.sidecar.config import SidecarConfig, is_wildcard, join_endpoint, load_sidecar_config, schema, split_endpoint
from sidepool.wire.config import decode
from sidepool.wire.errors import ConfigError

REFERENCE = Path(__file__).parents[2] / "docs" / "sidecar.md"
LEAST = {"name": "sc0", "plan": "plan.yaml", "shards": "shards"}


def reference_rows(properties: dict[str, Any], required: list[str], prefix: str = "") -> Iterator[str]:
    """The rows of the table in docs/sidecar.md that describe these properties of the JSON Schema."""
    for key, field in properties.items():
        references = [field, *field.get("anyOf", [])]
        inner = next((r["$ref"].rsplit("/", 1)[1] for r in references if "$ref" in r), None)
        default = "required" if key in required else "null" if field.get("default") is None else json.dumps(field["default"])
        shown = "" if inner and "anyOf" not in field else default
        yield f"| `{prefix}{key}` | {shown} | {' '.join(field['description'].split())} |"
        if inner:
            definition = schema()["$defs"][inner]
            yield from reference_rows(definition["properties"], definition.get("required", []), f"{prefix}{key}.")


def test_the_reference_documents_every_key_with_its_default() -> None:
    expected = "\n".join(reference_rows(schema()["properties"], schema()["required"]))
    assert expected in REFERENCE.read_text(encoding="utf-8"), f"replace the table in {REFERENCE} by:\n{expected}"


def test_the_least_configuration_binds_loopback_only() -> None:
    listen = decode(LEAST, SidecarConfig, where="test").listen
    for endpoint in (listen.grpc, listen.tcp, listen.metrics):
        assert endpoint is not None
        assert split_endpoint(endpoint)[0] == "127.0.0.1"


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    path = tmp_path / "sidecar.yaml"
    etcd = {"etcd": ["h:2379"], "prefix": "/a", "tls": {"ca": "ca.pem"}}
    settings = {
        **LEAST, "listen": {"unix": "lane.sock"}, "tls": {"cert": "c.pem", "key": "/etc/k.pem"}, "coordination": etcd
    }  # fmt: skip
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    config = load_sidecar_config(path)
    assert (config.plan, config.shards) == (str(tmp_path / "plan.yaml"), str(tmp_path / "shards"))
    assert config.listen.unix == str(tmp_path / "lane.sock")
    assert config.tls is not None
    assert (config.tls.cert, config.tls.key, config.tls.client_ca) == (str(tmp_path / "c.pem"), "/etc/k.pem", None)
    assert config.coordination is not None
    assert config.coordination.tls is not None
    assert (config.coordination.tls.ca, config.coordination.tls.key) == (str(tmp_path / "ca.pem"), None)


def test_lanes_and_metrics_are_switched_off_with_null() -> None:
    config = decode({**LEAST, "listen": {"tcp": None, "metrics": None}}, SidecarConfig, where="test")
    assert (config.listen.tcp, config.listen.metrics) == (None, None)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"slotz": 4}, r"slotz: unknown key; allowed here: version, name, plan"),
        ({"listen": {"grcp": "x"}}, r"listen\.grcp: unknown key; allowed here: grpc, tcp, tcp_credits, unix, rdma, metrics"),
        ({"slots": 0}, r"slots: found 0; allowed: greater than or equal to 1"),
        ({"slots": "16"}, r"slots: found '16'; allowed: a valid integer"),
        ({"engines": 257}, r"engines: found 257; allowed: less than or equal to 256"),
        ({"memory": {"numa": -1}}, r"memory\.numa: found -1; allowed: 'auto', 'off' or the number of a node, 0 to 1023"),
        ({"memory": {"numa": "all"}}, r"memory\.numa: found 'all'; allowed: 'auto', 'off' or the number of a node"),
        ({"memory": {"huge_pages": "yes"}}, r"memory\.huge_pages: found 'yes'; allowed: 'transparent', 'hugetlb' or 'off'"),
        ({"memory": {"huge_pages": "hugetlb"}, "promote": False}, r"memory\.huge_pages hugetlb only with promote true"),
        ({"pool": {"lookahead_bytes": 63}}, r"pool\.lookahead_bytes: found 63; allowed: 'auto' or 64 to 1048576 bytes"),
        ({"version": 2}, r"version: found 2; allowed: 1 \(another version"),
        ({"version": True}, r"version: found True; allowed: a valid integer"),
        ({"drain_timeout_s": 0}, r"drain_timeout_s: found 0; allowed: greater than 0"),
        ({"request_slot_bytes": 4096}, r"request_slot_bytes: found 4096; allowed: greater than or equal to 65536"),
        ({"response_slot_bytes": 65537}, r"response_slot_bytes: found 65537; allowed: a multiple of 4096"),
        ({"slots": 65}, r"slots: found 65; allowed: less than or equal to 64"),
        ({"log_level": "loud"}, r"log_level: found 'loud'; allowed: 'debug', 'info', 'warning' or 'error'"),
        ({"name": ""}, r"name: found ''"),
        ({"listen": {"grpc": None}}, r"listen\.grpc: found None; allowed: a valid string"),
        ({"listen": {"unix": "x" * 200}}, r"listen\.unix: found .*; allowed: a path of 1 to 107 bytes"),
        ({"tls": {"cert": "c"}}, r"tls\.key: missing"),
        ({"coordination": {"etcd": [], "prefix": "/a"}}, r"coordination\.etcd: found \[\]"),
        ({"coordination": {"etcd": ["h"], "prefix": "/a"}}, r"coordination\.etcd\.0: found 'h'"),
        ({"coordination": {"etcd": ["h:1"], "prefix": "/a/"}}, r"coordination\.prefix: found '/a/'"),
        ({"coordination": {"etcd": ["h:1"], "prefix": "/a", "tls": {"ca": "c", "key": "k"}}}, r"cert and key, or neither"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        decode({**LEAST, **change}, SidecarConfig, where="test")


@pytest.mark.parametrize(
    "endpoint", ["50151", "127.0.0.1", "127.0.0.1:", ":1", "a:65536", "a:-1", "::1:80", "[::1]", "[a]:1", "a:\u0661"]
)
def test_what_is_no_endpoint_is_refused(endpoint: str) -> None:
    with pytest.raises(ConfigError, match=r"listen\.grpc: found .*; allowed: host:port"):
        decode({**LEAST, "listen": {"grpc": endpoint}}, SidecarConfig, where="test")


@pytest.mark.parametrize(
    ("endpoint", "host", "wildcard"),
    [
        ("127.0.0.1:0", "127.0.0.1", False),
        ("[::1]:65535", "::1", False),
        ("[::]:1", "::", True),
        ("0.0.0.0:1", "0.0.0.0", True),
        ("h:2", "h", False),
    ],
)
def test_endpoints_split_and_join(endpoint: str, host: str, wildcard: bool) -> None:
    assert decode({**LEAST, "listen": {"grpc": endpoint}}, SidecarConfig, where="test").listen.grpc == endpoint
    found, port = split_endpoint(endpoint)
    assert (found, join_endpoint(found, port), is_wildcard(found)) == (host, endpoint, wildcard)
